"""Decides whose step runs next on the device.

These are decisions over plain data: no torch, no I/O, no clock; the caller gives all times. The scheduler remembers how
the device's seconds were spent, as ``charge`` reports them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kinema.request.request import Priority

Policy = Literal["shortest", "fifo", "round-robin"]
POLICIES: tuple[Policy, ...] = ("shortest", "fifo", "round-robin")

# A priority divides the work of a generation by this number. It is a factor and not a rank, so that a low generation
# that is nearly done does not wait for a high one of an hour.
WEIGHTS: dict[Priority, float] = {"low": 1 / 8, "normal": 1.0, "high": 8.0}
# The oldest generation's share of the device's seconds. It is enough for a long generation to end within five times its
# length under any load, and little enough that those that overtake it are at most 1.25 times slower than alone.
OLDEST_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class Candidate:
    """A generation that could take a turn.

    ``remaining_s`` is the predicted time of the device until its end, and ``next_turn_s`` that of its next turn.
    ``last_turn`` is the number of its last turn, counted from 1 over all generations of the device; 0 before its first.
    ``tenant`` is its owner; ``deadline_at`` is on the clock of the callers' ``now``.
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

    ``fifo`` serves the oldest to its end. ``round-robin`` serves the one whose last turn is longest ago.
    ``shortest`` serves, in this order:

    1. a generation that is being decoded: a decode holds gigabytes, and two at once may not fit;
    2. the oldest, as soon as its share amounts to its next turn: a fifth of the device's seconds (``OLDEST_SHARE``);
    3. a generation that would miss its deadline if it waited any longer, the earliest deadline first;
    4. the one with the smallest sum of: the seconds that its tenant's ended generations had, beyond those of the least
       served tenant; the seconds that the tenant's shorter generations still need; and the seconds that it needs
       itself. Its priority divides this sum.

    So of one tenant's generations the one with the least remaining work is served, a tenant with many falls behind one
    with few, and nobody starves. The bound: let m be the longest turn or decode, as predicted or as taken. A generation
    that needs T seconds, admitted while those before it need W, is done after at most (T + W) / OLDEST_SHARE + 7 m
    seconds of the device, whatever is admitted later and with whatever priority. The reason: as long as it or an older
    one is there, the oldest has OLDEST_SHARE of every second, except for at most (1 + 2 OLDEST_SHARE) m that it is
    still owed at the end.
    """

    def __init__(self, policy: Policy = "shortest") -> None:
        self.policy = policy
        self._owed_s = 0.0
        self._oldest: int | None = None
        # The seconds of each generation that has not ended, and of each tenant's ended ones.
        self._served_s: dict[int, float] = defaultdict(float)
        self._spent_s: dict[str, float] = {}
        self._tenants: frozenset[str] = frozenset()

    def choose(self, candidates: Sequence[Candidate], now: float = 0.0) -> int | None:
        """The key of the generation to serve, the earlier admitted one among equals; None when there is none.

        ``candidates`` are in the order of their admission.
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
        """Report the seconds of a turn of the generation that was chosen last."""
        self._served_s[key] += seconds
        self._owed_s += OLDEST_SHARE * seconds
        if key == self._oldest:
            self._owed_s = max(self._owed_s - seconds, 0.0)

    def end(self, key: int, tenant: str = "") -> None:
        """Report that a generation has left the device, for whatever reason."""
        self._spent_s[tenant] = self._spent_s.get(tenant, 0.0) + self._served_s.pop(key, 0.0)

    def _meet(self, candidates: Sequence[Candidate]) -> None:
        """Note the present tenants. A tenant that comes back has no claim for the time of its absence."""
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
        # An absent tenant that had no more than the least served one is forgotten: a new tenant starts with as much.
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
    """Whether it must go on now to meet its deadline, and still can. A deadline that is lost is ignored.

    The oldest one's share and another generation's turn may come in between, and a prediction may be wrong by a tenth.
    """
    if candidate.deadline_at is None:
        return False
    slack_s = candidate.deadline_at - now - candidate.remaining_s
    needed_s = candidate.remaining_s * OLDEST_SHARE / (1 - OLDEST_SHARE) + longest_turn_s
    return -0.1 * candidate.remaining_s <= slack_s <= needed_s
