"""The process with the library in it: ``python -m kinema.engines.sglang.child FOLDER``, started by ``process.py``.

It reads messages from its standard input and answers on its standard output, one video after the other. What the
library leaves open is settled here: why it made nothing, which step it is at, and whether its workers are alive.
The server's end is the end of its input: then it ends with all of its group, and nothing of it stays.

The library's workers run this file too before they do anything else, under the name of ``__mp_main__``; so the library
is imported in functions alone.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import queue
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kinema.engines.base import UInt8Array
from kinema.engines.sglang import steps
from kinema.engines.sglang.group import kill_group
from kinema.engines.sglang.wire import FRAMES_PER_CHUNK, Inbox, encode

# Steps that are on their way when the video is there; the last one may have been lost.
_LAST_STEP_S = 2.0
# A killed process is gone at once; one that waits for a device is not.
_GONE_S = 5.0
_PIXEL = (3,)
_LIBRARIES = ("sglang", "torch", "diffusers", "transformers", "flashinfer_python", "sglang-kernel")


class Server:
    """The other end of the pipes."""

    def __init__(self, output: BinaryIO) -> None:
        self._output = output
        self._lock = threading.Lock()

    def say(self, kind: str, content: bytes = b"", **said: object) -> None:
        with self._lock, contextlib.suppress(OSError):  # a server that is gone is noticed by the input's end
            self._output.write(encode(kind, content, said))
            self._output.flush()


class Progress:
    """Passes on the steps of the video that is being made, whichever way the library tells of them."""

    def __init__(self, server: Server, folder: Path) -> None:
        self._server = server
        self.address = folder / "steps"
        self._datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._datagrams.bind(str(self.address))
        self._job = self._total = self._done = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._read_datagrams, daemon=True).start()

    def begin(self, job: int, total: int) -> None:
        with self._changed:
            self._job, self._total, self._done = job, total, 0

    def finish(self) -> None:
        """Wait for the steps that are on their way."""
        with self._changed:
            self._changed.wait_for(lambda: self._done >= self._total, _LAST_STEP_S)
            self._job = 0

    def read_socket(self, endpoint: str) -> None:
        """The native pipelines', which the library means for its own HTTP server: [request_id, completed, total]."""
        import zmq  # noqa: PLC0415 - comes with sglang

        receiver = zmq.Context.instance().socket(zmq.PULL)
        receiver.bind(endpoint)
        threading.Thread(target=self._read_messages, args=(receiver,), daemon=True).start()

    def _read_datagrams(self) -> None:
        while True:
            job, step = self._datagrams.recv(100).split()
            self._step(int(job), int(step))

    def _read_messages(self, receiver: Any) -> None:  # noqa: ANN401 - zmq is untyped here
        while True:
            job, completed, total = receiver.recv_json()
            if total:
                # Where several passes share the bar, the library gives a share of 1.
                self._step(int(job), math.floor(completed / total * self._total))

    def _step(self, job: int, done: int) -> None:
        with self._changed:
            if job != self._job or not self._done < done <= self._total:
                return
            self._done = done
            self._server.say("step", job=job, index=done)
            self._changed.notify_all()


class Library:
    """A loaded DiffGenerator; ``arguments`` are those of its ``from_pretrained``."""

    def __init__(self, arguments: Mapping[str, Any], folder: Path, progress: Progress) -> None:
        from sglang.multimodal_gen.runtime.entrypoints import (  # noqa: PLC0415 - takes ten seconds
            diffusion_generator as library,
        )

        _keep_off_shared_memory()
        reasons: list[str] = []

        class Generator(library.DiffGenerator):  # type: ignore[misc]  # untyped
            """The library's, which logs errors and returns nothing; this one keeps them."""

            def _send_to_scheduler_and_wait_for_response(self, batch: list[Any]) -> Any:  # noqa: ANN401 - theirs
                for request in batch:
                    request.report_progress = True
                try:
                    answer = super()._send_to_scheduler_and_wait_for_response(batch)
                except Exception as exc:
                    reasons.append(str(exc) or type(exc).__name__)
                    raise
                if answer.error:
                    reasons.append(str(answer.error))
                return answer

        ports = dict(zip(("port", "scheduler_port", "master_port"), _free_ports(3), strict=True))
        self._generator = Generator.from_pretrained(**arguments, **ports, host="127.0.0.1", output_path=str(folder))
        self.dtype = str(self._generator.server_args.pipeline_config.dit_precision)
        self._reasons = reasons
        self._progress = progress
        if endpoint := self._generator.server_args.progress_endpoint:
            progress.read_socket(endpoint)

    @property
    def workers(self) -> list[Any]:
        """The library's processes, one for each device."""
        return list(self._generator.local_scheduler_process or [])

    def generate(self, job: int, parameters: dict[str, Any]) -> list[UInt8Array] | str:
        """The frames (h, w, 3) uint8, or why there are none."""
        self._reasons.clear()
        # Read by the diffusers backend alone, which has no other way to say where it is.
        callback = steps.reporter(self._progress.address, job)
        hooks = {**parameters.pop("diffusers_kwargs"), "callback_on_step_end": callback}
        try:
            result = self._generator.generate({**parameters, "request_id": str(job), "diffusers_kwargs": hooks})
        except Exception as exc:  # parameters that it refuses, of many kinds
            return str(exc) or type(exc).__name__
        frames = getattr(result, "frames", None)
        if frames is None or len(frames) == 0:
            return "; ".join(self._reasons) or "the library made nothing and did not say why"
        first = frames[0]
        if first.dtype != np.uint8 or first.ndim != 3 or first.shape[2:] != _PIXEL:
            return f"the library made frames {first.shape} of {first.dtype}, not (h, w, 3) of uint8"
        return list(frames)

    def shutdown(self) -> None:
        self._generator.shutdown()


