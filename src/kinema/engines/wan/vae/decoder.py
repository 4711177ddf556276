"""Latents to pictures: on a GPU a stream is recorded as CUDA graphs, and kept for the next film of its size.

A stream belongs to one film at a time. Films whose decoding interleaves have a stream each, so they cannot touch each
other, and a film that is given up leaves a stream that begins anew. A decoded latent frame is some two hundred small
calls: Python cannot send them as fast as a GPU runs them when the pictures are small, and a server's other threads hold
Python up. A graph sends them all together, and torch allocates nothing between two steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kinema.engines.wan.device_memory import held_bytes
from kinema.engines.wan.vae.autoencoder import Vae
from kinema.engines.wan.vae.decoder_operations import DecoderOperations, TorchDecoderOperations
from kinema.engines.wan.vae.pixels import to_rgb
from kinema.engines.wan.vae.stream import Decoded, Stream, WatchedStream
from kinema.engines.wan.vae.weights import DecoderWeights, convert_weights, extract_weights, pairs_pay

# Latent frames, rows and columns of the trial, and its noise: latents have a standard deviation of one.
_TRIAL_SIZE, _TRIAL_SCALE = (3, 32, 32), 2.0


class AnyStream(Protocol):
    """``Stream`` or ``RecordedStream``."""

    def begin(self) -> None: ...
    def step(self, latent: Tensor) -> Decoded: ...


class VaeDecoder:
    """The decoder of one checkpoint, with copies of the VAE's weights, on its device."""

    def __init__(
        self,
        vae: Vae,
        dtype: torch.dtype,
        *,
        is_recorded: bool = True,
        has_pairs: bool | None = None,
        max_idle_bytes: float = math.inf,
    ) -> None:
        """``is_recorded`` asks for CUDA graphs; it matters on CUDA only. A recorded stream of at most
        ``max_idle_bytes`` is kept for the next film of its size. With ``has_pairs`` convolutions compute two frames
        together; None is where ``pairs_pay``.
        """
        if has_pairs is None:
            has_pairs = pairs_pay(vae.device, dtype)
        self._weights = extract_weights(vae.config, vae.weights, dtype, has_pairs=has_pairs)
        self.operations = choose_decoder_operations(self._weights.device, dtype)
        self._is_recorded = is_recorded and self._weights.device.type == "cuda"
        self._max_idle_bytes = max_idle_bytes
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=self._weights.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        # The stream without a film, of the size that was decoded last; one at most.
        self._idle: tuple[tuple[int, int], RecordedStream] | None = None
        # Sizes whose stream is too large to be kept, and would be recorded for each film; so large pictures keep a GPU
        # busy without a graph.
        self._too_large: set[tuple[int, int]] = set()

    @property
    def weights(self) -> DecoderWeights:
        return self._weights

    @property
    def idle_bytes(self) -> int:
        """The memory of the stream that waits for the next film."""
        return 0 if self._idle is None else self._idle[1].size_bytes

    def in_bfloat16(self) -> VaeDecoder:
        """The same decoder for one film whose values are too large for float16, with a copy of the weights."""
        other = copy.copy(self)
        other._weights = convert_weights(self._weights, torch.bfloat16)
        other.operations = choose_decoder_operations(self._weights.device, torch.bfloat16)
        # One film does not pay for the recording.
        other._is_recorded, other._idle = False, None
        return other

    @torch.inference_mode()
    def try_out(self) -> float:
        """Decode a little noise, and say how large the decoder's numbers get; infinity when one is none.

        On a GPU it compiles and loads all that a film of any size needs: seconds where that was never done.
        """
        _frames, height, width = _TRIAL_SIZE
        noise = torch.randn(self._mean.shape[1], *_TRIAL_SIZE, generator=torch.Generator("cpu").manual_seed(0))
        stream = WatchedStream(self._weights, self.operations, height, width)
        stream.begin()
        for latent in self._scaled(_TRIAL_SCALE * noise[None].to(self._weights.device)):
            stream.step(latent)
        return stream.largest()

    def decode(self, latents: Tensor) -> Iterator[Decoded]:
        """Decode normalised latents (1, c, f, h, w): yields the pictures of one latent frame after the other.

        The next pictures overwrite those before. The first latent frame becomes one picture, each later one as many as
        the VAE's temporal factor.
        """
        size = (latents.shape[3], latents.shape[4])
        stream = self._acquire(size)
        try:
            stream.begin()
            for latent in self._scaled(latents):
                yield stream.step(latent)
        finally:
            self._release(size, stream)

    def drop_idle(self, but: tuple[int, int] | None = None) -> None:
        """Free the recorded stream that waits for the next film of its size, unless that is ``but`` (h, w)."""
        if self._idle is not None and self._idle[0] != but:
            self._idle = None

    def to_rgb(self, decoded: Decoded) -> Tensor:
        """The pictures (f, h, w, 3) float32 in [0, 1]."""
        return to_rgb(decoded.raw, self._weights.patch_size)

    def _scaled(self, latents: Tensor) -> Tensor:
        """Latent frames (f, h, w, c) in the decoder's type, ready for its first convolution."""
        scaled = (latents * self._std + self._mean)[0].permute(1, 2, 3, 0)
        quantised = self._weights.quantised
        return functional.linear(scaled, quantised.weight, quantised.bias).to(self._weights.dtype)

    def _acquire(self, size: tuple[int, int]) -> AnyStream:
        idle, self._idle = self._idle, None
        if idle is not None and idle[0] == size:
            return idle[1]
        del idle  # its memory may be what the next one needs
        stream = Stream(self._weights, self.operations, *size)
        return RecordedStream(stream) if self._is_recorded and size not in self._too_large else stream

    def _release(self, size: tuple[int, int], stream: AnyStream) -> None:
        if not isinstance(stream, RecordedStream):
            return
        if stream.size_bytes <= self._max_idle_bytes:
            self._idle = (size, stream)
        else:
            self._too_large.add(size)


