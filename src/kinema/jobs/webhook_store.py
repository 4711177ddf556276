"""The webhook endpoints, and the messages that are still to be delivered.

A message is written in the transaction that ends its job, so that there is never one without the other. It is deleted
when it was delivered or given up. This file does not know how a message is signed or sent.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from base64 import b64encode
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, RowMapping, and_, delete, exists, func, insert, or_, select, update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from kinema.errors import InvalidRequest, WebhookNotFound
from kinema.job import Job, JobStatus
from kinema.jobs.database import AdvisoryLock, Database, clock_of, take_lock
from kinema.jobs.schema import webhook_deliveries as deliveries
from kinema.jobs.schema import webhook_endpoints as endpoints

COMPLETED = "video.completed"
# Also for a cancelled job: the API shows it as failed, and OpenAI has no event for it.
FAILED = "video.failed"
EVENT_TYPES = (COMPLETED, FAILED)

# One integration needs one endpoint. Every ended job is a message to each endpoint of its key.
MAX_ENDPOINTS_PER_KEY = 20
# The id of the endpoint of the settings. It is fixed, so that servers with the same settings use the same row.
SHARED_ID = "we_settings"
# As long as SHA-256's output, which is what Standard Webhooks recommends at least.
_SECRET_BYTES = 32
_ENDPOINT_ID = re.compile(r"we_[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class WebhookEndpoint:
    """Where messages go, and the secrets that sign them. Without ``key_id`` it gets messages about all jobs.

    Times are as in Job.
    """

    id: str
    key_id: str | None
    name: str
    url: str
    secret: str = field(repr=False)
    old_secret: str | None = field(repr=False)
    old_secret_until: float | None
    event_types: tuple[str, ...]
    created_at: float
    updated_at: float

    def secrets(self, now: float) -> tuple[str, ...]:
        """The secrets that sign a message: the present one and, for some time after a rotation, the one before it."""
        is_old_valid = self.old_secret_until is not None and now < self.old_secret_until
        return (self.secret, self.old_secret) if self.old_secret and is_old_valid else (self.secret,)


@dataclass(frozen=True, slots=True)
class WebhookDelivery:
    """A message to one endpoint, with the number of the attempt that it was claimed for, counted from 1."""

    id: str
    endpoint: WebhookEndpoint
    payload: str
    attempts: int
    created_at: float


class SqlWebhookStore:
    """Endpoints and deliveries in the job database. Every method may raise StoreUnavailable."""

    def __init__(self, database: Database, clock: Callable[[], float] | None = None) -> None:
        self._database = database
        self._clock = clock or time.time
        # For leases: the time of the database, in statements.
        self._now = database.now if clock is None else clock_of(clock)

    async def create(self, key_id: str, name: str, url: str, event_types: Sequence[str]) -> WebhookEndpoint:
        """Store a new endpoint with a new secret. Raises InvalidRequest when the key has too many endpoints."""

        def transaction(connection: Connection) -> WebhookEndpoint:
            take_lock(connection, AdvisoryLock.ENDPOINTS, key_id)  # or two servers could both see room for one more
            query = select(func.count()).select_from(endpoints).where(endpoints.c.key_id == key_id)
            if connection.execute(query).scalar_one() >= MAX_ENDPOINTS_PER_KEY:
                raise InvalidRequest(
                    f"there are {MAX_ENDPOINTS_PER_KEY} webhook endpoints, as many as may be; delete one"
                )
            now = self._clock()
            values = {"id": _new_id("we", now), "key_id": key_id, "created_at": now, "secret": _new_secret()}
            values |= _changes(now, name=name, url=url, event_types=event_types)
            row = connection.execute(insert(endpoints).values(**values).returning(endpoints))
            return _endpoint(row.mappings().one())

        return await self._database.write(transaction)

    async def get(self, key_id: str, endpoint_id: str) -> WebhookEndpoint:
        """The endpoint. Raises WebhookNotFound, also for an endpoint of another key."""
        return await self._database.read(lambda connection: _find(connection, key_id, endpoint_id))

    async def list_page(self, key_id: str, *, after: str | None, limit: int) -> tuple[Sequence[WebhookEndpoint], bool]:
        """A page of the key's endpoints after the given one, the newest first, and whether there are more."""

        def transaction(connection: Connection) -> list[WebhookEndpoint]:
            query = select(endpoints).where(endpoints.c.key_id == key_id)
            if after is not None:
                query = query.where(endpoints.c.id < after)
            rows = connection.execute(query.order_by(endpoints.c.id.desc()).limit(limit + 1))
            return [_endpoint(row) for row in rows.mappings()]

        found = await self._database.read(transaction)
        return found[:limit], len(found) > limit

    async def update(
        self,
        key_id: str,
        endpoint_id: str,
        *,
        name: str | None = None,
        url: str | None = None,
        event_types: Sequence[str] | None = None,
    ) -> WebhookEndpoint:
        """Change the given fields; waiting messages go to the new URL. Raises WebhookNotFound."""

        def transaction(connection: Connection) -> WebhookEndpoint:
            known = _find(connection, key_id, endpoint_id)
            changes = _changes(
                self._clock(),
                name=name or known.name,
                url=url or known.url,
                event_types=event_types or known.event_types,
            )
            if all(getattr(known, column) == value for column, value in changes.items() if column != "updated_at"):
                return known
            return _change(connection, key_id, endpoint_id, changes)

        return await self._database.write(transaction)

    async def rotate(self, key_id: str, endpoint_id: str, *, keep_old_s: float = 0) -> WebhookEndpoint:
        """Give it a new secret; the old one also signs messages for ``keep_old_s`` more. Raises WebhookNotFound."""

        def transaction(connection: Connection) -> WebhookEndpoint:
            now = self._clock()
            known = _find(connection, key_id, endpoint_id)
            changes: dict[str, Any] = {"secret": _new_secret(), "updated_at": now}
            changes |= {"old_secret": None, "old_secret_until": None}
            if keep_old_s > 0:
                changes |= {"old_secret": known.secret, "old_secret_until": now + keep_old_s}
            return _change(connection, key_id, endpoint_id, changes)

        return await self._database.write(transaction)

    async def delete(self, key_id: str, endpoint_id: str) -> None:
        """Delete the endpoint and the messages that wait for it. Raises WebhookNotFound."""

        def transaction(connection: Connection) -> None:
            _find(connection, key_id, endpoint_id)
            connection.execute(delete(endpoints).where(_is_own(key_id, endpoint_id)))

        await self._database.write(transaction)

    async def set_shared(self, url: str | None, secret: str | None) -> None:
        """Set the endpoint that gets the messages of every key's jobs. None removes it and its messages."""

        def transaction(connection: Connection) -> None:
            is_shared = endpoints.c.id == SHARED_ID
            if url is None or secret is None:
                connection.execute(delete(endpoints).where(is_shared))
                return
            now = self._clock()
            values = _changes(now, name="settings", url=url, event_types=EVENT_TYPES) | {"secret": secret}
            change = update(endpoints).where(is_shared).values(**values)
            if connection.execute(change).rowcount:
                return
            try:
                with connection.begin_nested():
                    connection.execute(insert(endpoints).values(**values, id=SHARED_ID, created_at=now))
            except IntegrityError:  # another server that starts now was first
                connection.execute(change)

        await self._database.write(transaction)

    async def claim(self, lease_s: float, busy: Collection[str] = ()) -> WebhookDelivery | None:
        """Take the message that is due longest, except for endpoints in ``busy``; it is due again after ``lease_s``.

        One atomic statement takes it, so only one server makes each attempt. If the server dies, the time runs out.
        """
        is_due = and_(deliveries.c.next_at <= self._now, deliveries.c.endpoint_id.not_in(busy))

        def is_any_due(connection: Connection) -> bool:
            return bool((connection.execute(select(exists().where(is_due)))).scalar_one())

        def transaction(connection: Connection) -> WebhookDelivery | None:
            oldest = select(deliveries.c.id).where(is_due).order_by(deliveries.c.next_at, deliveries.c.id).limit(1)
            claim = (
                update(deliveries)
                .where(deliveries.c.id == oldest.with_for_update(skip_locked=True).scalar_subquery())
                .values(next_at=self._now + lease_s, attempts=deliveries.c.attempts + 1)
                .returning(deliveries)
            )
            row = connection.execute(claim).mappings().first()
            return None if row is None else _delivery(connection, row)

        # Read first: an idle server must not take the write lock every second.
        return await self._database.write(transaction) if await self._database.read(is_any_due) else None

    async def forget(self, delivery: WebhookDelivery) -> None:
        """Delete the message: it was delivered or given up."""

        def transaction(connection: Connection) -> None:
            connection.execute(delete(deliveries).where(deliveries.c.id == delivery.id))

        await self._database.write(transaction)

    async def postpone(self, delivery: WebhookDelivery, until: float) -> None:
        """Make the message due at that time, unless another server has claimed it since."""
        wait_s = until - self._clock()

        def transaction(connection: Connection) -> None:
            is_held = and_(deliveries.c.id == delivery.id, deliveries.c.attempts == delivery.attempts)
            connection.execute(update(deliveries).where(is_held).values(next_at=self._now + wait_s))

        await self._database.write(transaction)


