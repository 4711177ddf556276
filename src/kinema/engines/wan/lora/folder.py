"""The LoRAs of a folder: files that appear are found, without a restart, by another look at the folder.

A LoRA is a ``.safetensors`` file in the folder or in one below it, and its name is that of the file without the ending.
A file ``NAME.json`` beside it may say more: ``scale`` (the strength where a request gives none), ``trigger_words``,
``expert`` (``high_noise``, ``low_noise`` or ``both``) and ``second`` (the file beside it for the low-noise expert).
"""

from __future__ import annotations

import os
import re
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kinema.engines.wan.configs import explain
from kinema.engines.wan.lora.header import LoraFacts, facts_of, open_header, quoted
from kinema.engines.wan.lora.keys import FIRST, SECOND
from kinema.engines.wan.safetensors_header import PICKLES, Header
from kinema.errors import InvalidRequest
from kinema.request.capabilities import Expert
from kinema.request.json_text import parse_file

_ENDING = ".safetensors"
# A name stands in requests, URLs and logs.
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
# As LightX2V and AI Toolkit call the files of the two experts.
_EXPERT_IN_NAME = re.compile(r"(high|low)[._-]?noise", re.IGNORECASE)
_TRANSFORMERS = {"high_noise": FIRST, "low_noise": SECOND, "both": None}
# A folder for LoRAs has fewer; with more, somebody gave the wrong one.
_MAX_FILES, _MAX_DEPTH = 10_000, 4
_MAX_SIDECAR_BYTES = 64 * 2**10

# What changes when a file does: its inode, size, and the times at which its bytes and its rights were changed.
Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class LoraFile:
    """A LoRA that can be read: ``read_lora(path, transformers, only=only, second=second)``.

    ``scale`` is its strength where a request gives none. ``only`` is the transformer that it is for; None where it is
    for all, or says so itself. ``stamp`` is another one when any of its files has changed.
    """

    name: str
    path: Path
    second: Path | None
    only: str | None
    scale: float
    trigger_words: tuple[str, ...]
    facts: LoraFacts
    size_bytes: int
    stamp: tuple[Stamp, ...]

    @property
    def files(self) -> tuple[tuple[Path, Stamp], ...]:
        """The files with tensors, one or two, and the stamp of each."""
        first = (self.path, self.stamp[0])
        return (first,) if self.second is None else (first, (self.second, self.stamp[-1]))


@dataclass(frozen=True)
class Listing:
    """What a folder has: LoRAs by their names, and a sentence for each file that is not usable, by its path in it."""

    loras: dict[str, LoraFile] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


