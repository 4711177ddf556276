"""The LoRAs that a model can use, its own and those of a folder: files that appear are found, and files that change are
other LoRAs.

A request names a LoRA, and its digest says which file that was. One daemon thread looks at the folders and reads
digests, newest files first; a LoRA is listed when its digest is known. ``folder.py`` finds files, ``fit.py`` says which
of them fit the model, and ``digests.py`` keeps digests for the next start.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kinema.engines.wan.lora.delta import LoraRef
from kinema.engines.wan.lora.digests import Digests
from kinema.engines.wan.lora.fit import Shapes, check_fit
from kinema.engines.wan.lora.folder import Listing, LoraFile, Stamp, scan
from kinema.engines.wan.lora.header import told
from kinema.engines.wan.lora.keys import FIRST
from kinema.engines.wan.safetensors_header import Header
from kinema.errors import InvalidRequest
from kinema.request.capabilities import Capabilities, Expert, LoraInfo
from kinema.request.request import LoraUse

log = logging.getLogger(__name__)

# Seconds between two looks at the folder, at least; a slow folder is looked at less often.
_LOOK_EVERY_S = 1.0
_PAUSE_SHARE = 20
# Seconds before a file is read again that could not be read.
_RETRY_S = 60.0

_Key = tuple[Path, tuple[Stamp, ...]]


class LoraLibrary:
    """The usable LoRAs of a folder, and those of the folder ``own``, which came with the model.

    One of ``folder`` takes the place of the model's own with its name. ``transformers`` has the names and shapes of the
    model's weights by the names of its transformers; without it any LoRA is taken for one that fits, and
    ``has_two_experts`` says what they would. Digests are kept in the file ``digests``, if it is given. All methods may
    be called on any thread.
    """

    def __init__(
        self,
        folder: Path | None,
        transformers: Mapping[str, Shapes] | None,
        digests: Path | None = None,
        *,
        own: Path | None = None,
        has_two_experts: bool = False,
    ) -> None:
        self._folder = folder
        self._own = own
        self._is_checked = transformers is not None
        self._transformers = transformers or {}
        self._has_two_experts = has_two_experts or len(self._transformers) > 1
        self._digests = Digests(digests)
        self._lock = threading.Lock()
        # So that two who look at the same time read no header twice.
        self._scan_lock = threading.Lock()
        # Why a LoRA does not fit the model; None for one that does.
        self._fits: dict[_Key, str | None] = {}
        self._usable: Sequence[LoraFile] = ()
        self._logged: set[tuple[str, str]] = set()
        self._listed: tuple[LoraInfo, ...] = ()
        # When the folder is looked at again; None before the first time.
        self._look_at: float | None = None
        # When those are tried again whose digest could not be read.
        self._retry_at: dict[tuple[Stamp, ...], float] = {}
        self._reader: threading.Thread | None = None
        self._last: tuple[Capabilities, Capabilities] | None = None

    def listed(self) -> tuple[LoraInfo, ...]:
        """The LoRAs whose digests are known, by name, as they were up to two seconds ago if somebody asks each second.

        The same tuple as before when nothing has changed. Only the first call looks at the folder itself; later ones
        let the thread do it, and never wait. Each file that cannot be used is logged once.
        """
        is_first = self._look_at is None
        if is_first:
            self._look()
        with self._lock:
            if self._reader is None and (is_first or self._is_due()):
                self._reader = threading.Thread(target=self._read, name="lora digests", daemon=True)
                self._reader.start()
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
        return list(self._scan().loras)

    def described(self, names: Iterable[str]) -> tuple[LoraInfo, ...]:
        """These LoRAs; digests that are not known are read now. Raises InvalidRequest for one that cannot be used."""
        listing = self._scan()
        found = [self._find(listing, name) for name in dict.fromkeys(names)]
        return tuple(self._info(lora, self._digests.read(lora)) for lora in found)

    def file(self, name: str, digest: str) -> LoraFile:
        """The LoRA of this name and digest. Raises InvalidRequest when it is gone, or has changed."""
        lora = self._find(self._scan(), name)
        if self._digests.read(lora) != digest:
            raise InvalidRequest(f"the LoRA {name} is another file now than when the video was asked for")
        return lora

    def refs(self, uses: Sequence[LoraUse]) -> dict[str, list[LoraRef]]:
        """The LoRAs of a request for each transformer, by its name. Raises InvalidRequest as ``file`` does."""
        found: dict[str, list[LoraRef]] = {name: [] for name in self._transformers}
        for use in uses:
            lora = self.file(use.name, use.digest)
            for name, refs in found.items():
                strength = use.scale if name == FIRST or use.scale_2 is None else use.scale_2
                refs.append(LoraRef(lora.path, use.digest, strength, lora.second, lora.only))
        return found

    def _find(self, listing: Listing, name: str) -> LoraFile:
        if (lora := listing.loras.get(name)) is not None:
            return lora
        reason = next((why for path, why in listing.problems.items() if Path(path).stem == name), None)
        if reason is not None:
            raise InvalidRequest(f"the LoRA {name[:100]} cannot be used: {reason}", param="loras")
        there = f"there are {told(listing.loras)}" if listing.loras else "there are none that can be used"
        raise InvalidRequest(f"there is no LoRA {name[:100]!r} here; {there}", param="loras")

    def _scan(self) -> Listing:
        """The LoRAs of now that fit the model. Each is compared with it once for each stamp."""
        with self._scan_lock:
            before, self._fits = self._fits, {}

            def check(lora: LoraFile, headers: Mapping[Path, Header]) -> str | None:
                key = lora.path, lora.stamp
                reason = self._fits[key] = before[key] if key in before else self._misfit(lora, headers)
                return reason

            own = Listing() if self._own is None else scan(self._own, check, follows_links=True)
            given = Listing() if self._folder is None else scan(self._folder, check)
            return Listing(dict(sorted((own.loras | given.loras).items())), own.problems | given.problems)

    def _misfit(self, lora: LoraFile, headers: Mapping[Path, Header]) -> str | None:
        """Why the LoRA does not fit the model. Raises InvalidRequest when it cannot be read at this moment."""
        if not self._is_checked:
            if lora.second is None or self._has_two_experts:
                return None
            return "it has a second file, which is for a model with two experts"
        try:
            check_fit(lora.path, self._transformers, only=lora.only, second=lora.second, headers=headers)
        except InvalidRequest as exc:
            if isinstance(exc.__cause__, OSError):
                raise
            return exc.message
        return None

    def _is_due(self) -> bool:
        return self._look_at is None or time.monotonic() >= self._look_at

    def _look(self) -> None:
        """Look at the folder, and list what is there."""
        started = time.monotonic()
        listing = self._scan()
        with self._lock:
            self._log(listing.problems)
            self._usable = tuple(listing.loras.values())
            self._publish()
            ended = time.monotonic()
            self._look_at = ended + max(_LOOK_EVERY_S, _PAUSE_SHARE * (ended - started))

    def _log(self, problems: Mapping[str, str]) -> None:
        now = set(problems.items())
        for path, reason in sorted(now - self._logged):
            log.warning("a LoRA cannot be used: %s: %s", path, reason)
        self._logged = now

    def _publish(self) -> None:
        found = [(lora, self._digests.known(lora)) for lora in self._usable]
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
            is_for=_expert_of(lora) if self._has_two_experts else None,
            size_bytes=lora.size_bytes,
        )

    def _read(self) -> None:
        """The thread: it ends when no digest is to be read."""
        try:
            while self._read_one():
                pass
        except Exception:
            log.exception("the folder of LoRAs could not be looked at")
            with self._lock:
                self._reader, self._look_at = None, time.monotonic() + _RETRY_S

    def _read_one(self) -> bool:
        """Look at the folder if it is time, and read a digest that is not known; whether there was one."""
        if self._is_due():
            self._look()
        with self._lock:
            lora = self._next()
            if lora is None:
                self._reader = None
                return False
        try:
            self._digests.read(lora)
        except InvalidRequest as exc:
            log.warning("a LoRA is not listed: %s", exc.message)
            with self._lock:
                self._retry_at[lora.stamp] = time.monotonic() + _RETRY_S
        with self._lock:
            self._publish()
        return True

    def _next(self) -> LoraFile | None:
        """The newest file whose digest is not known."""
        now = time.monotonic()
        self._retry_at = {stamp: at for stamp, at in self._retry_at.items() if at > now}
        unknown = [
            lora for lora in self._usable if lora.stamp not in self._retry_at and self._digests.known(lora) is None
        ]
        return max(unknown, key=lambda lora: max(stamp[2] for _path, stamp in lora.files), default=None)


def _expert_of(lora: LoraFile) -> Expert:
    """The expert that a LoRA of a model with two is for, by its file or by what is said of it."""
    of = {lora.only} if lora.only is not None else set(lora.facts.components)
    if lora.second is not None or len(of) != 1:
        return "both"
    return "high_noise" if of == {FIRST} else "low_noise"