def enqueue(connection: Connection, job: Job, now: float, due_at: ColumnElement[float]) -> None:
    """Write a message about the ended job for every endpoint that wants one, within the caller's transaction.

    ``now`` is the time for those who read it, ``due_at`` the time of the database.
    """
    event_type = COMPLETED if job.status is JobStatus.COMPLETED else FAILED
    is_told = or_(endpoints.c.key_id == job.key_id, endpoints.c.key_id.is_(None))
    # Lock the endpoints until the messages are written: the end of a job must not fail because an endpoint is deleted.
    query = select(endpoints.c.id, endpoints.c.event_types).where(is_told).with_for_update(read=True, key_share=True)
    told = [row.id for row in connection.execute(query) if event_type in row.event_types]
    if told:
        payload = event_payload(event_type, job.id, now)
        common = {"payload": payload, "attempts": 0, "created_at": now}
        rows = [{"id": _new_id("wh", now), "endpoint_id": endpoint_id, **common} for endpoint_id in told]
        connection.execute(insert(deliveries).values(next_at=due_at), rows)


def event_payload(event_type: str, job_id: str, now: float) -> str:
    """The message as it is signed and sent. It has no data of the video; its owner can ask for these."""
    event = {
        "id": _new_id("evt", now),
        "object": "event",
        "created_at": int(now),
        "type": event_type,
        "data": {"id": job_id},
    }
    return json.dumps(event, separators=(",", ":"))


