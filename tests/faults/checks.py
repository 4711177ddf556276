"""What must be true after any fault."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

from kinema.jobs.identity import read_identity
from kinema.jobs.retention import SqlRetention
from kinema.jobs.sql import SqlJobStore
from kinema.service.pairing import Pairing
from kinema.service.sweeper import GRACE_S, Sweeper
from kinema.settings import RetentionSettings
from kinema.storage import Storage
from tests.faults.deployment import Deployment, key_of
from tests.faults.processes import until

_SWEPT_S = 20.0


def check_all_made_once(deployment: Deployment, videos: Mapping[str, dict[str, object]]) -> None:
    """Every accepted video is completed, once, is the right one, and has its files; nothing else is there."""
    clients, ledger = deployment.clients, deployment.ledger
    clients.wait(list(videos))
    histories = ledger.histories()
    assert histories.keys() == clients.accepted.keys(), "a submission was lost, or made two videos"
    for video_id in videos:
        ends = [entry.type for entry in histories[video_id] if entry.is_terminal]
        assert ends == ["completed"], f"{video_id}: {histories[video_id]}"
        assert histories[video_id][-1].type == "completed", f"{video_id} went on after its end: {histories[video_id]}"
    for video_id, body in videos.items():
        assert clients.content(video_id) == deployment.undisturbed[key_of(body)], f"{video_id} is another video"
    check_nothing_else_is_stored(deployment)


def check_nothing_else_is_stored(deployment: Deployment) -> None:
    """After a sweep each video has the files of the attempt that made it; what a late worker does is waited for."""
    expected = {
        video_id: {f"{attempt}.{ending}" for ending in ("mp4", "json", "webp", "jpg")}
        for video_id, attempt in deployment.ledger.attempts().items()
    }

    def is_clean() -> bool:
        asyncio.run(_sweep(deployment))
        return stored(deployment.objects) == expected

    try:
        until(is_clean, "one video each in storage", _SWEPT_S)
    except BaseException:
        found = stored(deployment.objects)
        wrong = {
            one: (found.get(one), expected.get(one))
            for one in found.keys() | expected.keys()
            if found.get(one) != expected.get(one)
        }
        raise AssertionError(f"files that are there, and those that should be: {wrong}") from None


def stored(objects: Path) -> dict[str, set[str]]:
    """The names of the objects of each video."""
    found: dict[str, set[str]] = {}
    for path in objects.glob("bucket/videos/*/*"):
        if not path.name.startswith("."):
            found.setdefault(path.parent.name, set()).add(path.name)
    return found


async def _sweep(deployment: Deployment) -> None:
    """As a frontend does it, when what is there now has got old enough."""
    store = await SqlJobStore.open(deployment.database_url)
    try:
        storage = Storage(f"file://{deployment.objects / 'bucket'}")
        jobs = SqlRetention(store.database)
        pairing = Pairing(await read_identity(store.database), jobs, storage)
        sweeper = Sweeper(
            jobs, store.inputs, storage, pairing, RetentionSettings(), clock=lambda: time.time() + 2 * GRACE_S
        )
        await sweeper.sweep()
    finally:
        await store.close()
