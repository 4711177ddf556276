"""The process with the library in it: ``python -m kinema.engines.sglang.child FOLDER``, started by
``library_process.py``.

It reads messages from its standard input and answers on its standard output, one video after the other. It finds out
what the library does not tell: why it made nothing, which step it is at, and whether its workers are alive. When the
server ends, so does this process' input; then it ends with all of its group, and leaves nothing behind.

The library's workers run this file too, before anything else and under the name of ``__mp_main__``; so the library is
imported in functions alone.
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
from kinema.engines.sglang import step_hooks
from kinema.engines.sglang.process_group import kill_group
from kinema.engines.sglang.wire import FRAMES_PER_CHUNK, Inbox, encode

# How long to wait for the messages of the last steps when a video is ready; one may have been lost.
_LAST_STEP_S = 2.0
# A killed process ends at once, unless it waits for a device.
_GONE_S = 5.0
_PIXEL = (3,)
_LIBRARIES = ("sglang", "torch", "diffusers", "transformers", "flashinfer_python", "sglang-kernel")


class ServerPipe:
    """The pipe to the server. Any thread may send."""

    def __init__(self, output: BinaryIO) -> None:
        self._output = output
        self._lock = threading.Lock()

    def send(self, kind: str, content: bytes = b"", **fields: object) -> None:
        with self._lock, contextlib.suppress(OSError):  # the end of the input says that the server has gone
            self._output.write(encode(kind, content, fields))
            self._output.flush()


class StepReporter:
    """Sends the server the steps of the current video, by whichever way the library reports them."""

    def __init__(self, server: ServerPipe, folder: Path) -> None:
        self._server = server
        self.address = folder / "steps"
        self._datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._datagrams.bind(str(self.address))
        self._number = self._total = self._done = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._read_datagrams, daemon=True).start()

    def begin(self, number: int, total: int) -> None:
        with self._changed:
            self._number, self._total, self._done = number, total, 0

    def finish(self) -> None:
        """Wait for the messages of the last steps."""
        with self._changed:
            self._changed.wait_for(lambda: self._done >= self._total, _LAST_STEP_S)
            self._number = 0

    def read_socket(self, endpoint: str) -> None:
        """Read the native pipelines' messages to the library's own HTTP server: [request_id, completed, total]."""
        import zmq  # noqa: PLC0415 - comes with sglang

        receiver = zmq.Context.instance().socket(zmq.PULL)
        receiver.bind(endpoint)
        threading.Thread(target=self._read_messages, args=(receiver,), daemon=True).start()

    def _read_datagrams(self) -> None:
        while True:
            number, step = self._datagrams.recv(100).split()
            self._step(int(number), int(step))

    def _read_messages(self, receiver: Any) -> None:  # noqa: ANN401 - zmq is untyped here
        while True:
            number, completed, total = receiver.recv_json()
            if total:
                # Where several passes share the bar, the library gives a fraction of 1.
                self._step(int(number), math.floor(completed / total * self._total))

    def _step(self, number: int, done: int) -> None:
        with self._changed:
            if number != self._number or not self._done < done <= self._total:
                return
            self._done = done
            self._server.send("step", number=number, index=done)
            self._changed.notify_all()


class Library:
    """A loaded DiffGenerator; ``arguments`` are those of its ``from_pretrained``."""

    def __init__(self, arguments: Mapping[str, Any], folder: Path, reporter: StepReporter) -> None:
        from sglang.multimodal_gen.runtime.entrypoints import (  # noqa: PLC0415 - takes ten seconds
            diffusion_generator as library,
        )

        _keep_off_shared_memory()
        reasons: list[str] = []

        class Generator(library.DiffGenerator):  # type: ignore[misc]  # untyped
            """The library's generator, which logs errors and returns nothing; this one keeps them."""

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
        fixed = {"host": "127.0.0.1", "output_path": str(folder), "trust_remote_code": False}
        self._generator = Generator.from_pretrained(**arguments, **ports, **fixed)
        self.dtype = str(self._generator.server_args.pipeline_config.dit_precision)
        self._reasons = reasons
        self._reporter = reporter
        if endpoint := self._generator.server_args.progress_endpoint:
            reporter.read_socket(endpoint)

    @property
    def workers(self) -> list[Any]:
        """The library's worker processes, one for each device."""
        return list(self._generator.local_scheduler_process or [])

    def generate(self, number: int, parameters: dict[str, Any]) -> list[UInt8Array] | str:
        """The frames (h, w, 3) uint8, or the reason why none were made."""
        self._reasons.clear()
        # The diffusers backend alone reads it, and has no other way to report its steps.
        callback = step_hooks.reporter(self._reporter.address, number)
        hooks = {**parameters.pop("diffusers_kwargs"), "callback_on_step_end": callback}
        try:
            result = self._generator.generate({**parameters, "request_id": str(number), "diffusers_kwargs": hooks})
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
    source, server = _claim_pipes()
    requests = _read_requests(source, folder)
    reporter = StepReporter(server, folder)
    first = requests.get()
    assert first is not None
    try:
        library = Library(first["arguments"], folder, reporter)
    except BaseException as exc:
        server.send("failed", reason=str(exc) or type(exc).__name__)
        raise
    is_ending = threading.Event()
    threading.Thread(target=_watch, args=(library.workers, server, is_ending), daemon=True).start()
    server.send("ready", dtype=library.dtype, **_described())
    requests.task_done()
    while (request := requests.get()) is not None:
        tell_end = _generate(library, reporter, server, folder, request)
        # Before the server hears of the end: when it closes then, it finds this process idle.
        requests.task_done()
        if tell_end is not None:
            tell_end()
    is_ending.set()
    library.shutdown()
    shutil.rmtree(folder, ignore_errors=True)  # the server does so too, if it is still there


