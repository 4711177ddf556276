"""What an engine's exception means, and that it holds nothing once it was handled."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Generator, Iterator

import numpy as np
import pytest

from kinema.engines.failures import meaning_of, note_traceback, release_frames, says_lost
from kinema.errors import EngineFailed, KinemaError, OutOfMemory, WorkerLost


class AcceleratorError(RuntimeError):
    """Named as torch's own class; nothing here imports torch."""


class OutOfMemoryError(RuntimeError):
    """Named as torch's own class."""


LOST = [
    AcceleratorError("CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress'"),
    AcceleratorError("CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"),
    AcceleratorError("the words of another version"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("CUDA error: misaligned address\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."),
    RuntimeError("CUDA driver error: invalid device context"),
    RuntimeError("HIP error: invalid device function"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa, opb, m, n, k)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED_CUDNN_LAUNCH"),
    RuntimeError("NCCL error in: ../NCCLUtils.hpp:268, unhandled cuda error, NCCL version 2.27.3"),
    RuntimeError("NCCL Error 1: unhandled cuda error"),
    RuntimeError("an illegal memory access was encountered (700)"),
]
NO_MEMORY = [
    OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    MemoryError(),
]
ITS_OWN = [
    RuntimeError("boom"),
    RuntimeError("The size of tensor a (4) must match the size of tensor b (5) at non-singleton dimension 1"),
    ValueError("CUDA error: these are the words of somebody's prompt"),
    EngineFailed("the decoder's numbers left their range"),
    RuntimeError(
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input."
    ),
    RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM_NULL_POINTER"),
    RuntimeError("cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph."),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic(ltHandle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasGemmEx( handle, opa, opb, m, n, k)`"),
]


@pytest.mark.parametrize("error", LOST, ids=str)
def test_a_device_that_failed_is_lost(error: Exception) -> None:
    """Whichever library says so, by whichever class; its error is the cause."""
    meaning = meaning_of(error)
    assert isinstance(meaning, WorkerLost)
    assert meaning.__cause__ is error


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
def test_a_device_without_memory_is_not_lost(error: Exception) -> None:
    """Only the job that asked for too much fails."""
    assert isinstance(meaning_of(error), OutOfMemory)
    assert not says_lost(str(error))


@pytest.mark.parametrize("error", ITS_OWN, ids=str)
def test_every_other_error_is_what_it_is(error: Exception) -> None:
    """It says nothing of the device, which a call that a library refuses has not reached."""
    assert meaning_of(error) is error
    assert not says_lost(str(error)) or isinstance(error, ValueError)


@pytest.mark.parametrize("error", [OutOfMemory(), WorkerLost("one of its GPUs")], ids=str)
def test_an_engines_own_words_stay(error: KinemaError) -> None:
    """What an engine has understood itself is passed on."""
    assert meaning_of(error) is error


def test_what_an_error_was_raised_from_counts() -> None:
    """A failure while one is handled, a translation, and a group hide no device that failed."""
    lost = AcceleratorError("CUDA error: an illegal memory access was encountered")
    translated = EngineFailed("the step failed")
    translated.__cause__ = lost
    beside = KeyError("while it was closed")
    beside.__context__ = translated
    group = ExceptionGroup("several", [ValueError("one"), ExceptionGroup("more", [beside])])
    hidden = OutOfMemory()
    hidden.__context__, hidden.__suppress_context__ = lost, True
    for error in (translated, beside, group, hidden):
        assert isinstance(meaning_of(error), WorkerLost)


@pytest.fixture
def without_collector() -> Iterator[None]:
    """What is freed is freed by the last reference alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Translated(RuntimeError):
    """A class of Python's own, which can be referred to weakly."""


class Step:
    """Frames that hold arrays, with weak references to them."""

    def __init__(self) -> None:
        self.held: list[weakref.ref[np.ndarray]] = []

    @property
    def num_alive(self) -> int:
        return sum(ref() is not None for ref in self.held)

    def array(self) -> np.ndarray:
        made = np.zeros(1000)
        self.held.append(weakref.ref(made))
        return made

    def fail(self) -> None:
        latents = self.array()
        try:
            self._deeper(latents)
        except ValueError as exc:
            remembered = exc  # a cycle: the error's traceback holds this frame, and this frame the error
            raise Translated from remembered

    def fail_beside(self) -> None:
        _latents = self.array()
        try:
            self.fail()
        except RuntimeError:
            _more = self.array()
            raise KeyError("while it was handled") from None

    def fail_in_a_group(self) -> None:
        errors = []
        for part in (self.fail, self.fail_beside):
            try:
                part()
            except Exception as exc:
                errors.append(exc)
        raise ExceptionGroup("several", errors)

    def fail_in_a_generator(self) -> None:
        _latents = self.array()
        for _ in self._generate():
            pass

    def _generate(self) -> Generator[int, None, None]:
        _latents = self.array()
        yield 1
        self.fail_beside()

    def _deeper(self, latents: np.ndarray) -> None:
        _velocity = self.array() + latents
        raise ValueError("deep")


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("name", ["fail", "fail_beside", "fail_in_a_group", "fail_in_a_generator"])
def test_a_handled_error_holds_no_array(name: str) -> None:
    """Along causes, suppressed contexts and groups; its text still says where it came from."""
    step = Step()
    kept = None
    try:
        getattr(step, name)()
    except Exception as exc:
        kept = exc
    assert kept is not None
    assert step.num_alive
    note_traceback(kept)
    release_frames(kept)
    assert not step.num_alive
    assert f"in {name}" in kept.__notes__[0]
    assert "in _deeper" in kept.__notes__[0]


@pytest.mark.usefixtures("without_collector")
def test_a_frame_that_still_runs_lets_go_of_the_error_too() -> None:
    """The frames of a traceback know who called them: these let go as well, also of the error itself."""

    def handle(step: Step) -> BaseException:
        _own = step.array()
        try:
            step.fail()
        except RuntimeError as exc:
            kept = exc
            release_frames(kept)
        return kept

    step = Step()
    error: BaseException | None = handle(step)
    assert not step.num_alive
    ref = weakref.ref(error)
    del error
    assert ref() is None
