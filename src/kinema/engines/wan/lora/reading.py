"""The tensors of a LoRA file: what each module of a transformer gets. Letters: r rank."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from kinema.engines.wan.checkpoint import Checkpoint
from kinema.engines.wan.lora.delta import Delta, Deltas, LoraRef
from kinema.engines.wan.lora.digests import combined
from kinema.engines.wan.lora.fit import Layer, Shapes, files_of, fit
from kinema.engines.wan.lora.header import LoraFacts, facts_of, open_header, quoted, told
from kinema.engines.wan.safetensors_header import Header
from kinema.engines.wan.tensors import DTYPES, FLOAT8
from kinema.engines.wan.transformer.shapes import shapes
from kinema.errors import InvalidRequest

# Three of the largest files there are for the 14B.
_MAX_KEPT_BYTES = 2 * 2**30
# Numbers of 8 bits need scales, which no format of LoRAs has.
_TYPES = {name for name, dtype in DTYPES.items() if dtype not in FLOAT8}


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA that was read.

    ``deltas`` has, by the names of transformers (``transformer``, ``transformer_2``), what their modules get, by
    diffusers' names of modules; a table has the name of its parameter (``blocks.0.scale_shift_table``). Experts that
    get the same have the same mapping. ``digest`` is the SHA-256 of the file's bytes, of two files that of both
    digests. ``size_bytes`` is the size of the files, and ``facts`` are those of the first.
    """

    deltas: Mapping[str, Deltas]
    facts: LoraFacts
    digest: str
    size_bytes: int


def read_lora(
    path: Path, transformers: Mapping[str, Shapes], *, only: str | None = None, second: Path | None = None
) -> Lora:
    """Read a LoRA for ``transformers``: the names and shapes of the weights of each one, by the name of its folder.

    A file whose keys name no transformer is for all of them, or for ``only`` one. With ``second``, ``path`` is for
    ``transformer`` and ``second`` for ``transformer_2``. Raises InvalidRequest for a file that is damaged, is no LoRA,
    does not fit or has values that are not finite, with one sentence that says which.
    """
    one, *more = [_read_file(file, transformers, its) for file, its in files_of(path, only, second)]
    if not more:
        return one
    two = more[0]
    digest = combined([one.digest, two.digest])
    return Lora({**one.deltas, **two.deltas}, one.facts, digest, one.size_bytes + two.size_bytes)


_Key = tuple[str, Path, str | None]


class LoraReader:
    """What LoRAs change of ``transformers``; see ``read_lora``.

    A LoRA stays in the host's memory as long as somebody holds it, and those that were used last stay longer, up to
    ``max_bytes``. All methods may be called on any thread.
    """

    def __init__(self, transformers: Mapping[str, Shapes], max_bytes: int = _MAX_KEPT_BYTES) -> None:
        self._transformers = transformers
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._here: WeakValueDictionary[_Key, Lora] = WeakValueDictionary()
        self._kept: OrderedDict[_Key, Lora] = OrderedDict()
        self._reading: dict[_Key, Future[Lora]] = {}

    @property
    def digests(self) -> list[str]:
        """Those of the LoRAs in memory."""
        with self._lock:
            return sorted({digest for digest, _path, _only in self._here})

    def read(self, ref: LoraRef) -> Lora:
        """The LoRA, from memory or from its files. Who asks while it is read waits for the same reading.

        Raises InvalidRequest as ``read_lora`` does, and when the files are not those that the request meant.
        """
        key = ref.digest, ref.path, ref.only
        with self._lock:
            if (found := self._here.get(key)) is not None:
                self._keep(key, found)
                return found
            reading = self._reading.get(key)
            if reading is None:
                mine = self._reading[key] = Future()
        if reading is not None:
            return reading.result()
        try:
            found = self._read(ref)
        except BaseException as exc:
            with self._lock:
                del self._reading[key]
            mine.set_exception(exc)
            raise
        with self._lock:
            del self._reading[key]
            self._here[key] = found
            self._keep(key, found)
        mine.set_result(found)
        return found

    def deltas(self, ref: LoraRef, name: str) -> Deltas:
        """What it changes of the transformer ``name``; nothing where it is for another. Raises as ``read`` does."""
        return self.read(ref).deltas.get(name, {})

    def _read(self, ref: LoraRef) -> Lora:
        found = read_lora(ref.path, self._transformers, only=ref.only, second=ref.second)
        if found.digest != ref.digest:
            raise InvalidRequest(f"the LoRA {ref.path.name} was changed after the video was asked for; ask again")
        return found

    def _keep(self, key: _Key, lora: Lora) -> None:
        self._kept[key] = lora
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and sum(kept.size_bytes for kept in self._kept.values()) > self._max_bytes:
            self._kept.popitem(last=False)


def reader_of(checkpoint: Checkpoint) -> LoraReader:
    """What reads LoRAs for the transformers of a checkpoint."""
    return LoraReader({name: shapes(config) for name, config in checkpoint.transformers.items()})


