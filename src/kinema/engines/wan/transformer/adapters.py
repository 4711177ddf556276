"""LoRAs (arXiv 2106.09685) on a network: what a generation adds to the results of its layers.

The network's own weights stay as they are, so LoRAs work beside every kind of layer (e4m3, in the host's memory, split
among ranks), and a generation without any computes as if there were none. All numbers of a generation's LoRAs lie in
one piece of memory. When the turn changes to it, they are copied to where the layers read them: always the same memory,
so that recorded steps find them there. Letters: r rank, n parts of a layer.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kinema.engines.wan.lora.delta import Delta, Deltas, LoraRef
from kinema.engines.wan.streaming import Layers
from kinema.engines.wan.transformer.image_embedder import ImageEmbedder
from kinema.engines.wan.transformer.layers import (
    AdaptedFeedForward,
    AdaptedLinear,
    Change,
    Linear,
)
from kinema.engines.wan.transformer.network import Block, Network, Reader, Readers, dtype_of

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

# The units that multiply take so many numbers at once; a rank is filled up with zeros.
_RANK_STEP = 16
# The device reads matrices by kernels that want such an address.
_ALIGNMENT = 256
# Generations whose LoRAs change the same layers by the same ranks share the memory where layers read. There are so many
# kinds of it at once.
MAX_LAYOUTS = 4

# Where the modules of a block are in a ``Block``: the layer, and the number of the part of its result that is theirs.
_BLOCK_LAYERS = {
    "attn1.to_q": ("qkv", 0),
    "attn1.to_k": ("qkv", 1),
    "attn1.to_v": ("qkv", 2),
    "attn1.to_out.0": ("out", 0),
    "attn2.to_q": ("cross_q", 0),
    "attn2.to_out.0": ("cross_out", 0),
    "ffn.net.0.proj": ("up", 0),
    "ffn.net.2": ("down", 0),
    "attn2.to_k": ("keys_values", 0),
    "attn2.to_v": ("keys_values", 1),
    "attn2.add_k_proj": ("image_keys_values", 0),
    "attn2.add_v_proj": ("image_keys_values", 1),
}
_OUTER_LAYERS = {
    "patch_embedding": "patch",
    "condition_embedder.time_embedder.linear_1": "time_in",
    "condition_embedder.time_embedder.linear_2": "time_out",
    "condition_embedder.time_proj": "time_projection",
    "condition_embedder.text_embedder.linear_1": "text_in",
    "condition_embedder.text_embedder.linear_2": "text_out",
    "proj_out": "head",
}
_NORMS = ("attn1.norm_q", "attn1.norm_k", "attn2.norm_q", "attn2.norm_k", "attn2.norm_added_k", "norm2")
# What reads image states, and where its layers and its norms are in an ``ImageEmbedder``.
_IMAGES = "condition_embedder.image_embedder"
_IMAGE_LAYERS = {f"{_IMAGES}.ff.net.0.proj": "image_up", f"{_IMAGES}.ff.net.2": "image_down"}
_TABLE = "scale_shift_table"


@dataclass(frozen=True)
class Piece:
    """A tensor in the memory of LoRAs: where it begins, and what it is."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def view(self, data: Tensor) -> Tensor:
        """The tensor, as a view of the memory (bytes,)."""
        return data[self.start : self.stop].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Layout:
    """The pieces that some LoRAs need, by the layer or module and the kind: the same for LoRAs that change the same
    modules, by ranks that are filled up to the same.
    """

    pieces: tuple[tuple[tuple[str, str], Piece], ...]
    num_bytes: int

    def views(self, data: Tensor) -> dict[tuple[str, str], Tensor]:
        """All of them, as views of the memory (bytes,)."""
        return {key: piece.view(data) for key, piece in self.pieces}


@dataclass(frozen=True, eq=False)
class Adaptation:
    """The numbers of a generation's LoRAs for one transformer, ``data`` (bytes,) on its device."""

    layout: Layout
    data: Tensor


class AdaptedLayers(Generic[T_co]):
    """``Layers`` of which each is changed when it comes, by its own of ``changes``."""

    def __init__(self, layers: Layers[T_co], changes: Sequence[Callable[[T_co], T_co]]) -> None:
        self._layers = layers
        self._changes = changes

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[T_co]:
        for layer, change in zip(self._layers, self._changes, strict=True):
            yield change(layer)