def is_endpoint_id(text: str) -> bool:
    """Whether the text has the form of an id that ``create`` makes."""
    return _ENDPOINT_ID.fullmatch(text) is not None


def _new_id(prefix: str, now: float) -> str:
    """An id that nobody can guess and that sorts by age, like that of a job."""
    return f"{prefix}_{int(now * 1000):012x}{secrets.token_hex(10)}"


def _new_secret() -> str:
    return "whsec_" + b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def _changes(now: float, *, name: str, url: str, event_types: Sequence[str]) -> dict[str, Any]:
    return {"name": name, "url": url, "event_types": tuple(event_types), "updated_at": now}


def _endpoint(row: RowMapping) -> WebhookEndpoint:
    return WebhookEndpoint(**{**row, "event_types": tuple(row["event_types"])})


def _is_own(key_id: str, endpoint_id: str) -> ColumnElement[bool]:
    return and_(endpoints.c.id == endpoint_id, endpoints.c.key_id == key_id)


def _find(connection: Connection, key_id: str, endpoint_id: str) -> WebhookEndpoint:
    if not is_endpoint_id(endpoint_id):  # what no database should have to compare, such as NUL characters
        raise _not_found(endpoint_id)
    query = select(endpoints).where(_is_own(key_id, endpoint_id))
    row = connection.execute(query).mappings().first()
    if row is None:
        raise _not_found(endpoint_id)
    return _endpoint(row)


def _change(connection: Connection, key_id: str, endpoint_id: str, changes: dict[str, Any]) -> WebhookEndpoint:
    change = update(endpoints).where(_is_own(key_id, endpoint_id)).values(**changes).returning(endpoints)
    row = connection.execute(change).mappings().first()
    if row is None:  # deleted since it was found
        raise _not_found(endpoint_id)
    return _endpoint(row)


def _delivery(connection: Connection, row: RowMapping) -> WebhookDelivery:
    query = select(endpoints).where(endpoints.c.id == row["endpoint_id"])
    endpoint = _endpoint(connection.execute(query).mappings().one())
    return WebhookDelivery(row["id"], endpoint, row["payload"], row["attempts"], row["created_at"])


def _not_found(endpoint_id: str) -> WebhookNotFound:
    return WebhookNotFound(f"no webhook endpoint {endpoint_id[:100]!r}")