def main() -> None:
    folder = Path(sys.argv[1])
    source, server = _take_pipes()
    requests = _read_requests(source, folder)
    progress = Progress(server, folder)
    first = requests.get()
    assert first is not None
    try:
        library = Library(first["arguments"], folder, progress)
    except BaseException as exc:
        server.say("failed", reason=str(exc) or type(exc).__name__)
        raise
    is_ending = threading.Event()
    threading.Thread(target=_watch, args=(library.workers, server, is_ending), daemon=True).start()
    server.say("ready", dtype=library.dtype, **_described())
    requests.task_done()
    while (request := requests.get()) is not None:
        tell_end = _generate(library, progress, server, folder, request)
        # Before the server hears of the end: when it closes then, it finds this process idle.
        requests.task_done()
        if tell_end is not None:
            tell_end()
    is_ending.set()
    library.shutdown()
    shutil.rmtree(folder, ignore_errors=True)  # the server does so too, if it is still there


def _generate(
    library: Library, progress: Progress, server: Server, folder: Path, request: Mapping[str, Any]
) -> Callable[[], None] | None:
    """Make a video and say all of it but its end, which what is returned says. None: it was given up."""
    job, parameters = int(request["job"]), dict(request["parameters"])
    progress.begin(job, int(parameters["num_inference_steps"]))
    made = library.generate(job, parameters)
    if isinstance(made, str):
        progress.begin(0, 0)
        return partial(server.say, "error", job=job, reason=made)
    progress.finish()
    if steps.stop_file(folder, job).exists():  # it came behind the last step
        return None
    shape = [len(made), *made[0].shape]
    for frames in _chunks(made):
        server.say("frames", np.stack(frames).tobytes(), job=job, num_frames=len(frames), video=shape)
    return partial(server.say, "done", job=job)


def _chunks(frames: list[UInt8Array]) -> Iterator[list[UInt8Array]]:
    yield frames[:1]
    for start in range(1, len(frames), FRAMES_PER_CHUNK):
        yield frames[start : start + FRAMES_PER_CHUNK]


def _take_pipes() -> tuple[int, Server]:
    """The messages' pipes, for this process alone: what the library and its workers print goes to the error output."""
    source, output = os.dup(0), os.dup(1)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return source, Server(os.fdopen(output, "wb"))


def _read_requests(source: int, folder: Path) -> queue.Queue[dict[str, Any] | None]:
    """What the server says, on a thread. None is its end: of a process that is idle. One that is busy ends here."""
    requests: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        inbox = Inbox()
        while data := os.read(source, 65536):
            inbox.add(data)
            while (message := inbox.take()) is not None:
                requests.put(dict(message.said))
        if requests.unfinished_tasks:
            _end_all(folder)
        requests.put(None)

    threading.Thread(target=read, daemon=True).start()
    return requests


def _watch(workers: list[Any], server: Server, is_ending: threading.Event) -> None:
    """The library waits for ever for a worker that was killed. The server is told, and ends this process."""
    by_sentinel = {worker.sentinel: worker for worker in workers}
    ended = by_sentinel[wait(list(by_sentinel))[0]]
    ended.join(1)
    if not is_ending.is_set():
        server.say("lost", reason=f"the library's worker {ended.name} has ended with {_code(ended.exitcode)}")


def _code(code: int | None) -> str:
    return f"exit code {code}" if code is None or code >= 0 else signal.Signals(-code).name


def _end_all(folder: Path) -> None:
    kill_group(os.getpgrp(), _GONE_S)
    shutil.rmtree(folder, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    """Of the loopback interface; the library takes the next free ones if somebody was quicker."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _keep_off_shared_memory() -> None:
    """The library's files in /dev/shm outlive a process that is killed; without them it sends frames in its messages.

    Only the side that asks says where such files may be, so this is enough.
    """
    from sglang.multimodal_gen.runtime import ipc_array  # noqa: PLC0415 - see Library

    ipc_array._array_ipc_dir = lambda: None


def _described() -> dict[str, Any]:
    """What the frames depend on besides the request, as far as only this process knows."""
    import torch  # noqa: PLC0415 - the library has loaded it

    is_cuda = torch.cuda.is_available()
    return {
        "device": "cuda" if is_cuda else "cpu",
        "device_name": torch.cuda.get_device_name(0) if is_cuda else platform.processor(),
        "threads": None if is_cuda else torch.get_num_threads(),
        "versions": dict(_versions()),
    }


def _versions() -> Iterator[tuple[str, str]]:
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            yield name, version(name)


if __name__ == "__main__":
    main()
if __name__ == "__mp_main__":
    steps.register()