@dataclass(frozen=True)
class _BlockChanges:
    """What LoRAs change of a block and of its reader: its ``layers``, and its norms by the kind of their tensor."""

    layers: Mapping[str, Change]
    norms: Mapping[tuple[str, str], Tensor]

    def block(self, block: Block) -> Block:
        """The block with what is its own."""
        query, key = block.norms
        changed = replace(
            block,
            qkv=_adapted(block.qkv, self.layers.get("qkv")),
            out=_adapted(block.out, self.layers.get("out")),
            cross_q=_adapted(block.cross_q, self.layers.get("cross_q")),
            cross_out=_adapted(block.cross_out, self.layers.get("cross_out")),
            feed_forward=self._feed_forward(block.feed_forward),
        )
        if not self.norms:
            return changed
        affine = block.cross_norm
        return replace(
            changed,
            norms=torch.stack([self._norm("attn1.norm_q", query), self._norm("attn1.norm_k", key)]),
            cross_norm_q=self._norm("attn2.norm_q", block.cross_norm_q),
            cross_norm=Linear(self._norm("norm2", affine.weight), self._norm("norm2", affine.bias, "bias")),
        )

    def readers(self, readers: Readers) -> Readers:
        """The readers with what is their own."""
        text, images = readers.text, readers.images
        own = Reader(_adapted(text.keys_values, self.layers.get("keys_values")), self._norm("attn2.norm_k", text.norm))
        if images is None:
            return Readers(own)
        keys_values = _adapted(images.keys_values, self.layers.get("image_keys_values"))
        return Readers(own, Reader(keys_values, self._norm("attn2.norm_added_k", images.norm)))

    def _feed_forward(self, base: Any) -> Any:  # noqa: ANN401 - any kind of feed-forward, or its adapted one
        up, down = self.layers.get("up"), self.layers.get("down")
        if up is None and down is None:
            return base
        return AdaptedFeedForward(_adapted(base.up, up), _adapted(base.down, down))

    def _norm(self, module: str, base: Tensor, kind: str = "weight") -> Tensor:
        return _sum(base, self.norms.get((module, kind)))


@dataclass(frozen=True)
class _AdaptedImageEmbedder:
    """An ``ImageEmbedder`` and what LoRAs change of it, by the names of their modules and kinds or of the layers."""

    base: ImageEmbedder
    views: Mapping[tuple[str, str], Tensor]
    changes: Mapping[str, Change]

    def __call__(self, states: Tensor) -> Tensor:
        """See ``ImageEmbedder``."""
        base = self.base
        changed = replace(
            base,
            positions=None if base.positions is None else self._sum(base.positions, "pos_embed"),
            norm_in=self._norm(base.norm_in, "norm1"),
            up=_adapted(base.up, self.changes.get("image_up")),
            down=_adapted(base.down, self.changes.get("image_down")),
            norm_out=self._norm(base.norm_out, "norm2"),
        )
        return changed(states)

    def _norm(self, base: Linear, name: str) -> Linear:
        return Linear(self._sum(base.weight, name), self._sum(base.bias, name, "bias"))

    def _sum(self, base: Tensor, name: str, kind: str = "weight") -> Tensor:
        change = self.views.get((f"{_IMAGES}.{name}", kind))
        return _sum(base, None if change is None else change.view(base.shape))


def _sum(base: Tensor, change: Tensor | None) -> Tensor:
    return base if change is None else (base.float() + change).to(base.dtype)


class Adapters:
    """The LoRAs of one network's generations, of which one has the turn. ``read`` reads one from its files."""

    def __init__(self, network: Network, read: Callable[[LoraRef], Deltas]) -> None:
        self._network = network
        self._read = read
        # Those of the generations that are here, so that two of the same LoRAs have them once.
        self._made: WeakValueDictionary[tuple[tuple[str, float], ...], Adaptation] = WeakValueDictionary()
        # The last one stays for a while, for the next generation of the same LoRAs.
        self._last: Adaptation | None = None
        self._adapted: OrderedDict[Layout, _Adapted] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """What they take of the device's memory."""
        places = sum(layout.num_bytes for layout in self._adapted)
        return places + sum(made.layout.num_bytes for made in self._made.values())

    def compose(self, loras: Sequence[LoraRef]) -> Adaptation | None:
        """The numbers of these LoRAs together; None when there is none. Keep it as long as the generation is here."""
        if not loras:
            return None
        key = tuple((one.digest, one.strength) for one in loras)
        made = self._made.get(key)
        if made is None:
            self._last = None
            made = self._made[key] = _compose([(self._read(one), one.strength) for one in loras], self._network)
        self._last = made
        return made

    def network(self, adaptation: Adaptation) -> Network:
        """The network with these LoRAs, until it is asked for with others."""
        layout = adaptation.layout
        adapted = self._adapted.pop(layout, None)
        if adapted is None:
            while len(self._adapted) >= MAX_LAYOUTS:
                self._adapted.popitem(last=False)
            adapted = _Adapted(self._network, layout)
        self._adapted[layout] = adapted
        adapted.take(adaptation)
        return adapted.network

    def drop(self) -> None:
        """Free what is not needed until the next step."""
        self._last = None
        self._adapted.clear()