def _generate(
    library: Library, reporter: StepReporter, server: ServerPipe, folder: Path, request: Mapping[str, Any]
) -> Callable[[], None] | None:
    """Make a video and send all of it but its end; the returned function sends that. None: the video was cancelled."""
    number, parameters = int(request["number"]), dict(request["parameters"])
    reporter.begin(number, int(parameters["num_inference_steps"]))
    made = library.generate(number, parameters)
    if isinstance(made, str):
        reporter.begin(0, 0)
        return partial(server.send, "error", number=number, reason=made)
    reporter.finish()
    if step_hooks.stop_file(folder, number).exists():  # the cancel came behind the last step
        return None
    shape = [len(made), *made[0].shape]
    for frames in _chunks(made):
        server.send("frames", np.stack(frames).tobytes(), number=number, num_frames=len(frames), shape=shape)
    return partial(server.send, "done", number=number)


def _chunks(frames: list[UInt8Array]) -> Iterator[list[UInt8Array]]:
    yield frames[:1]
    for start in range(1, len(frames), FRAMES_PER_CHUNK):
        yield frames[start : start + FRAMES_PER_CHUNK]


def _claim_pipes() -> tuple[int, ServerPipe]:
    """Keep the message pipes for this process alone; the library and its workers print to the error output."""
    source, output = os.dup(0), os.dup(1)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return source, ServerPipe(os.fdopen(output, "wb"))


def _read_requests(source: int, folder: Path) -> queue.Queue[dict[str, Any] | None]:
    """Read the server's messages on a thread. None says that the server has ended; a busy process is killed instead."""
    requests: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        inbox = Inbox()
        while data := os.read(source, 65536):
            inbox.add(data)
            while (message := inbox.pop()) is not None:
                requests.put(dict(message.fields))
        if requests.unfinished_tasks:
            _end_all(folder)
        requests.put(None)

    threading.Thread(target=read, daemon=True).start()
    return requests


def _watch(workers: list[Any], server: ServerPipe, is_ending: threading.Event) -> None:
    """Tell the server when a worker of the library has ended: the library would wait for it for ever. The server then
    ends this process.
    """
    by_sentinel = {worker.sentinel: worker for worker in workers}
    ended = by_sentinel[wait(list(by_sentinel))[0]]
    ended.join(1)
    if not is_ending.is_set():
        server.send("lost", reason=f"the library's worker {ended.name} has ended with {_code(ended.exitcode)}")


def _code(code: int | None) -> str:
    return f"exit code {code}" if code is None or code >= 0 else signal.Signals(-code).name


def _end_all(folder: Path) -> None:
    kill_group(os.getpgrp(), _GONE_S)
    shutil.rmtree(folder, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    """Free ports of the loopback interface; the library uses the next free ones where another process was quicker."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _keep_off_shared_memory() -> None:
    """Let the library send frames in its messages, since its files in /dev/shm outlive a process that is killed.

    Only the side that asks for a video says where such files may be, so this is enough.
    """
    from sglang.multimodal_gen.runtime import ipc_array  # noqa: PLC0415 - see Library

    ipc_array._array_ipc_dir = lambda: None


def _described() -> dict[str, Any]:
    """What the frames depend on besides the request and only this process knows."""
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
    step_hooks.register()
