"""The process that runs the library, on the server's side: started, sent messages, received from, and ended.

The library's own workers stay in its process group and in its folder of temporary files. So ending the group and
removing the folder leaves nothing behind, whatever state they are in.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, cast

from kinema.engines.sglang.process_group import kill_group
from kinema.engines.sglang.wire import Inbox, Message, encode

# Sixteen times what a pipe holds: a frame of 832x480 in two reads.
_READ_BYTES = 1024 * 1024
# The library waits 5 s for its workers to answer, and then 12 s for them to end.
_END_S = 20.0
# A killed group ends at once, unless a process waits for a device; nothing can be done about that one.
_GONE_S = 5.0


class ProcessLost(Exception):
    """The process or a worker of the library ended, or it sent nothing for too long; the text says which."""


class LibraryProcess:
    """One process with the library in it. All methods belong to one thread.

    ``environment`` is added to this process' own.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kinema-sglang-"))
        self._inbox = Inbox()
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, and a folder of ours
            [sys.executable, "-m", "kinema.engines.sglang.child", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment, "TMPDIR": str(self.folder)},
            start_new_session=True,
            bufsize=0,
        )

    @property
    def pid(self) -> int:
        """The id of the process, and of its group."""
        return self._process.pid

    def send(self, kind: str, **fields: object) -> None:
        """Send a message. Raises ProcessLost."""
        try:
            self._stdin.write(encode(kind, b"", fields))
        except OSError:
            raise ProcessLost(self._how_it_ended()) from None

    def receive(self, patience_s: float) -> Message:
        """The next message. Raises ProcessLost, also when the message says that a worker has ended."""
        until = time.monotonic() + patience_s
        while (message := self._inbox.pop()) is None:
            left_s = until - time.monotonic()
            if left_s <= 0 or not select.select([self._stdout], [], [], left_s)[0]:
                raise ProcessLost(f"it has said nothing for {patience_s:g} s")
            self._read()
        return _checked(message)

    def drain(self) -> None:
        """Drop all messages that have come. Raises ProcessLost."""
        while select.select([self._stdout], [], [], 0)[0]:
            self._read()
        while (message := self._inbox.pop()) is not None:
            _checked(message)

    def end(self) -> None:
        """Let the process shut the library down, and kill what is left of it."""
        with contextlib.suppress(OSError):
            self._stdin.close()
        # Its messages are read on, for a full pipe would hold it.
        with contextlib.suppress(ProcessLost):
            until = time.monotonic() + _END_S
            while (left_s := until - time.monotonic()) > 0:
                self.receive(left_s)
        self.kill()

    def kill(self) -> None:
        """Kill the process and all of its workers, and remove its folder."""
        # Its workers are no children of this process, and release the device only when they have ended.
        kill_group(self.pid, _GONE_S)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GONE_S)
        self._stdin.close()
        self._stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> None:
        data = os.read(self._stdout.fileno(), _READ_BYTES)
        if not data:
            raise ProcessLost(self._how_it_ended())
        self._inbox.add(data)

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(_GONE_S)
        except subprocess.TimeoutExpired:
            return "it closed its output"
        if code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with exit code {code}; what it printed says why"

    @property
    def _stdin(self) -> IO[bytes]:
        return cast(IO[bytes], self._process.stdin)

    @property
    def _stdout(self) -> IO[bytes]:
        return cast(IO[bytes], self._process.stdout)


def _checked(message: Message) -> Message:
    if message.kind == "lost":
        raise ProcessLost(str(message.fields["reason"]))
    return message