class _Adapted:
    """A network whose layers read LoRAs of one layout, always from the same memory."""

    def __init__(self, network: Network, layout: Layout) -> None:
        self._base = network
        self._data = torch.empty(layout.num_bytes, dtype=torch.uint8, device=network.device)
        views = layout.views(self._data)
        changes = _changes_of(views)
        self._tables = {module: view for (module, _kind), view in views.items() if module.endswith(_TABLE)}
        outer = {name: _adapted(getattr(network, name), changes.get(name)) for name in _OUTER_LAYERS.values()}
        images = network.images
        own = [_block_changes(f"blocks.{index}.", views, changes) for index in range(len(network.blocks))]
        self.network = replace(
            network,
            **outer,
            blocks=AdaptedLayers(network.blocks, [one.block for one in own]),
            readers=AdaptedLayers(network.readers, [one.readers for one in own]),
            images=_AdaptedImageEmbedder(images, views, changes) if isinstance(images, ImageEmbedder) else None,
            modulation=network.modulation.clone() if self._tables else network.modulation,
            head_modulation=network.head_modulation.clone() if self._tables else network.head_modulation,
        )
        self._taken: Adaptation | None = None

    def take(self, adaptation: Adaptation) -> None:
        """Let the layers read these numbers from now on."""
        if self._taken is adaptation:
            return
        self._taken = None
        self._data.copy_(adaptation.data)
        if self._tables:
            self._change_tables()
        self._taken = adaptation

    def _change_tables(self) -> None:
        network, base = self.network, self._base
        for module, change in self._tables.items():
            if module == _TABLE:
                torch.add(base.head_modulation, change[0], out=network.head_modulation)
            else:
                index = int(module.split(".")[1])
                torch.add(base.modulation[index], change[0], out=network.modulation[index])


def _adapted(layer: T, change: Change | None) -> T:
    return layer if change is None else AdaptedLinear(layer, change)  # type: ignore[arg-type, return-value]


def _block_changes(
    prefix: str, views: Mapping[tuple[str, str], Tensor], changes: Mapping[str, Change]
) -> _BlockChanges:
    norms = {
        (module, kind): view
        for module in _NORMS
        for kind in ("weight", "bias")
        if (view := views.get((prefix + module, kind))) is not None
    }
    own = {layer: changes[prefix + layer] for layer, _part in _BLOCK_LAYERS.values() if prefix + layer in changes}
    return _BlockChanges(own, norms)


