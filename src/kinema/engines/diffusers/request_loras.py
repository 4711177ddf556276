"""The LoRAs of requests, by the library's own means: files in any format that it converts, kept as adapters.

All videos share the networks, and so their adapters: before each turn those of its video are switched on, with its
strengths. Weights are never merged, so a video without a LoRA is what it was before there was one.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from kinema.engines.wan.lora.digests import combined
from kinema.engines.wan.lora.header import told
from kinema.engines.wan.lora.keys import FIRST, SECOND
from kinema.engines.wan.lora.library import LoraLibrary
from kinema.engines.wan.lora.reading import Content, read_content
from kinema.errors import InvalidRequest
from kinema.request.request import GenerationRequest, LoraUse

# More than a request has, so that a few requests take turns without reading files again.
_MAX_LOADED = 8
# The library names each tensor that does not fit.
_MAX_REASON_CHARS = 500
# The library's names: of its argument, and of what it writes into the header of a file that it saves.
_WEIGHTS, _ADAPTER = "pretrained_model_name_or_path_or_dict", "lora_adapter_metadata"
_FILE = "lora.safetensors"
# The words of all formats for the two matrices of a layer, for what is added to its bias, and for the change of a whole
# weight, of a norm or of the modulation.
_MATRICES = ("lora_A", "lora_B", "lora_down", "lora_up", "lora.down", "lora.up")
_BIASES = (".lora_B.bias", ".lora_up.bias", ".diff_b")
_WHOLE = (".diff", ".diff_m")
# How a file that has both experts of a model names each.
_EXPERT_PREFIXES = _FIRST_PREFIX, _SECOND_PREFIX = f"{FIRST}_1.", f"{SECOND}."
_PREFIX = f"{FIRST}."


@dataclass(frozen=True)
class Read:
    """A LoRA's file in memory. ``only`` is the expert that it is for; None where it is for all, or says so itself.
    With ``second``, a file for the second expert, it is for the first one."""

    content: Content
    only: str | None
    second: Content | None = None


# The name and the digest of a file: its name may say for which expert it is.
_Key = tuple[str, str]


def _key(use: LoraUse) -> _Key:
    return use.name, use.digest


@dataclass(frozen=True)
class _Loaded:
    """An adapter by its name in the networks. ``experts`` have it: those of a model with two, else None is all."""

    name: str
    only: str | None
    experts: tuple[str | None, ...]


class Adapters:
    """The adapters of one pipeline, by the names and digests of their files. ``library`` has the files.

    ``read`` may be called on any thread, the rest on the device's.
    """

    def __init__(self, pipeline: Any, library: LoraLibrary) -> None:  # noqa: ANN401 - of diffusers
        self._pipeline = pipeline
        self._library = library
        self._experts = [name for name in (FIRST, SECOND) if pipeline.components.get(name) is not None]
        self._numbers = itertools.count()
        self._loaded: OrderedDict[_Key, _Loaded] = OrderedDict()
        self._in_use: Counter[_Key] = Counter()
        self._active: tuple[tuple[str, float, float | None], ...] | None = None

    @property
    def digests(self) -> Sequence[str]:
        """Those that are loaded."""
        return tuple(digest for _name, digest in self._loaded)

    def read(self, uses: Sequence[LoraUse]) -> dict[_Key, Read]:
        """Each file that is not loaded, in memory of its own: what becomes of the file is then of no consequence.
        Raises InvalidRequest for one that is gone or another one now, or cannot be read."""
        read = {}
        for use in uses:
            if _key(use) in self._loaded:
                continue
            lora = self._library.file(use.name, use.digest)
            contents = [read_content(path) for path, _stamp in lora.files]
            if combined([content.digest for content in contents]) != use.digest:
                raise InvalidRequest(f"the LoRA {use.name} was changed after the video was asked for; ask again")
            read[_key(use)] = Read(contents[0], lora.only, *contents[1:])
        return read

    @contextmanager
    def held(self, request: GenerationRequest, read: object) -> Iterator[None]:
        """Load the adapters of a request, and keep them while it runs. ``read`` is what ``read`` gave, if anything.

        Raises InvalidRequest for a LoRA that does not fit.
        """
        keys = [_key(use) for use in request.loras]
        self._in_use.update(keys)
        try:
            files = read if isinstance(read, dict) else {}
            missing = [use for use in request.loras if _key(use) not in self._loaded and _key(use) not in files]
            files = {**files, **(self.read(missing) if missing else {})}
            for use, key in zip(request.loras, keys, strict=True):
                if key not in self._loaded:
                    self._load(use, files[key])
                self._loaded.move_to_end(key)
            yield
        finally:
            self._in_use.subtract(keys)
            self._drop_old()

    def switch(self, uses: Sequence[LoraUse]) -> None:
        """Let the next turn be made with these LoRAs and no others."""
        wanted = tuple((self._loaded[_key(use)].name, use.scale, use.scale_2) for use in uses)
        if wanted == self._active or not self._loaded:
            return
        self._active = None
        if wanted:
            strengths = self._strengths(uses)
            self._pipeline.enable_lora()
            self._pipeline.set_adapters(list(strengths), list(strengths.values()))
        else:
            self._pipeline.disable_lora()
        self._active = wanted

    def _strengths(self, uses: Sequence[LoraUse]) -> dict[str, Any]:
        """Those of each adapter, as the library takes them: one for all networks, or one for each. Two names of one
        file are one adapter."""
        found: dict[str, dict[str | None, float]] = {}
        for use in uses:
            loaded = self._loaded[_key(use)]
            of_adapter = found.setdefault(loaded.name, {})
            for expert in loaded.experts:
                strength = use.scale_2 if expert == SECOND and use.scale_2 is not None else use.scale
                of_adapter[expert] = of_adapter.get(expert, 0.0) + strength
        return {name: scales.get(None, scales) for name, scales in found.items()}

    def _load(self, use: LoraUse, read: Read) -> None:
        for (_name, digest), loaded in self._loaded.items():
            if (digest, loaded.only) == (use.digest, read.only):
                self._loaded[_key(use)] = loaded
                return
        name, contents = f"lora_{use.digest[:16]}_{next(self._numbers)}", [read.content, *filter(None, [read.second])]
        tensors = [item for content in contents for item in content.tensors.items()]
        if read.second is not None and (named := [key for key, _ in tensors if key.startswith(_EXPERT_PREFIXES)]):
            raise InvalidRequest(
                f"the LoRA {use.name} has two files, one for each expert, and names experts in them: {told(named)}",
                param="loras",
            )
        # The library says nothing of those that it leaves out.
        if whole := [key for key, tensor in tensors if key.endswith(_WHOLE) and tensor.any()]:
            raise InvalidRequest(
                f"the LoRA {use.name} changes whole weights, which this engine does not: {told(whole)}", param="loras"
            )
        self._active = None
        shares = self._shares(read)
        try:
            for expert, share in shares.items():
                self._load_share(use, name, expert, share)
        except InvalidRequest:
            self._forget(name)
            raise
        self._loaded[_key(use)] = _Loaded(name, read.only, tuple(shares))

    def _shares(self, read: Read) -> dict[str | None, Content]:
        """What each expert of a model with two gets; of another model, all under None."""
        content = read.content
        if len(self._experts) < 2:
            return {None: content}
        if read.second is not None:
            return {FIRST: content, SECOND: read.second}
        second = {
            _PREFIX + key.removeprefix(_SECOND_PREFIX): tensor
            for key, tensor in content.tensors.items()
            if key.startswith(_SECOND_PREFIX)
        }
        first = {
            _PREFIX + key.removeprefix(_FIRST_PREFIX) if key.startswith(_FIRST_PREFIX) else key: tensor
            for key, tensor in content.tensors.items()
            if not key.startswith(_SECOND_PREFIX)
        }
        if second or any(key.startswith(_FIRST_PREFIX) for key in content.tensors):
            named = {FIRST: first, SECOND: second}
            return {expert: replace(content, tensors=tensors) for expert, tensors in named.items() if tensors}
        return {expert: content for expert in (FIRST, SECOND) if read.only in (None, expert)}

    def _load_share(self, use: LoraUse, name: str, expert: str | None, content: Content) -> None:
        """Load what one expert gets. Raises InvalidRequest when it does not fit."""
        more = {"load_into_transformer_2": True} if expert == SECOND else {}
        try:
            with _source(content) as source:
                self._pipeline.load_lora_weights(**source, adapter_name=name, **more)
            has_place = Counter(self._kinds(name, expert))
        except Exception as exc:
            reason = " ".join(str(exc).split())[:_MAX_REASON_CHARS]
            raise InvalidRequest(f"the LoRA {use.name} does not fit the model: {reason}", param="loras") from exc
        # The library leaves out what it finds no place for.
        meant = Counter(kind for key, tensor in content.tensors.items() if (kind := _kind_of(key, tensor)))
        for kind, count in meant.items():
            if has_place[kind] < count:
                raise InvalidRequest(
                    f"the LoRA {use.name} does not fit the model: {count - has_place[kind]} of its {count} {kind} have "
                    "no place in it",
                    param="loras",
                )

    def _kinds(self, name: str, expert: str | None) -> Iterator[str]:
        """What each tensor of an adapter is, in one expert or in all networks."""
        networks = self._networks() if expert is None else [self._pipeline.components[expert]]
        for network in networks:
            for text, tensor in network.named_parameters():
                if f".{name}." in text and (kind := _kind_of(text.replace(f".{name}.", "."), tensor)):
                    yield kind

    def _networks(self) -> list[nn.Module]:
        return [one for one in self._pipeline.components.values() if isinstance(one, nn.Module)]

    def _drop_old(self) -> None:
        for key in [key for key in self._loaded if not self._in_use[key]]:
            if len(self._loaded) <= _MAX_LOADED:
                return
            self._active = None
            loaded = self._loaded.pop(key)
            if loaded not in self._loaded.values():
                self._forget(loaded.name)

    def _forget(self, name: str) -> None:
        if any(name in getattr(network, "peft_config", {}) for network in self._networks()):
            self._pipeline.delete_adapters(name)


class NoAdapters:
    """Stands for them where there is no folder of LoRAs."""

    digests: Sequence[str] = ()

    def read(self, _uses: Sequence[LoraUse]) -> dict[_Key, Read]:
        """Raises InvalidRequest."""
        raise InvalidRequest("this worker has no LoRAs (engine.diffusers.loras)", param="loras")

    def held(self, request: GenerationRequest, _read: object) -> Any:  # noqa: ANN401 - a context
        """Raises InvalidRequest for a request with LoRAs."""
        if request.loras:
            self.read(request.loras)
        return nullcontext()

    def switch(self, _uses: Sequence[LoraUse]) -> None:
        """There is nothing to switch."""


@contextmanager
def _source(content: Content) -> Iterator[dict[str, Any]]:
    """What the library reads: the tensors, or a file of them where the header may say alpha, which tensors do not."""
    metadata = {key: value for key, value in content.metadata.items() if isinstance(value, str)}
    if _ADAPTER not in metadata:
        yield {_WEIGHTS: dict(content.tensors)}
        return
    from safetensors.torch import save_file  # noqa: PLC0415 - with such LoRAs alone

    with TemporaryDirectory(prefix="kinema-lora-") as folder:
        save_file(dict(content.tensors), Path(folder, _FILE), metadata)
        yield {_WEIGHTS: folder, "weight_name": _FILE, "use_safetensors": True, "local_files_only": True}


def _kind_of(key: str, tensor: Tensor) -> str | None:
    """What a tensor is, by the words of all formats; None for one that has no effect, and for alpha."""
    if key.endswith(_BIASES):
        return "biases" if tensor.any() else None
    is_matrix = key.endswith((".weight", ".lora_A", ".lora_B")) and any(word in key for word in _MATRICES)
    return "matrices" if is_matrix else None
