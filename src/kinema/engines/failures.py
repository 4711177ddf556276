"""What an exception of an engine means, and what it holds. Importing this file loads no torch.

A CUDA context that has failed once fails for ever: every later call of the process raises the error again. So an error
of a device that is neither a lack of memory nor a call that a library refuses means that the engine is lost, whichever
generation has met it. torch, Triton, cuBLAS, cuDNN and NCCL raise such errors by several classes, and some of them by
RuntimeError alone, so their texts are read as well.
"""

from __future__ import annotations

import re
import traceback
from collections import deque
from collections.abc import Iterator

from kinema.errors import KinemaError, OutOfMemory, WorkerLost

# torch's class for the errors of a device's own calls; not every torch has it, and older paths raise RuntimeError.
_DEVICE_ERROR = "AcceleratorError"
_OUT_OF_MEMORY_ERROR = "OutOfMemoryError"
# torch (c10/cuda/CUDAException.h, ATen/cuda/Exceptions.h, ATen/cudnn/Exceptions.h, NCCLUtils.hpp) and Triton's driver.c
# begin their texts like this. The last lines have the CUDA runtime's own sentences, which some callers give alone.
_LOST = re.compile(
    r"\b(?:CUDA|HIP|cuDNN|cuBLAS|cuBLASLt|cuSOLVER|cuSPARSE|cuFFT|NVRTC|NCCL|RCCL)"
    r"(?: driver| Frontend| unknown| kernel| runtime)? errors?\b"
    r"|\b(?:CUBLAS|CUDNN|CUSOLVER|CUSPARSE|NVRTC)_(?:STATUS|ERROR)_\w+|\bCUFFT_\w+"
    r"|\bnccl(?:Unhandled|System|Internal|Remote|InvalidUsage|InvalidArgument)\w*"
    r"|\bTriton Error \[(?:CUDA|HIP)\]"
    r"|\bcudaError\w+|\bCUDA_ERROR_\w+"
    r"|illegal memory access|device-side assert|misaligned address|unspecified launch failure"
    r"|illegal instruction was encountered|uncorrectable ECC error",
    re.IGNORECASE,
)
_NO_MEMORY = re.compile(
    r"out[ _]of[ _]memory|MEMORY_?ALLOCATION|ALLOC(?:ATION)?_FAILED|can't allocate memory|not enough memory",
    re.IGNORECASE,
)
# torch's allocator says how much it was asked for.
_WANTED = re.compile(r"Tried to allocate ([\d.]+ [KMGT]?i?B)")
# A library that refuses a call by its arguments, before anything runs on the device: the next call may be another.
_REFUSED = re.compile(
    r"\b(?:CUBLAS|CUDNN)_STATUS_(?:NOT_SUPPORTED|BAD_PARAM|INVALID_VALUE)|\bNo (?:valid )?execution plans\b",
    re.IGNORECASE,
)

# A deep recursion, or an error that quotes a tensor, would fill the log.
_MAX_NOTED_FRAMES, _MAX_NOTED_CHARS = 50, 1000


def meaning_of(error: Exception) -> Exception:
    """What a failed turn of an engine means: WorkerLost when its device is lost, OutOfMemory when that has no memory
    left, else the error itself.

    An error counts with all that it was raised from: a device may fail once more while a failure is handled.
    """
    if isinstance(error, WorkerLost):
        return error
    found = [kind for one in _chain(error) if (kind := _kind_of(one)) is not None]
    if WorkerLost in found:
        return _caused_by(error, WorkerLost("The device of the worker failed."))
    return _caused_by(error, _out_of_memory(error)) if found and not isinstance(error, KinemaError) else error


def says_lost(text: str) -> bool:
    """Whether this text of a library's error is one of a device that is lost."""
    return not any(other.search(text) for other in (_NO_MEMORY, _REFUSED)) and _LOST.search(text) is not None


def note_traceback(error: BaseException) -> None:
    """Put the traceback of an unexpected error, and of all that it was raised from, into the error as text, for a later
    log. An error of Kinema's own is logged as the sentence that it is."""
    if isinstance(error, KinemaError):
        return
    # Not by traceback.format_exception: it parses source lines, which Python 3.11 cannot do on two threads at once.
    error.add_note("\n".join(line for one in _chain(error) for line in _lines(one)))


def _lines(error: BaseException) -> Iterator[str]:
    yield f"{type(error).__name__}: {str(error)[:_MAX_NOTED_CHARS]}"
    for frame, line in deque(traceback.walk_tb(error.__traceback__), _MAX_NOTED_FRAMES):
        yield f'  File "{frame.f_code.co_filename}", line {line}, in {frame.f_code.co_name}'


def release_frames(error: BaseException) -> None:
    """Let go of the tracebacks of a handled error and of all errors that it was raised from.

    A traceback keeps each frame's variables, and so the tensors of a failed step, for as long as the error is known
    anywhere; each frame keeps the one that called it; and an error that a variable names keeps itself. So frames are
    cleared, also those that only such a cycle holds, and no error has a traceback afterwards.
    """
    for one in _chain(error):
        traceback.clear_frames(one.__traceback__)
        one.__traceback__ = None


def _out_of_memory(error: Exception) -> OutOfMemory:
    """It says how much was wanted, where a text tells."""
    wanted = [said[1] for one in _chain(error) if (said := _WANTED.search(str(one)))]
    if not wanted:
        return OutOfMemory()
    return OutOfMemory(
        f"The device ran out of memory: {wanted[0]} more was needed; ask for a smaller size or fewer frames."
    )


def _caused_by(error: Exception, meaning: KinemaError) -> KinemaError:
    meaning.__cause__ = error
    return meaning


def _kind_of(error: BaseException) -> type[KinemaError] | None:
    """WorkerLost, OutOfMemory, or None for an error that says nothing of a device."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if isinstance(error, (MemoryError, OutOfMemory)) or _OUT_OF_MEMORY_ERROR in names:
        return OutOfMemory
    if isinstance(error, WorkerLost):
        return WorkerLost
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    is_device_error = _DEVICE_ERROR in names or _LOST.search(text) is not None
    if _NO_MEMORY.search(text) and (is_device_error or "Allocator" in text):
        return OutOfMemory
    return WorkerLost if is_device_error and not _REFUSED.search(text) else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, its causes and contexts, and the members of groups, each once."""
    left, seen = [error], set[int]()
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        left += [other for other in (one.__cause__, one.__context__) if other is not None]
        if isinstance(one, BaseExceptionGroup):
            left += one.exceptions