@dataclass
class _Wanted:
    """What some LoRAs change of one layer: by the part's number its rank, and the parts whose whole weight changes.

    A part has ``inputs`` and ``outputs``.
    """

    dtype: torch.dtype
    inputs: int = 0
    outputs: int = 0
    ranks: dict[int, int] = field(default_factory=dict)
    whole: set[int] = field(default_factory=set)
    has_bias: bool = False

    @property
    def rank(self) -> int:
        """The rank of each part, filled up."""
        return -(-max(self.ranks.values()) // _RANK_STEP) * _RANK_STEP

    def add(self, part: int, delta: Delta) -> None:
        """Count what one LoRA changes of a part."""
        if delta.down is not None and delta.up is not None:
            self.ranks[part] = self.ranks.get(part, 0) + len(delta.down)
            self.outputs, self.inputs = len(delta.up), delta.down.shape[1]
        if delta.weight is not None:
            self.whole.add(part)
            self.outputs, self.inputs = delta.weight.shape
        if delta.bias is not None:
            self.has_bias = True
            self.outputs = len(delta.bias)


def _place_of(module: str) -> tuple[str, int] | None:
    """The layer of a module, and the number of its part; None for a norm or a table."""
    if (layer := _OUTER_LAYERS.get(module) or _IMAGE_LAYERS.get(module)) is not None:
        return layer, 0
    prefix, own = _split(module)
    if own not in _BLOCK_LAYERS:
        return None
    layer, part = _BLOCK_LAYERS[own]
    return prefix + layer, part


def _split(module: str) -> tuple[str, str]:
    """``blocks.3.attn1.to_q`` as ``blocks.3.`` and ``attn1.to_q``."""
    parts = module.split(".", 2)
    return (f"{parts[0]}.{parts[1]}.", parts[2]) if parts[0] == "blocks" else ("", module)


# In how many equal parts the result of a layer is made, where it is not one.
_NUM_PARTS = {"qkv": 3, "keys_values": 2, "image_keys_values": 2}


def _layout_of(loras: Sequence[Deltas], dtype: torch.dtype) -> Layout:
    """The pieces for these LoRAs, in a network of this type."""
    pieces: dict[tuple[str, str], Piece] = {}
    size = 0

    def add(key: tuple[str, str], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        nonlocal size
        if key not in pieces:
            pieces[key] = piece = Piece(size, shape, dtype)
            size = piece.stop + -piece.stop % _ALIGNMENT

    wanted: dict[str, _Wanted] = {}
    for module, delta in _in_order(loras):
        place = _place_of(module)
        if place is not None:
            layer, part = place
            wanted.setdefault(layer, _Wanted(dtype_of(f"{module}.weight", dtype))).add(part, delta)
            continue
        for kind, change in (("weight", delta.weight), ("bias", delta.bias)):
            if change is not None:
                add((module, kind), tuple(change.shape), torch.float32)
    for layer, want in wanted.items():
        if want.ranks:
            add((layer, "down"), (len(want.ranks) * want.rank, want.inputs), want.dtype)
        for part in sorted(want.ranks):
            add((layer, f"up {part}"), (want.outputs, want.rank), want.dtype)
        for part in sorted(want.whole):
            add((layer, f"whole {part}"), (want.outputs, want.inputs), want.dtype)
        if want.has_bias:
            num_parts = _NUM_PARTS.get(layer.rpartition(".")[2], 1)
            add((layer, "added"), (num_parts * want.outputs,), want.dtype)
    return Layout(tuple(pieces.items()), size)


def _in_order(loras: Sequence[Deltas]) -> Iterator[tuple[str, Delta]]:
    """All changes, in an order that depends on the modules alone."""
    for module in sorted({module for deltas in loras for module in deltas}):
        for deltas in loras:
            if (delta := deltas.get(module)) is not None:
                yield module, delta


def _compose(loras: Sequence[tuple[Deltas, float]], network: Network) -> Adaptation:
    """The numbers of all these LoRAs, with their strengths, on the device. They are rounded after that."""
    layout = _layout_of([deltas for deltas, _strength in loras], network.dtype)
    adaptation = Adaptation(layout, torch.zeros(layout.num_bytes, dtype=torch.uint8, device=network.device))
    views = layout.views(adaptation.data)
    used: dict[tuple[str, int], int] = {}
    for deltas, strength in loras:
        for module, delta in deltas.items():
            place = _place_of(module)
            if place is None:
                _add(views, (module, "weight"), delta.weight, strength)
                _add(views, (module, "bias"), delta.bias, strength)
            else:
                start = used.get(place, 0)
                used[place] = start + _write(views, *place, start, delta, strength)
    return adaptation


def _write(
    views: Mapping[tuple[str, str], Tensor], layer: str, part: int, start: int, delta: Delta, strength: float
) -> int:
    """Write what a part of a layer gets, its low rank from the number ``start`` on; return that rank."""
    rank = 0
    if delta.down is not None and delta.up is not None:
        rank, up = len(delta.down), views[layer, f"up {part}"]
        own = [number for number in range(part) if (layer, f"up {number}") in views]
        row = len(own) * up.shape[1] + start
        views[layer, "down"][row : row + rank].copy_(delta.down)
        up[:, start : start + rank].copy_(_scaled(delta.up, strength, up.device))
    _add(views, (layer, f"whole {part}"), delta.weight, strength)
    if delta.bias is not None:
        bias, size = views[layer, "added"], len(delta.bias)
        bias[part * size : (part + 1) * size].add_(_scaled(delta.bias, strength, bias.device))
    return rank


def _add(views: Mapping[tuple[str, str], Tensor], key: tuple[str, str], change: Tensor | None, strength: float) -> None:
    if change is not None:
        views[key].add_(_scaled(change, strength, views[key].device))


def _scaled(change: Tensor, strength: float, device: torch.device) -> Tensor:
    """float32 on the device."""
    return change.to(device).float() * strength


def _changes_of(views: Mapping[tuple[str, str], Tensor]) -> dict[str, Change]:
    """What each layer adds, from the views of its pieces."""
    changes: dict[str, Change] = {}
    for layer in dict.fromkeys(layer for layer, kind in views if kind not in ("weight", "bias")):
        parts = []
        for part in range(_NUM_PARTS.get(layer.rpartition(".")[2], 1)):
            up, whole = views.get((layer, f"up {part}")), views.get((layer, f"whole {part}"))
            if (first := whole if up is None else up) is not None:
                parts.append((part * len(first), up, whole))
        changes[layer] = Change(tuple(parts), views.get((layer, "down")), views.get((layer, "added")))
    return changes
