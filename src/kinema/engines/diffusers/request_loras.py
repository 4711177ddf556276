"""The LoRAs of requests, by the library's own means: files in any format that it converts, kept as adapters.

All videos share the networks, and so their adapters: before each turn those of its video are switched on, with its
strengths. Weights are never merged, so a video without a LoRA is what it was before there was one.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from kinema.engines.wan.lora.header import told
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


class Adapters:
    """The adapters of one pipeline, by the digests of their files. ``library`` has the files.

    ``read`` may be called on any thread, the rest on the device's.
    """

    def __init__(self, pipeline: Any, library: LoraLibrary) -> None:  # noqa: ANN401 - of diffusers
        self._pipeline = pipeline
        self._library = library
        self._loaded: OrderedDict[str, str] = OrderedDict()
        self._in_use: Counter[str] = Counter()
        self._active: tuple[tuple[str, float], ...] | None = None

    @property
    def digests(self) -> Sequence[str]:
        """Those that are loaded."""
        return tuple(self._loaded)

    def read(self, uses: Sequence[LoraUse]) -> dict[str, Content]:
        """Each file that is not loaded, by its digest, in memory of its own: what becomes of the file is then of no
        consequence. Raises InvalidRequest for one that is gone or another one now, or cannot be read."""
        read = {}
        for use in uses:
            if use.digest in self._loaded:
                continue
            content = read_content(self._library.file(use.name, use.digest).path)
            if content.digest != use.digest:
                raise InvalidRequest(f"the LoRA {use.name} was changed after the video was asked for; ask again")
            read[use.digest] = content
        return read

    @contextmanager
    def held(self, request: GenerationRequest, read: object) -> Iterator[None]:
        """Load the adapters of a request, and keep them while it runs. ``read`` is what ``read`` gave, if anything.

        Raises InvalidRequest for a LoRA that does not fit.
        """
        digests = [use.digest for use in request.loras]
        self._in_use.update(digests)
        try:
            contents = read if isinstance(read, dict) else {}
            missing = [use for use in request.loras if use.digest not in self._loaded and use.digest not in contents]
            contents = {**contents, **(self.read(missing) if missing else {})}
            for use in request.loras:
                if use.digest not in self._loaded:
                    self._load(use, contents[use.digest])
                self._loaded.move_to_end(use.digest)
            yield
        finally:
            self._in_use.subtract(digests)
            self._drop_old()

    def switch(self, uses: Sequence[LoraUse]) -> None:
        """Let the next turn be made with these LoRAs and no others."""
        wanted = tuple((self._loaded[use.digest], use.scale) for use in uses)
        if wanted == self._active or not self._loaded:
            return
        self._active = None
        if wanted:
            scales: dict[str, float] = {}
            for name, scale in wanted:  # two names of one file are one adapter
                scales[name] = scales.get(name, 0.0) + scale
            self._pipeline.enable_lora()
            self._pipeline.set_adapters(list(scales), list(scales.values()))
        else:
            self._pipeline.disable_lora()
        self._active = wanted

    def _load(self, use: LoraUse, content: Content) -> None:
        tensors, name = content.tensors, f"lora_{use.digest[:16]}"
        # The library says nothing of those that it leaves out.
        if whole := [key for key in tensors if key.endswith(_WHOLE) and tensors[key].any()]:
            raise InvalidRequest(
                f"the LoRA {use.name} changes whole weights, which this engine does not: {told(whole)}", param="loras"
            )
        self._active = None
        try:
            with _source(content) as source:
                self._pipeline.load_lora_weights(**source, adapter_name=name)
            has_place = Counter(self._kinds(name))
        except Exception as exc:
            self._forget(name)
            reason = " ".join(str(exc).split())[:_MAX_REASON_CHARS]
            raise InvalidRequest(f"the LoRA {use.name} does not fit the model: {reason}", param="loras") from exc
        # The library leaves out what it finds no place for.
        meant = Counter(kind for key, tensor in tensors.items() if (kind := _kind_of(key, tensor)))
        for kind, count in meant.items():
            if has_place[kind] < count:
                self._forget(name)
                raise InvalidRequest(
                    f"the LoRA {use.name} does not fit the model: {count - has_place[kind]} of its {count} {kind} have "
                    "no place in it",
                    param="loras",
                )
        self._loaded[use.digest] = name

    def _kinds(self, name: str) -> Iterator[str]:
        """What each tensor of an adapter is."""
        for network in self._networks():
            for text, tensor in network.named_parameters():
                if f".{name}." in text and (kind := _kind_of(text.replace(f".{name}.", "."), tensor)):
                    yield kind

    def _networks(self) -> list[nn.Module]:
        return [one for one in self._pipeline.components.values() if isinstance(one, nn.Module)]

    def _drop_old(self) -> None:
        for digest in [digest for digest in self._loaded if not self._in_use[digest]]:
            if len(self._loaded) <= _MAX_LOADED:
                return
            self._active = None
            self._forget(self._loaded.pop(digest))

    def _forget(self, name: str) -> None:
        if any(name in getattr(network, "peft_config", {}) for network in self._networks()):
            self._pipeline.delete_adapters(name)


class NoAdapters:
    """Stands for them where there is no folder of LoRAs."""

    digests: Sequence[str] = ()

    def read(self, _uses: Sequence[LoraUse]) -> dict[str, Content]:
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
