"""The cluster of a frontend: workers in other processes, reached over a transport.

For each instance that discovery lists, a keeper holds a call of ``info`` open: the worker is present while it answers.
Its figures are a moment old, so tasks that were sent from here but are not in them yet are added. ``host.py`` is the
other end.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import structlog

from kinema.cluster.base import WorkerInfo
from kinema.cluster.transport import CANCEL, INFO, LIVE, RUN, Connection, Payload, Unreachable
from kinema.errors import KinemaError, NoWorker, WorkerLost
from kinema.events import Event, event_adapter, is_terminal
from kinema.ids import JobId
from kinema.job import Task
from kinema.request.capabilities import Capabilities
from kinema.request.memory import Memory

log = structlog.get_logger(__name__)

# A job and its attempt.
_TaskKey = tuple[JobId, int]

# Seconds of silence: a worker sends a heartbeat each second.
INFO_SILENCE_S = 4.0
# Seconds for which a worker that could not be reached, or broke off, gets nothing, unless it answers again.
_AVOIDED_S = 5.0
# Seconds for which a free slot is left to the frontend whose video freed it. That frontend knows first; if all
# frontends claimed a job for the same slot, all but one would have to give their job back. If it has died, the others
# must not come at the same moment either: each draws its own time between these.
_COURTESY_S = (0.1, 1.0)
# Seconds before a failed call of ``info`` is repeated.
_RETRY_S = 0.5
_NOT_UNDERSTOOD_S = 30.0
# After a terminal event only the end of the stream comes.
_END_S = 1.0
_REMEMBERED_TASKS = 1000
_REMEMBERED_CAPABILITIES = 100
# Discovery reports changes. This bounds the wait for a keeper that ended while its instance stayed.
_LOOK_AGAIN_S = 1.0


@dataclass(slots=True)
class _Member:
    """The last report of a worker about itself."""

    instance: int
    info: WorkerInfo
    counted: frozenset[_TaskKey]
    avoided_until: float = 0.0
    # Slots that videos of other frontends have just freed.
    left_to_others: int = 0

    @classmethod
    def read(cls, instance: int, said: Payload, capabilities: Capabilities) -> _Member:
        info = WorkerInfo(
            worker_id=said["worker_id"],
            capabilities=capabilities,
            free_slots=said["free_slots"],
            is_ready=said["is_ready"],
            predicted_work=said["predicted_work"],
            has_suspect=said["has_suspect"],
            device=said["device"],
            version=said["version"],
            # An older worker says nothing of these.
            memory=None if (memory := said.get("memory")) is None else Memory.model_validate(memory),
            num_parked=said.get("num_parked", 0),
            num_resumed=said.get("num_resumed", 0),
            loras_in_memory=said.get("loras_in_memory", ()),
            costs=said.get("costs"),
        )
        return cls(instance, info, frozenset((JobId(job_id), attempt) for job_id, attempt in said["running"]))

    @property
    def admission(self) -> tuple[bool, int]:
        """The values whose change may allow a waiting job to begin."""
        return self.info.is_ready, self.info.free_slots

    def now(self, sent: Sequence[Task]) -> WorkerInfo:
        """The worker with the tasks that were sent to it, whether or not its last report includes them."""
        uncounted = [task for task in sent if _key(task) not in self.counted]
        is_avoided = self.avoided_until > asyncio.get_running_loop().time()
        info = self.info
        return replace(
            info,
            free_slots=max(info.free_slots - len(uncounted) - self.left_to_others, 0),
            is_ready=info.is_ready and not is_avoided,
            predicted_work=info.predicted_work + sum(task.request.work for task in uncounted),
            has_suspect=info.has_suspect or any(task.losses for task in uncounted),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Sent:
    """A task that runs on a worker for this frontend."""

    worker_id: str
    instance: int
    task: Task


class RemoteCluster:
    """A ``Cluster``, from ``start`` to ``stop``. ``connect`` may take as long as discovery is unavailable."""

    is_local = False

    def __init__(self, connect: Callable[[], Awaitable[Connection]], *, info_silence_s: float = INFO_SILENCE_S) -> None:
        self._connect = connect
        self._info_silence_s = info_silence_s
        self._connection: Connection
        self._instances: frozenset[int] = frozenset()
        self._members: dict[int, _Member] = {}
        # The instances of each worker: one that has just registered again may also be here as its old instance.
        self._instances_of: defaultdict[str, list[int]] = defaultdict(list)
        self._sent: list[_Sent] = []
        # Tasks that ended lately: the reports of their workers may still include them.
        self._ended: deque[_TaskKey] = deque(maxlen=_REMEMBERED_TASKS)
        self._models: set[str] = set()
        self._known_capabilities: deque[tuple[Payload, Capabilities]] = deque(maxlen=_REMEMBERED_CAPABILITIES)
        # What ``workers`` tells of each. It is kept, since there may be a thousand, and few of them change at a time.
        self._workers: dict[str, WorkerInfo] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """Begin to look for workers; at first there are none."""
        self._spawn("watch", self._watch)

    async def stop(self) -> None:
        """Leave. Running calls are broken off."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def workers(self) -> Sequence[WorkerInfo]:
        """Every worker that answers, in the order in which they came."""
        return list(self._workers.values())

    def known_models(self) -> Sequence[str]:
        """The models of all workers that ever answered this frontend, and their aliases."""
        return sorted(self._models)

    def run(self, worker_id: str, task: Task) -> AsyncGenerator[Event, None]:
        """See ``Cluster``. Raises NoWorker also when nothing could be started because the worker cannot be reached."""
        instance = self._instance_of(worker_id)
        sent = _Sent(worker_id, instance, task)
        self._sent.append(sent)
        self._show(worker_id)
        return self._events(sent)

    async def cancel(self, job_id: JobId, attempt: int) -> None:
        """See ``Cluster``. The request is sent in the background: the caller must not wait for a worker that hangs."""
        for sent in self._sent:
            if _key(sent.task) == (job_id, attempt):
                self._spawn(f"cancel {job_id}.{attempt} on {sent.instance}", partial(self._ask_to_cancel, sent))

    async def live(self, worker_id: str, job_id: JobId, attempt: int) -> AsyncGenerator[bytes, None]:
        """See ``Cluster``. Any frontend may ask, not only the one that sent the task."""
        member = self._latest(worker_id)
        if member is None:
            raise WorkerLost(f"worker {worker_id} is not here")
        call = self._connection.call(member.instance, LIVE, {"job_id": job_id, "attempt": attempt})
        async with contextlib.aclosing(call) as items:
            async for item in items:
                if "is_whole" in item:
                    await _read_to_the_end(items)
                    return
                yield item["data"]
        raise WorkerLost("the video ended early")

    async def wait_for_change(self, timeout_s: float) -> None:
        """See ``Cluster``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    async def _events(self, sent: _Sent) -> AsyncGenerator[Event, None]:
        payload = {"task": sent.task.model_dump(mode="json")}
        try:
            async with contextlib.aclosing(self._connection.call(sent.instance, RUN, payload)) as items:
                async for item in items:
                    event = event_adapter.validate_python(item["event"])
                    if is_terminal(event):
                        await _read_to_the_end(items)
                        self._forget_sent(sent)
                        yield event
                        return
                    yield event
            raise WorkerLost("the worker's events ended early")
        except Unreachable as exc:
            self._avoid(sent.instance)
            raise NoWorker(f"worker {sent.worker_id} cannot be reached") from exc
        except WorkerLost:
            self._avoid(sent.instance)
            raise
        finally:
            self._forget_sent(sent)

    def _forget_sent(self, sent: _Sent) -> None:
        if sent in self._sent:
            self._sent.remove(sent)
            self._show(sent.worker_id)
            self._ended.append(_key(sent.task))
            self._notify()

    async def _ask_to_cancel(self, sent: _Sent) -> None:
        payload = {"job_id": sent.task.job_id, "attempt": sent.task.attempt}
        call = self._connection.call(sent.instance, CANCEL, payload)
        try:
            async with contextlib.aclosing(call) as items:
                async for _ in items:
                    pass
        except KinemaError as exc:  # the caller asks again, and a worker that is gone runs nothing
            log.info("a cancel did not reach its worker", job_id=sent.task.job_id, reason=exc.message)

    async def _watch(self) -> None:
        self._connection = await self._connect()
        try:
            while True:
                self._instances = self._connection.instances()
                for instance in self._instances:
                    self._spawn(f"info of {instance}", partial(self._keep, instance))
                await self._connection.wait_for_change(_LOOK_AGAIN_S)
        finally:
            await self._connection.close()

    async def _keep(self, instance: int) -> None:
        """Listen to a worker while discovery lists it, and after that while it answers."""
        while instance in self._instances:
            wait_s = _RETRY_S
            try:
                await self._listen(instance)
            except KinemaError as exc:
                log.debug("a worker does not speak", instance=instance, reason=exc.message)
            except (KeyError, TypeError, ValueError) as exc:
                log.warning("a worker is not understood; is it of another version?", instance=instance, reason=str(exc))
                wait_s = _NOT_UNDERSTOOD_S
            finally:
                self._forget_member(instance)
            await asyncio.sleep(wait_s)

    async def _listen(self, instance: int) -> None:
        call = self._connection.call(instance, INFO, {}, silence_s=self._info_silence_s)
        async with contextlib.aclosing(call) as items:
            async for said in items:
                self._hear(_Member.read(instance, said, self._capabilities_of(said["capabilities"])))

    def _capabilities_of(self, said: Payload) -> Capabilities:
        """What workers say of themselves, read once for all that say the same, each time they say it."""
        for known, capabilities in self._known_capabilities:
            if known == said:
                return capabilities
        capabilities = Capabilities.model_validate(said)
        self._known_capabilities.appendleft((said, capabilities))
        return capabilities

    def _hear(self, member: _Member) -> None:
        before = self._members.get(member.instance)
        self._members[member.instance] = member
        if before is None:
            self._instances_of[member.info.worker_id].append(member.instance)
        else:
            self._leave_to_others(member, before.counted - member.counted)
        self._show(member.info.worker_id)
        self._models.update(member.info.capabilities.names)
        if before is None:
            log.info("a worker joined", **_described(member))
        if before is None or before.admission != member.admission:
            self._notify()

    def _leave_to_others(self, member: _Member, freed: frozenset[_TaskKey]) -> None:
        own = {_key(sent.task) for sent in self._sent} if freed else set()
        member.left_to_others = sum(key not in own and key not in self._ended for key in freed)
        if member.left_to_others:
            courtesy_s = random.uniform(*_COURTESY_S)  # noqa: S311 - nobody gains by guessing it
            asyncio.get_running_loop().call_later(courtesy_s, self._end_courtesy, member)

    def _end_courtesy(self, member: _Member) -> None:
        member.left_to_others = 0
        self._show(member.info.worker_id)
        self._notify()

    def _forget_member(self, instance: int) -> None:
        member = self._members.pop(instance, None)
        if member is not None:
            self._instances_of[member.info.worker_id].remove(instance)
            self._show(member.info.worker_id)
            log.info("a worker left", **_described(member))
            self._notify()

    def _avoid(self, instance: int) -> None:
        member = self._members.get(instance)
        if member is not None:
            loop = asyncio.get_running_loop()
            member.avoided_until = loop.time() + _AVOIDED_S
            self._show(member.info.worker_id)
            loop.call_at(member.avoided_until, self._show, member.info.worker_id)

    def _show(self, worker_id: str) -> None:
        """Note what has changed of this worker."""
        member = self._latest(worker_id)
        if member is None:
            self._workers.pop(worker_id, None)
            self._instances_of.pop(worker_id, None)
        else:
            self._workers[worker_id] = member.now(self._sent_to(worker_id))

    def _instance_of(self, worker_id: str) -> int:
        """The worker by its latest registration. Raises NoWorker when it is not present or admits nothing more."""
        member = self._latest(worker_id)
        if member is None or member.now(self._sent_to(worker_id)).free_slots < 1:
            raise NoWorker(f"worker {worker_id} {'is not here' if member is None else 'takes no more'}")
        return member.instance

    def _latest(self, worker_id: str) -> _Member | None:
        """The worker by its latest registration; None when it is not present."""
        instances = self._instances_of.get(worker_id)
        return self._members[instances[-1]] if instances else None

    def _sent_to(self, worker_id: str) -> Sequence[Task]:
        return [sent.task for sent in self._sent if sent.worker_id == worker_id]

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _spawn(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run it in the background, unless it is already running."""
        if name not in self._tasks:
            self._tasks[name] = asyncio.create_task(work(), name=name)
            self._tasks[name].add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task.get_name()]
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.error("a part of the cluster ended unexpectedly", part=task.get_name(), exc_info=exc)


async def _read_to_the_end(items: AsyncGenerator[Payload, None]) -> None:
    """Read the stream to its end: a call that is left before its end is stopped, and the worker would see a cancel."""
    with contextlib.suppress(KinemaError, TimeoutError):
        async with asyncio.timeout(_END_S):
            async for _ in items:
                pass


def _key(task: Task) -> _TaskKey:
    return task.job_id, task.attempt


def _described(member: _Member) -> dict[str, str]:
    return {
        "worker_id": member.info.worker_id,
        "model": member.info.capabilities.model,
        "device": member.info.device,
        "version": member.info.version,
    }
