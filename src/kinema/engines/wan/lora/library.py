"""The LoRAs of a folder that a model can use: files that appear are found, and files that change are other LoRAs.

A request names a LoRA, and its digest says which one that was. One daemon thread reads digests, newest files first; a
LoRA is listed when its digest is known. ``folder.py`` finds files, ``fit.py`` says which of them fit the model, and
``digests.py`` keeps digests for the next start.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kinema.engines.wan.lora.digests import Digests
from kinema.engines.wan.lora.fit import Shapes, check_fit
from kinema.engines.wan.lora.folder import LoraFile, Stamp, scan
from kinema.engines.wan.lora.header import told
from kinema.engines.wan.lora.keys import FIRST
from kinema.errors import InvalidRequest
from kinema.request.capabilities import Capabilities, Expert, LoraInfo

log = logging.getLogger(__name__)

# Seconds between two looks at the folder. A slow folder is looked at less often: who asks, waits for the look.
_LOOK_EVERY_S = 1.0
_PAUSE_SHARE = 50
# Seconds before a file is read again that could not be read.
_RETRY_S = 60.0


class LoraLibrary:
    """The usable LoRAs of a folder.

    ``transformers`` has the names and shapes of the model's weights by the names of its transformers. Digests are kept
    in the file ``digests``, if it is given. All methods may be called on any thread.
    """

    def __init__(self, folder: Path, transformers: Mapping[str, Shapes], digests: Path | None = None) -> None:
        self._folder = folder
        self._transformers = transformers
        self._digests = Digests(digests)
        self._lock = threading.Lock()
        # Why files do not fit the model, by their stamps; None for those that do.
        self._fits: dict[tuple[Path, tuple[Stamp, ...]], str | None] = {}
        self._usable: dict[str, LoraFile] = {}
        self._problems: dict[str, str] = {}
        self._logged: set[tuple[str, str]] = set()
        self._listed: tuple[LoraInfo, ...] = ()
        self._look_at = 0.0
        # Whether the folder was looked at, or a digest was read, since the LoRAs were listed.
        self._is_new = True
        # When those whose digest could not be read are tried again.
        self._retry_at: dict[tuple[Stamp, ...], float] = {}
        self._reader: threading.Thread | None = None
        self._last: tuple[Capabilities, Capabilities] | None = None
        self._look()

    def listed(self) -> tuple[LoraInfo, ...]:
        """The LoRAs whose digests are known, by name, as they were up to a second ago.

        The same tuple as before when nothing has changed. The digests of the others are read meanwhile, and each file
        that cannot be used is logged once.
        """
        with self._lock:
            self._look()
            if self._is_new:
                self._is_new = False
                self._log_problems()
                self._publish()
                self._start_reading()
            return self._listed

    def added_to(self, can: Capabilities) -> Capabilities:
        """What a model can make, with the LoRAs of now; the same object while nothing changes."""
        loras = self.listed()
        with self._lock:
            last = self._last
            if last is None or last[0] is not can or last[1].loras is not loras:
                last = self._last = can, can.model_copy(update={"loras": loras})
            return last[1]

    def names(self) -> Sequence[str]:
        """The names of all usable LoRAs, also of those whose digests are not known yet."""
        with self._lock:
            self._look(is_forced=True)
            return list(self._usable)

    def described(self, names: Iterable[str]) -> tuple[LoraInfo, ...]:
        """These LoRAs; digests that are not known are read now. Raises InvalidRequest for one that cannot be used."""
        with self._lock:
            self._look(is_forced=True)
            found = [self._find(name) for name in dict.fromkeys(names)]
        return tuple(self._info(lora, self._digests.read(lora)) for lora in found)

    def file(self, name: str, digest: str) -> LoraFile:
        """The LoRA of this name and digest. Raises InvalidRequest when it is gone, or has changed."""
        with self._lock:
            self._look(is_forced=True)
            lora = self._find(name)
        if self._digests.read(lora) != digest:
            raise InvalidRequest(f"the LoRA {name} is another file now than when the video was asked for")
        return lora

    def _find(self, name: str) -> LoraFile:
        if name in self._usable:
            return self._usable[name]
        for path, reason in self._problems.items():
            if Path(path).stem == name:
                raise InvalidRequest(f"the LoRA {name[:100]} cannot be used: {reason}", param="loras")
        there = f"there are {told(self._usable)}" if self._usable else "there are none that can be used"
        raise InvalidRequest(f"there is no LoRA {name[:100]!r} in the folder; {there}", param="loras")

    def _look(self, *, is_forced: bool = False) -> None:
        """Look at the folder, unless that was done a moment ago."""
        started = time.monotonic()
        if started < self._look_at and not is_forced:
            return
        listing = scan(self._folder)
        before, self._fits = self._fits, {}
        self._usable, self._problems = {}, dict(listing.problems)
        for name, lora in listing.loras.items():
            reason = self._misfit(lora, before)
            if reason is None:
                self._usable[name] = lora
            else:
                self._problems[lora.path.name] = reason
        ended = time.monotonic()
        self._look_at = ended + max(_LOOK_EVERY_S, _PAUSE_SHARE * (ended - started))
        self._is_new = True

    def _misfit(self, lora: LoraFile, before: Mapping[tuple[Path, tuple[Stamp, ...]], str | None]) -> str | None:
        """Why the LoRA does not fit the model; its header is read once for each stamp."""
        key = lora.path, lora.stamp
        if key in before:
            self._fits[key] = before[key]
            return before[key]
        reason = None
        try:
            check_fit(lora.path, self._transformers, only=lora.only, second=lora.second)
        except InvalidRequest as exc:
            reason = exc.message
            if isinstance(exc.__cause__, OSError):  # of this moment, so it is tried again
                return reason
        self._fits[key] = reason
        return reason

    def _log_problems(self) -> None:
        problems = set(self._problems.items())
        for path, reason in sorted(problems - self._logged):
            log.warning("a LoRA cannot be used: %s: %s", path, reason)
        self._logged = problems

    def _publish(self) -> None:
        found = [(lora, self._digests.known(lora)) for lora in self._usable.values()]
        listed = tuple(self._info(lora, digest) for lora, digest in found if digest is not None)
        if listed != self._listed:
            self._listed = listed

    def _info(self, lora: LoraFile, digest: str) -> LoraInfo:
        return LoraInfo(
            name=lora.name,
            digest=digest,
            scale=lora.scale,
            trigger_words=lora.trigger_words,
            rank=lora.facts.rank,
            is_for=_expert_of(lora) if len(self._transformers) > 1 else None,
            size_bytes=lora.size_bytes,
        )

    def _start_reading(self) -> None:
        if self._reader is None and self._next() is not None:
            self._reader = threading.Thread(target=self._read_digests, name="lora digests", daemon=True)
            self._reader.start()

    def _read_digests(self) -> None:
        while True:
            with self._lock:
                self._look()
                lora = self._next()
                if lora is None:
                    self._reader = None
                    return
            try:
                self._digests.read(lora)
            except InvalidRequest as exc:
                log.warning("a LoRA is not listed: %s", exc.message)
                with self._lock:
                    self._retry_at[lora.stamp] = time.monotonic() + _RETRY_S
            self._is_new = True

    def _next(self) -> LoraFile | None:
        """The newest file whose digest is not known."""
        now = time.monotonic()
        self._retry_at = {stamp: at for stamp, at in self._retry_at.items() if at > now}
        unknown = [
            lora
            for lora in self._usable.values()
            if lora.stamp not in self._retry_at and self._digests.known(lora) is None
        ]
        return max(unknown, key=lambda lora: max(stamp[2] for _path, stamp in lora.files), default=None)


def _expert_of(lora: LoraFile) -> Expert:
    """The expert that a LoRA of a model with two is for, by its file or by what is said of it."""
    of = {lora.only} if lora.only is not None else set(lora.facts.components)
    if lora.second is not None or len(of) != 1:
        return "both"
    return "high_noise" if of == {FIRST} else "low_noise"
