"""The LoRAs of requests, by the library's own means: files in any format that it converts, kept as adapters.

All videos share the networks, and so their adapters: before each turn those of its video are switched on, with its
strengths. Weights are never merged, so a video without a LoRA is what it was before there was one.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from kinema.engines.wan.lora.library import LoraLibrary
from kinema.engines.wan.safetensors_header import read_header
from kinema.errors import InvalidRequest
from kinema.request.request import GenerationRequest, LoraUse

Weights = Mapping[str, Tensor]

# More than a request has, so that a few requests take turns without reading files again.
_MAX_LOADED = 8
# The library names each tensor that does not fit.
_MAX_REASON_CHARS = 500
# The library's names: of its argument, and of what it writes into the header of a file that it saves.
_WEIGHTS, _ADAPTER = "pretrained_model_name_or_path_or_dict", "lora_adapter_metadata"


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

    def read(self, uses: Sequence[LoraUse]) -> dict[str, Weights]:
        """The weights of each file that is not loaded, by its digest. Raises InvalidRequest for one that is gone or
        another one now, or cannot be read."""
        from safetensors.torch import load_file  # noqa: PLC0415 - with requests that have LoRAs alone

        read = {}
        for use in uses:
            if use.digest in self._loaded:
                continue
            path = self._library.file(use.name, use.digest).path
            try:
                read[use.digest] = load_file(path)
            except Exception as exc:
                raise InvalidRequest(f"the LoRA {use.name} cannot be read: {exc}", param="loras") from exc
        return read

    @contextmanager
    def held(self, request: GenerationRequest, read: object) -> Iterator[None]:
        """Load the adapters of a request, and keep them while it runs. ``read`` is what ``read`` gave, if anything.

        Raises InvalidRequest for a LoRA that does not fit.
        """
        digests = [use.digest for use in request.loras]
        self._in_use.update(digests)
        try:
            weights = read if isinstance(read, dict) else {}
            missing = [use for use in request.loras if use.digest not in self._loaded and use.digest not in weights]
            weights = {**weights, **(self.read(missing) if missing else {})}
            for use in request.loras:
                if use.digest not in self._loaded:
                    self._load(use, weights[use.digest])
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

    def _load(self, use: LoraUse, weights: Weights) -> None:
        name = f"lora_{use.digest[:16]}"
        self._active = None
        try:
            self._pipeline.load_lora_weights(**self._source(use, weights), adapter_name=name)
            has_place = self._num_tensors(name)
        except Exception as exc:
            self._forget(name)
            reason = " ".join(str(exc).split())[:_MAX_REASON_CHARS]
            raise InvalidRequest(f"the LoRA {use.name} does not fit the model: {reason}", param="loras") from exc
        # The library leaves out what it finds no place for.
        meant = sum(_is_matrix(text) for text in weights)
        if has_place < meant:
            self._forget(name)
            raise InvalidRequest(
                f"the LoRA {use.name} does not fit the model: {meant - has_place} of its {meant} matrices have no "
                "place in it",
                param="loras",
            )
        self._loaded[use.digest] = name

    def _source(self, use: LoraUse, weights: Weights) -> dict[str, Any]:
        """What the library reads: the file itself where its header may say alpha, which the weights do not have."""
        path = self._library.file(use.name, use.digest).path
        if path.suffix != ".safetensors" or _ADAPTER not in read_header(path).metadata:
            return {_WEIGHTS: dict(weights)}
        return {_WEIGHTS: path.parent, "weight_name": path.name, "use_safetensors": True, "local_files_only": True}

    def _num_tensors(self, name: str) -> int:
        return sum(
            f".{name}." in text
            for network in self._networks()
            for text, _ in network.named_parameters()
            if "lora_A" in text or "lora_B" in text
        )

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

    def read(self, _uses: Sequence[LoraUse]) -> dict[str, Weights]:
        """Raises InvalidRequest."""
        raise InvalidRequest("this worker has no LoRAs (engine.diffusers.loras)", param="loras")

    def held(self, request: GenerationRequest, _read: object) -> Any:  # noqa: ANN401 - a context
        """Raises InvalidRequest for a request with LoRAs."""
        if request.loras:
            self.read(request.loras)
        return nullcontext()

    def switch(self, _uses: Sequence[LoraUse]) -> None:
        """There is nothing to switch."""


def _is_matrix(text: str) -> bool:
    """Whether a tensor of a file is one of the two of a LoRA's layer, by the words of all formats."""
    return text.endswith((".weight", ".lora_A", ".lora_B")) and any(
        word in text for word in ("lora_A", "lora_B", "lora_down", "lora_up", "lora.down", "lora.up")
    )
