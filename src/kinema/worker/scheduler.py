"""Whose step runs next on the device.

Decisions over plain data: no torch, no I/O, no clock of its own; what seconds mean is said by whoever calls. What it
remembers is how the device's seconds were spent, as ``charge`` tells it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kinema.request.request import Priority

Policy = Literal["shortest", "fifo", "round-robin"]
POLICIES: tuple[Policy, ...] = ("shortest", "fifo", "round-robin")

# A priority counts the work of a generation as so many times less. A factor, and not a rank: a low one that is nearly
# done is not kept waiting by a high one of an hour.
WEIGHTS: dict[Priority, float] = {"low": 1 / 8, "normal": 1.0, "high": 8.0}
# Of the device's seconds, what belongs to the oldest generation. Enough that a long one ends in five times its length
# under any load, little enough that what overtakes it is 1.25 times slower than alone at most.
OLDEST_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Candidate:
    """A generation that could take a turn.

    ``remaining_s`` is what it still needs of the device and ``next_turn_s`` its next turn alone, both as predicted.
    ``last_turn`` is the number of the turn in which it was served last, counted from 1 over all generations of the
    device; 0 before its first. ``tenant`` is whose it is; ``deadline_at`` is on the clock of the callers' ``now``.
    """

    key: int
    remaining_s: float = 0.0
    next_turn_s: float = 0.0
    last_turn: int = 0
    is_decoding: bool = False
    tenant: str = ""
    priority: Priority = "normal"
    deadline_at: float | None = None

    @property
    def weighted_s(self) -> float:
        return self.remaining_s / WEIGHTS[self.priority]


class StepScheduler:
    """Chooses among generations after each turn, by one of three policies.

    ``fifo`` serves the oldest to its end. ``round-robin`` serves whoever waits longest since its last turn.
    ``shortest`` serves, in this order:

    1. whoever is being decoded: a decode holds gigabytes, and two at once may not fit;
    2. the oldest, as soon as it is owed its next turn: a fifth of the device's seconds are its own (``OLDEST_SHARE``);
    3. whoever has a deadline that it would miss if it waited any longer, the earliest first;
    4. whoever is done first in a fair turn: the least of the device's seconds that its tenant had in ended generations
       beyond what the least served tenant had, plus what that tenant's shorter generations still need, plus what it
       needs itself; all as its priority counts them.

    So of one tenant's generations the one with the least remaining work is served, a tenant with many falls behind one
    with few, and nobody starves. The bound: let m be the longest turn or decode, as predicted or as taken. A generation
    that needs T seconds, admitted while those before it need W, is done after (T + W) / OLDEST_SHARE + 7 m seconds of
    the device at most, whatever is admitted later and with whatever priority. For as long as it, or one before it, is
    there, the oldest has OLDEST_SHARE of every second, but for (1 + 2 OLDEST_SHARE) m that it may be owed at the end.
    """

    def __init__(self, policy: Policy = "shortest") -> None:
        self.policy = policy
        self._owed_s = 0.0
        self._oldest: int | None = None
        # The seconds of those that have not ended, and by tenant of those that have.
        self._served_s: dict[int, float] = defaultdict(float)
        self._spent_s: dict[str, float] = {}
        self._tenants: frozenset[str] = frozenset()

    def choose(self, candidates: Sequence[Candidate], now: float = 0.0) -> int | None:
        """The key of the generation to serve, the earlier admitted one among equals; None when there is none.

        ``candidates`` stand in the order of their admission.
        """
        self._meet(candidates)
        if len(candidates) < 2:
            return candidates[0].key if candidates else None
        match self.policy:
            case "fifo":
                return candidates[0].key
            case "round-robin":
                return min(candidates, key=lambda candidate: candidate.last_turn).key
        return self._choose(candidates, now).key

    def charge(self, key: int, seconds: float) -> None:
        """Tell of a turn of the generation that was chosen last, with what it took."""
        self._served_s[key] += seconds
        self._owed_s += OLDEST_SHARE * seconds
        if key == self._oldest:
            self._owed_s = max(self._owed_s - seconds, 0.0)

    def end(self, key: int, tenant: str = "") -> None:
        """Tell that a generation has left the device, however it did."""
        self._spent_s[tenant] = self._spent_s.get(tenant, 0.0) + self._served_s.pop(key, 0.0)

    def _meet(self, candidates: Sequence[Candidate]) -> None:
        """A tenant that comes back is not owed for the time when it wanted nothing."""
        self._oldest = candidates[0].key if candidates else None
        if len(candidates) < 2:
            self._owed_s = 0.0
        tenants = frozenset(candidate.tenant for candidate in candidates)
        if tenants == self._tenants:
            return
        stayed = [self._spent_s[tenant] for tenant in tenants & self._tenants]
        least = min(stayed, default=0.0)
        if not stayed:
            self._spent_s.clear()
        for tenant in tenants:
            self._spent_s[tenant] = max(self._spent_s.get(tenant, 0.0), least)
        self._tenants = tenants
        # One that is gone and had no more than the least served would be met as a new one is.
        self._spent_s = {name: spent for name, spent in self._spent_s.items() if name in tenants or spent > least}

    def _choose(self, candidates: Sequence[Candidate], now: float) -> Candidate:
        for candidate in candidates:
            if candidate.is_decoding:
                return candidate
        if self._owed_s >= candidates[0].next_turn_s:
            return candidates[0]
        longest_s = max(candidate.next_turn_s for candidate in candidates)
        urgent = [candidate for candidate in candidates if _is_urgent(candidate, now, longest_s)]
        if urgent:
            return min(urgent, key=lambda candidate: candidate.deadline_at or now)
        return self._first_done(candidates)

    def _first_done(self, candidates: Sequence[Candidate]) -> Candidate:
        least = min(self._spent_s[tenant] for tenant in self._tenants)
        before_s = {tenant: self._spent_s[tenant] - least for tenant in self._tenants}
        ranked: list[tuple[float, int]] = []
        for place, candidate in sorted(enumerate(candidates), key=lambda placed: placed[1].weighted_s):
            before_s[candidate.tenant] += candidate.remaining_s
            ranked.append((before_s[candidate.tenant] / WEIGHTS[candidate.priority], place))
        return candidates[min(ranked)[1]]


def _is_urgent(candidate: Candidate, now: float, longest_turn_s: float) -> bool:
    """Whether it must go on now to be in time, and can be: a deadline that is lost anyway moves nobody else's.

    What is owed to the oldest, and a turn of another, may come in between; a prediction may be a tenth off.
    """
    if candidate.deadline_at is None:
        return False
    slack_s = candidate.deadline_at - now - candidate.remaining_s
    needed_s = candidate.remaining_s * OLDEST_SHARE / (1 - OLDEST_SHARE) + longest_turn_s
    return -0.1 * candidate.remaining_s <= slack_s <= needed_s
