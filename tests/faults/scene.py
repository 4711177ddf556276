"""One fault under a stream of videos: it is struck, the service gets over it, and everything is checked."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.faults.checks import check_all_made_once
from tests.faults.clients import Body
from tests.faults.deployment import Deployment
from tests.faults.ledger import History
from tests.faults.processes import Process
from tests.faults.recovery import Recoveries, Recovery


def body(seed: int, *, size: str = "64x64", num_frames: int = 5, steps: int = 2) -> Body:
    return {"prompt": "waves", "size": size, "num_frames": num_frames, "num_inference_steps": steps, "seed": seed}


SMALL = [body(seed) for seed in range(3)]
# Seconds of denoising, and seconds of decoding in many parts, on the two cores that all of this may have.
LONG_DENOISING = body(7, steps=50)
LONG_DECODING = body(8, size="128x128", num_frames=25)
# Long enough for its upload to be waited for.
STORED = body(9, steps=20)
ALL_BODIES = [*SMALL, LONG_DENOISING, LONG_DECODING, STORED]
_EVERY_S = 0.7


class Scene:
    """What happened when, on the clock of the job database's events."""

    def __init__(self, deployment: Deployment, fault: str) -> None:
        self._deployment = deployment
        self._fault = fault
        self._struck_at = 0.0
        self._returned_at: float | None = None
        self.hit: Sequence[str] = ()
        self._back_with: str | None = None

    def strike(self, hit: Sequence[str]) -> None:
        """The fault happens now, to these videos among others."""
        self.hit = list(hit)
        self._struck_at = time.time()

    def strike_worker(self, worker_id: str, process: Process, number: signal.Signals) -> None:
        """All that it runs is hit."""
        self.strike(self._deployment.ledger.running_on(worker_id))
        process.send(number)

    def strike_all(self) -> None:
        """All that is accepted and not made is hit."""
        histories = self._deployment.ledger.histories()
        self.strike([video_id for video_id, history in histories.items() if not history[-1].is_terminal])

    def returned(self) -> None:
        """What was away is there again."""
        self._returned_at = time.time()

    def back_with(self, video_id: str) -> None:
        """It is in use again: with this video, instead of the first that is accepted and made after its return."""
        self._back_with = video_id

    def line(self, video_ids: Sequence[str]) -> Recovery:
        histories = self._deployment.ledger.histories()
        hit = [histories[one] for one in self.hit]
        return Recovery(
            fault=self._fault,
            num_videos=len(video_ids),
            num_hit=len(hit),
            begun_again_s=max((at - self._struck_at for one in hit for at in self._begun_again(one)), default=None),
            made_s=max((one[-1].at - self._struck_at for one in hit), default=None),
            back_s=self._back_s([histories[one] for one in video_ids], histories),
        )

    def _begun_again(self, history: History) -> Sequence[float]:
        return [entry.at for entry in history if entry.type == "started" and entry.at > self._struck_at]

    def _back_s(self, of_scene: Sequence[History], histories: dict[str, History]) -> float | None:
        returned_at = self._returned_at
        if returned_at is None:
            return None
        if self._back_with is not None:
            return self._begun_again(histories[self._back_with])[-1] - returned_at
        return min((one[-1].at for one in of_scene if one[0].at > returned_at), default=returned_at) - returned_at


@contextmanager
def scene(deployment: Deployment, recoveries: Recoveries, fault: str) -> Iterator[Scene]:
    """The service is whole, videos stream in; after this block no more do, all are made and checked, and noted."""
    deployment.make_whole()
    before = set(deployment.clients.accepted)
    what = Scene(deployment, fault)
    with deployment.clients.streaming(SMALL, _EVERY_S):
        yield what
    videos = {one: sent for one, sent in deployment.clients.accepted.items() if one not in before}
    deployment.clients.wait(list(videos))
    line = what.line(list(videos))  # before the check, which sweeps: the last event of each video is left then
    check_all_made_once(deployment, videos)
    recoveries.lines.append(line)