@dataclass(frozen=True, eq=False)
class Content:
    """The tensors of a file by their keys, in memory of their own, with what its header says beside them."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any]
    digest: str
    size_bytes: int


def read_content(path: Path, header: Header | None = None) -> Content:
    """Read a file of a LoRA, whatever model it is for. ``header`` is its header, where it was read before.

    Raises InvalidRequest for a file that is damaged, changes meanwhile or has values that are not finite.
    """
    header = header or open_header(path)
    if other := sorted({entry.dtype for entry in header.entries.values()} - _TYPES):
        raise InvalidRequest(f"the LoRA {path.name} has numbers of the type {other[0]}; give them in F32, F16 or BF16")
    try:
        with path.open("rb", buffering=0) as file:
            tensors, digest, size = _read_tensors(path.name, file, header)
    except OSError as exc:
        raise InvalidRequest(f"the LoRA {path.name} cannot be read: {exc.strerror}") from exc
    if bad := [key for key, tensor in tensors.items() if not _is_finite(tensor)]:
        raise InvalidRequest(f"the LoRA {path.name} has values that are not finite, in {told(bad)}: it is damaged")
    return Content(tensors, header.metadata, digest, size)


def _read_file(path: Path, transformers: Mapping[str, Shapes], only: str | None) -> Lora:
    header = open_header(path)
    facts, places = facts_of(path.name, header), fit(path.name, header, transformers, only)
    content = read_content(path, header)
    tensors = content.tensors
    if missing := [key for key in places.zeros if tensors[key].any()]:
        raise InvalidRequest(f"the LoRA {path.name} changes modules that this model does not have: {told(missing)}")
    # Experts that get the same have the same layers, and so the same deltas.
    made: dict[int, dict[str, Delta]] = {}
    for layers in places.layers.values():
        if id(layers) not in made:
            found = {module: _delta(path.name, layer, tensors) for module, layer in layers.items()}
            made[id(layers)] = {module: delta for module, delta in found.items() if delta.tensors}
    return Lora(
        {name: made[id(layers)] for name, layers in places.layers.items()}, facts, content.digest, content.size_bytes
    )


def _read_tensors(name: str, file: BinaryIO, header: Header) -> tuple[dict[str, Tensor], str, int]:
    """All tensors of the file, and the digest and size of it, in one pass over its bytes."""
    digest = hashlib.sha256()
    start = file.read(8 + len(header.raw))
    digest.update(start)
    tensors: dict[str, Tensor] = {}
    is_same = start[8:] == header.raw
    # They fill the file from the header to its end, without a gap.
    for key, entry in sorted(header.entries.items(), key=lambda item: item[1].start):
        tensors[key] = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        raw = memoryview(cast(Any, tensors[key].view(-1).view(torch.uint8).numpy()))
        is_same = is_same and _fill(file, raw)
        digest.update(raw)
    if not is_same or file.read(1):
        raise InvalidRequest(f"the LoRA {name} was changed while it was read; try again when it is whole")
    return tensors, digest.hexdigest(), os.fstat(file.fileno()).st_size


def _fill(file: BinaryIO, raw: memoryview) -> bool:
    """Read into all of ``raw``; whether the file had so many bytes."""
    done = 0
    while done < len(raw) and (count := file.readinto(raw[done:])):  # type: ignore[attr-defined]
        done += count
    return done == len(raw)


def _is_finite(tensor: Tensor) -> bool:
    """Twenty times as fast as ``isfinite`` of each value: the least and the largest are NaN when any value is."""
    return tensor.numel() == 0 or all(math.isfinite(value) for value in torch.stack(tensor.aminmax()).tolist())


def _delta(name: str, layer: Layer, tensors: Mapping[str, Tensor]) -> Delta:
    """What a module gets. Changes of a whole weight or bias that are zero are left out."""
    given = {kind: tensors[key] for kind, key in layer.keys.items()}
    down, up, bias, scale = given.get("down"), given.get("up"), given.get("bias"), layer.scale
    if down is not None and "alpha" in given:
        scale = given["alpha"].item() / down.shape[0]
    if "up_bias" in given:
        scaled = _scaled(given["up_bias"], scale)
        bias = scaled if bias is None else bias.float() + scaled
    weight = given.get("weight")
    delta = Delta(
        down=None if down is None else down.reshape(down.shape[0], -1),
        up=None if up is None else _scaled(up.reshape(up.shape[0], -1), scale),
        weight=None if weight is None or not weight.any() else weight.reshape(layer.shape),
        bias=None if bias is None or not bias.any() else bias,
    )
    if scale != 1 and not all(map(_is_finite, delta.tensors)):
        raise InvalidRequest(f"the LoRA {name} has a scale that is too large: {scale:g} for {quoted(layer.keys['up'])}")
    return delta


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else tensor.float() * scale