class Sidecar(BaseModel):
    """``NAME.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    scale: float = Field(1.0, ge=-10, le=10)
    trigger_words: list[Annotated[str, Field(max_length=200)]] = Field(default_factory=list, max_length=20)
    expert: Expert | None = None
    second: str | None = None


# Why a LoRA is not usable, though its files are; None for one that is. The headers are those that were read just now,
# by the paths of the files.
Check = Callable[[LoraFile, Mapping[Path, Header]], str | None]


def scan(folder: Path, check: Check = lambda _lora, _headers: None, *, follows_links: bool = False) -> Listing:
    """What the folder has now, as far as ``check`` finds it usable. A file is opened only when it has changed since the
    last time.

    ``follows_links`` is for the folder of a model: those of the hub's cache have links to files outside of them.
    """
    return _Scan(folder, check, follows_links).listing()


class _Scan:
    """One look at a folder."""

    def __init__(self, folder: Path, check: Check, follows_links: bool) -> None:
        self._root = folder.resolve()
        self._check = check
        self._follows_links = follows_links
        self._problems: dict[str, str] = {}
        self._stamps: dict[Path, Stamp] = {}
        self._seconds: set[Path] = set()

    def listing(self) -> Listing:
        for path, status in self._walk():
            if reason := self._reason_against(path, status):
                self._report(path, reason)
            else:
                self._stamps[path] = stamp_of(status)
        named: dict[str, list[Path]] = {}
        for path in self._stamps:
            named.setdefault(path.stem, []).append(path)
        sidecars: dict[Path, tuple[Sidecar, Stamp | None]] = {}
        for name, (path, *more) in sorted(named.items()):
            if more:
                for one in (path, *more):
                    self._report(one, f"{1 + len(more)} files have the name {name}; give each its own")
                continue
            try:
                sidecars[path] = self._sidecar(path)
            except InvalidRequest as exc:
                self._report(path, exc.message)
        found = {}
        # The second file of a LoRA is none by itself. So it comes with the first one, and its header is read once.
        for path in sorted(sidecars, key=lambda path: sidecars[path][0].second is None):
            if path not in self._seconds and (lora := self._usable(path, *sidecars[path])) is not None:
                found[lora.name] = lora
        usable = {name: found[name] for name in sorted(found) if found[name].path not in self._seconds}
        return Listing(usable, self._problems)

    def _report(self, path: Path, reason: str) -> None:
        self._problems[str(path.relative_to(self._root))] = reason

    def _walk(self) -> Iterator[tuple[Path, os.stat_result]]:
        """The files that may matter. Hidden ones do not: programs that download give unfinished files such names."""
        waiting, count = [(self._root, 0)], 0
        while waiting:
            folder, depth = waiting.pop()
            for entry in self._entries(folder):
                path, count = Path(entry.path), count + 1
                if count > _MAX_FILES:
                    self._report(folder, f"more than {_MAX_FILES:,} files; the others are not looked at")
                    return
                if entry.is_dir(follow_symlinks=False):
                    if depth == _MAX_DEPTH:
                        self._report(path, f"folders are looked into {_MAX_DEPTH} levels deep")
                    else:
                        waiting.append((path, depth + 1))
                elif path.suffix.lower() in (_ENDING, *PICKLES) or entry.is_dir():
                    try:
                        yield path, entry.stat()
                    except OSError as exc:  # a link to nothing, or a file that has just gone
                        self._report(path, f"it cannot be read: {exc.strerror}")

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
        except OSError as exc:
            self._report(folder, f"the folder cannot be read: {exc.strerror}")
            return []

    def _reason_against(self, path: Path, status: os.stat_result) -> str | None:
        """Why a file is not even opened; None when nothing speaks against it."""
        if stat.S_ISDIR(status.st_mode):
            return "links to folders are not followed"
        if not stat.S_ISREG(status.st_mode):
            return "it is no file"
        if path.suffix.lower() in PICKLES:
            return f"it is a pickle, which can run code; only {_ENDING} files are read"
        if not self._is_inside(path):
            return "it is a link to a file outside of the folder, which is not followed"
        if not _NAME.fullmatch(path.stem):
            return f"the name {quoted(path.stem)} is not up to 100 letters A-Z and a-z, digits, '.', '_' and '-'"
        return None

    def _is_inside(self, path: Path) -> bool:
        return self._follows_links or not path.is_symlink() or path.resolve().is_relative_to(self._root)

    def _sidecar(self, path: Path) -> tuple[Sidecar, Stamp | None]:
        """What stands beside a file, and its stamp if it is there. Raises InvalidRequest for a bad one."""
        beside = path.with_suffix(".json")
        status = _status_of(beside)
        if status is None:
            return Sidecar(), None
        if not stat.S_ISREG(status.st_mode) or not self._is_inside(beside):
            raise InvalidRequest(f"{beside.name} is no file of this folder")
        stamp = stamp_of(status)
        return _sidecar(beside, stamp), stamp

    def _usable(self, path: Path, sidecar: Sidecar, beside: Stamp | None) -> LoraFile | None:
        """The LoRA; None for one that is not usable, which is reported."""
        headers: dict[Path, Header] = {}
        try:
            lora = self._lora(path, sidecar, beside, headers)
            if lora.second is not None:
                self._seconds.add(lora.second)
            reason = self._check(lora, headers)
        except InvalidRequest as exc:
            reason = exc.message
        if reason is not None:
            self._report(path, reason)
            return None
        return lora

    def _lora(self, path: Path, sidecar: Sidecar, beside: Stamp | None, headers: dict[Path, Header]) -> LoraFile:
        """Add the headers that are read. Raises InvalidRequest for a file that is no LoRA, or not whole."""
        name, facts = path.stem, _facts(path, self._stamps[path], headers)
        stamps = [self._stamps[path]]
        if beside is not None:
            stamps.append(beside)
        second = self._second(path, sidecar)
        if second is not None:
            stamps.append(self._stamps[second])
            _facts(second, self._stamps[second], headers)
        expert = sidecar.expert
        if expert is None and second is None and not facts.components and (found := _EXPERT_IN_NAME.search(name)):
            expert = "high_noise" if found[1].lower() == "high" else "low_noise"
        return LoraFile(
            name=name,
            path=path,
            second=second,
            only=_TRANSFORMERS[expert] if expert else None,
            scale=sidecar.scale,
            trigger_words=tuple(sidecar.trigger_words) or facts.trigger_words,
            facts=facts,
            size_bytes=sum(self._stamps[file][1] for file in (path, second) if file is not None),
            stamp=tuple(stamps),
        )

    def _second(self, path: Path, sidecar: Sidecar) -> Path | None:
        if sidecar.second is None:
            return None
        if sidecar.expert is not None:
            raise InvalidRequest(f"{path.stem}.json has expert and second; with two files, each is for one expert")
        second = path.parent / sidecar.second
        if second == path or second.parent != path.parent or second not in self._stamps:
            raise InvalidRequest(
                f"{path.stem}.json: second = {quoted(sidecar.second)} is no other {_ENDING} file beside it"
            )
        return second


def _status_of(path: Path) -> os.stat_result | None:
    """None when there is no such file."""
    try:
        return path.stat()
    except OSError:
        return None


def stamp_of(status: os.stat_result) -> Stamp:
    """Another one when the file has changed."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