def choose_decoder_operations(device: torch.device, dtype: torch.dtype) -> DecoderOperations:
    """The kernels on CUDA, torch elsewhere."""
    if device.type != "cuda":
        return TorchDecoderOperations(device, dtype)
    from kinema.engines.wan.vae.decoder_kernels import TritonDecoderOperations  # noqa: PLC0415 - Triton needs CUDA

    return TritonDecoderOperations(dtype)


class RecordedStream:
    """A stream as CUDA graphs, with the same pictures.

    Recording uses the stream up, and takes the time of a few of its steps.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        device = stream.new_latent().device
        before = held_bytes(device)
        self._latent = stream.new_latent()
        # The kernels are compiled and chosen before they are recorded, the first frame's and the others'.
        for is_first in (True, False):
            stream.compute(self._latent, is_first=is_first)
        pool = torch.cuda.graph_pool_handle()
        self._first = _Recording(stream, self._latent, pool, is_first=True)
        self._later = _Recording(stream, self._latent, pool, is_first=False)
        self._is_first = True
        # What recording took of the device, and the stream with it.
        self.size_bytes = max(held_bytes(device) - before, 0)

    def begin(self) -> None:
        """See ``Stream.begin``."""
        self._stream.begin()
        self._is_first = True

    def step(self, latent: Tensor) -> Decoded:
        """See ``Stream.step``."""
        self._latent.copy_(latent)
        recording = self._first if self._is_first else self._later
        self._is_first = False
        return recording.play()


class _Recording:
    def __init__(self, stream: Stream, latent: Tensor, pool: Any, *, is_first: bool) -> None:  # noqa: ANN401 - torch's own
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile; this one does nothing that cannot be recorded.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._decoded = stream.compute(latent, is_first=is_first)

    def play(self) -> Decoded:
        self._graph.replay()
        return self._decoded