# The facts of files by their paths and stamps, or why there are none.
_known_facts: OrderedDict[tuple[Path, Stamp], LoraFacts | str] = OrderedDict()


def _facts(path: Path, stamp: Stamp, headers: dict[Path, Header]) -> LoraFacts:
    """What the header of the file says. It is read, and added to ``headers``, when the stamp is a new one. Raises
    InvalidRequest."""
    found = _known_facts.get((path, stamp))
    if found is None:
        found = _known_facts[path, stamp] = _read_facts(path, headers)
        while len(_known_facts) > _MAX_FILES:
            _known_facts.popitem(last=False)
    if isinstance(found, str):
        raise InvalidRequest(found)
    return found


def _read_facts(path: Path, headers: dict[Path, Header]) -> LoraFacts | str:
    try:
        headers[path] = header = open_header(path)
        return facts_of(path.name, header)
    except InvalidRequest as exc:
        if isinstance(exc.__cause__, OSError):  # of the disk or of this moment, so it is tried again
            raise
        return exc.message


def _sidecar(path: Path, stamp: Stamp) -> Sidecar:
    """Raises InvalidRequest for a file that is no sidecar."""
    found = _known_sidecar(path, stamp)
    if isinstance(found, str):
        raise InvalidRequest(found)
    return found


@lru_cache(maxsize=_MAX_FILES)
def _known_sidecar(path: Path, _stamp: Stamp) -> Sidecar | str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_SIDECAR_BYTES + 1)
        if len(data) > _MAX_SIDECAR_BYTES:
            raise ValueError(f"it is larger than {_MAX_SIDECAR_BYTES // 2**10} KiB")
        return Sidecar.model_validate(parse_file(data.decode()))
    except OSError as exc:
        raise InvalidRequest(f"{path.name} cannot be read: {exc.strerror}") from exc
    except ValidationError as exc:
        return f"{path.name}: {explain(exc)}"
    except (ValueError, InvalidRequest) as exc:
        return f"{path.name} cannot be read: {exc}"
