"""The sender of webhooks, against receivers on this machine."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from email.utils import formatdate
from pathlib import Path

import pytest
import structlog
from pydantic import SecretStr

from kinema.errors import ConfigError, WebhookFailed
from kinema.jobs.sql import SqlJobStore
from kinema.jobs.store import QueueLimits
from kinema.jobs.webhook_store import EVENT_TYPES, SqlWebhookStore, WebhookEndpoint
from kinema.service import webhooks as sender_module
from kinema.service.outbound import PublicTransport
from kinema.service.webhooks import Webhooks, check_settings, retry_delay_s, signed_headers
from kinema.settings import WebhookSettings
from tests.receiver import Received, Receiver, accept, is_signed, receiving, status
from tests.serving import make_job, until

PRIVATE = WebhookSettings(allow_private=True)
WHSEC = "whsec_" + base64.b64encode(b"k" * 24).decode()


class Clock:
    """Goes on by itself, and further when it is moved."""

    def __init__(self) -> None:
        self.moved_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.moved_s


class Parts:
    """A store of jobs, one of webhooks, and senders on them."""

    def __init__(self, jobs: SqlJobStore, clock: Clock, stack: AsyncExitStack) -> None:
        self.jobs = jobs
        self.clock = clock
        self.store = SqlWebhookStore(jobs.database, clock)
        self._stack = stack

    async def start(self, settings: WebhookSettings = PRIVATE, transport: PublicTransport | None = None) -> Webhooks:
        sender = Webhooks(self.store, settings, clock=self.clock, transport=transport, poll_s=0.01)
        self._stack.push_async_callback(sender.stop)
        await sender.start()
        return sender

    async def register(self, url: str) -> WebhookEndpoint:
        return await self.store.create("", "n", url, EVENT_TYPES)

    async def end_job(self) -> str:
        job = await self.jobs.create(make_job(), limits=QueueLimits())
        await self.jobs.request_cancel(job.id)
        return job.id

    async def waiting(self) -> int:
        return int(await self.ask("SELECT count(*) FROM webhook_deliveries"))

    async def ask(self, query: str) -> int:
        return await self.jobs.database.read(lambda connection: connection.exec_driver_sql(query).scalar_one())

    async def rename(self, table: str, name: str) -> None:
        statement = f"ALTER TABLE {table} RENAME TO {name}"
        await self.jobs.database.write(lambda connection: connection.exec_driver_sql(statement) and None)

    async def until_waiting(self, count: int) -> None:
        await self._until("SELECT count(*) = {count} FROM webhook_deliveries", count=count)

    async def until_postponed(self, attempts: int) -> None:
        """A message has failed so often, and waits for its next attempt: it is due sooner than its lease would end."""
        query = "SELECT count(*) FROM webhook_deliveries WHERE attempts = {attempts} AND next_at < {soon}"
        await self._until(query, attempts=attempts, soon=self.clock() + 50)

    async def until_found(self, query: str) -> None:
        await self._until(query)

    async def _until(self, query: str, **values: float) -> None:
        async with asyncio.timeout(20):
            while not await self.ask(query.format(**values)):  # noqa: ASYNC110 - other threads bring it about
                await asyncio.sleep(0.005)


@asynccontextmanager
async def parts_on(url: str) -> AsyncIterator[Parts]:
    clock = Clock()
    async with AsyncExitStack() as stack:
        jobs = await SqlJobStore.open(url, clock)
        stack.push_async_callback(jobs.close)
        yield Parts(jobs, clock, stack)


@pytest.fixture
async def parts() -> AsyncIterator[Parts]:
    async with parts_on("sqlite://") as parts:
        yield parts


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


async def never(_received: Received) -> bytes:
    await asyncio.Event().wait()
    raise AssertionError


async def test_a_message_is_signed_and_delivered_once(parts: Parts, receiver: Receiver) -> None:
    """The bytes that were signed are the bytes that came, to the URL with its query; then it is forgotten."""
    endpoint = await parts.register(receiver.url)
    await parts.start()
    job_id = await parts.end_job()
    await parts.until_waiting(0)
    (received,) = receiver.received
    assert received.target == "/hook?a=1"
    assert received.headers["content-type"] == "application/json"
    assert is_signed(received, endpoint.secret)
    assert abs(int(received.headers["webhook-timestamp"]) - time.time()) < 5
    assert (received.event["type"], received.event["data"]) == ("video.failed", {"id": job_id})


@pytest.mark.parametrize("secret", [WHSEC, "plain text, with ünicode"])
async def test_the_settings_endpoint_hears_of_every_job(parts: Parts, receiver: Receiver, secret: str) -> None:
    """Signed with either form of secret."""
    await parts.start(WebhookSettings(url=receiver.url, secret=SecretStr(secret), allow_private=True))
    await parts.end_job()
    await until(lambda: receiver.received)
    assert is_signed(receiver.received[0], secret)


@pytest.mark.parametrize(
    "answer",
    [
        status(500),
        status(404),
        status(301, "location: /elsewhere"),
        status(307, "location: /elsewhere"),
    ],
)
async def test_anything_but_2xx_is_a_failure(
    parts: Parts, receiver: Receiver, answer: Callable[[Received], Awaitable[bytes]]
) -> None:
    """A redirect too, which is not followed; the next attempt has the same id and bytes and a signature of its time."""
    endpoint = await parts.register(receiver.url)
    receiver.answer = answer
    await parts.start()
    await parts.end_job()
    await parts.until_postponed(1)
    receiver.answer = accept
    parts.clock.moved_s += 60
    await parts.until_waiting(0)
    first, second = receiver.received
    assert (first.id, first.body, first.target) == (second.id, second.body, second.target)
    assert int(second.headers["webhook-timestamp"]) - int(first.headers["webhook-timestamp"]) >= 60
    assert is_signed(first, endpoint.secret)
    assert is_signed(second, endpoint.secret)


async def test_an_endpoint_that_is_gone_gets_the_message_no_more(parts: Parts, receiver: Receiver) -> None:
    """410 ends that message; the next one is another matter."""
    await parts.register(receiver.url)
    receiver.answer = status(410)
    await parts.start()
    await parts.end_job()
    await parts.until_waiting(0)
    assert len(receiver.received) == 1
    receiver.answer = accept
    await parts.end_job()
    await until(lambda: len(receiver.received) == 2)


@pytest.mark.parametrize(
    ("code", "retry_after", "at_least_s", "at_most_s"),
    [
        (503, "900", 890, 930),
        (429, "900", 890, 930),
        (429, "DATE", 880, 930),
        (503, "999999999", 3590, 3630),
        (503, "9" * 5000, 3590, 3630),
        (503, "1", 3, 40),
        (503, "-900", 3, 40),
        (503, "soon", 3, 40),
        (503, "Mon, 99 Nov 99999 99:99:99 GMT", 3, 40),
        (500, "900", 3, 40),
    ],
)
async def test_an_endpoint_may_say_when_to_come_again(
    parts: Parts, receiver: Receiver, code: int, retry_after: str, at_least_s: float, at_most_s: float
) -> None:
    """With 429 and 503, in seconds or as a date, up to the longest back-off; never sooner than without it.

    The seconds count from the end of the job, some before the answer.
    """
    await parts.register(receiver.url)
    said = formatdate(time.time() + 900, usegmt=True) if retry_after == "DATE" else retry_after
    receiver.answer = status(code, f"retry-after: {said}")
    await parts.start()
    await parts.end_job()
    await parts.until_found(
        f"SELECT count(*) FROM webhook_deliveries WHERE next_at - created_at BETWEEN {at_least_s} AND {at_most_s}"
    )


async def test_a_receiver_that_is_away_is_tried_until_it_is_back(parts: Parts) -> None:
    """No connection, and one that closes without an answer."""
    async with receiving() as receiver:
        port = receiver.port
    await parts.register(receiver.url)
    await parts.start()
    await parts.end_job()
    await parts.until_postponed(1)

    async def hang_up(_received: Received) -> bytes:
        return b""

    async with receiving(port) as receiver:
        receiver.answer = hang_up
        parts.clock.moved_s += 60
        await parts.until_postponed(2)
        receiver.answer = accept
        parts.clock.moved_s += 60
        await parts.until_waiting(0)
        assert len({received.id for received in receiver.received}) == 1


async def test_an_undelivered_message_is_given_up(parts: Parts, receiver: Receiver) -> None:
    """With the attempt at the end of its time; before that it waits."""
    await parts.register(receiver.url)
    receiver.answer = status(500)
    await parts.start(WebhookSettings(allow_private=True, give_up_after_h=1))
    await parts.end_job()
    await parts.until_postponed(1)
    parts.clock.moved_s += 3500
    await parts.until_postponed(2)
    parts.clock.moved_s += 150
    await parts.until_waiting(0)
    assert len(receiver.received) == 3


def test_the_back_off_doubles_up_to_an_hour() -> None:
    """Give or take a fifth."""
    for attempts, expected in [(1, 5), (2, 10), (5, 80), (10, 2560), (11, 3600), (5000, 3600)]:
        delays = [retry_delay_s(attempts) for _ in range(50)]
        assert all(0.8 * expected <= delay <= 1.2 * expected for delay in delays)
        assert len(set(delays)) > 1


async def test_a_slow_endpoint_does_not_hold_up_others(parts: Parts) -> None:
    """It has two of the places for sending, however many messages wait for it."""
    async with receiving() as slow, receiving() as quick:
        slow.answer = never
        await parts.register(slow.url)
        for _ in range(5):
            await parts.end_job()
        await parts.start()
        await until(lambda: len(slow.received) == 2)
        await parts.register(quick.url)
        for _ in range(5):
            await parts.end_job()
        await until(lambda: len(quick.received) == 5)
        assert len(slow.received) == 2


async def test_an_answer_that_does_not_come_is_a_failure(
    parts: Parts, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the timeout."""
    monkeypatch.setattr(sender_module, "_TIMEOUT_S", 0.3)
    receiver.answer = never
    await parts.register(receiver.url)
    await parts.start()
    await parts.end_job()
    await parts.until_postponed(1)


async def test_the_body_of_an_answer_is_not_read(parts: Parts, receiver: Receiver) -> None:
    """One that says it is huge, and never comes, is an answer all the same."""

    async def huge(_received: Received) -> bytes:
        return b"HTTP/1.1 200 OK\r\ncontent-length: 100000000000\r\n\r\nx"

    receiver.answer = huge
    await parts.register(receiver.url)
    await parts.start()
    await parts.end_job()
    await parts.until_waiting(0)


async def test_two_senders_deliver_once(parts: Parts, receiver: Receiver) -> None:
    """Each message is claimed by one of them."""
    await parts.register(receiver.url)
    await parts.start()
    await parts.start()
    for _ in range(20):
        await parts.end_job()
    await parts.until_waiting(0)
    assert len(receiver.received) == len({received.id for received in receiver.received}) == 20


async def test_a_stop_hands_back_what_has_no_answer(
    parts: Parts, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next sender need not wait for a lease to run out."""
    monkeypatch.setattr(sender_module, "_STOP_S", 0.05)
    receiver.answer = never
    await parts.register(receiver.url)
    first = await parts.start()
    await parts.end_job()
    await until(lambda: receiver.received)
    await first.stop()
    receiver.answer = accept
    await parts.start()
    await parts.until_waiting(0)
    assert len(receiver.received) == 2


async def test_a_stop_that_comes_with_news_is_a_stop(parts: Parts) -> None:
    """The loop hears of both in the same turn, and ends."""
    sender = await parts.start()
    await until(lambda: sender._wake._waiters)
    sender._wake.set()
    async with asyncio.timeout(5):
        await sender.stop()


async def test_messages_survive_a_restart(tmp_path: Path, receiver: Receiver) -> None:
    """Those that nobody has tried, and those that failed before."""
    url = f"sqlite:///{tmp_path / 'kinema.db'}"
    receiver.answer = status(503)
    async with parts_on(url) as parts:
        await parts.register(receiver.url)
        sender = await parts.start()
        await parts.end_job()
        await parts.until_postponed(1)
        await sender.stop()
        await parts.end_job()
    receiver.answer = accept
    async with parts_on(url) as parts:
        parts.clock.moved_s += 60
        await parts.start()
        await parts.until_waiting(0)
    assert len({received.id for received in receiver.received}) == 2


async def test_a_sender_that_died_leaves_its_message_to_others(parts: Parts, receiver: Receiver) -> None:
    """When its lease has run out."""
    await parts.register(receiver.url)
    await parts.end_job()
    assert await parts.store.claim(60) is not None
    await parts.start()
    parts.clock.moved_s += 61
    await until(lambda: receiver.received)


async def test_a_deleted_endpoint_gets_nothing_more(parts: Parts, receiver: Receiver) -> None:
    """What failed before is not tried again."""
    endpoint = await parts.register(receiver.url)
    receiver.answer = status(500)
    await parts.start()
    await parts.end_job()
    await parts.until_postponed(1)
    await parts.store.delete("", endpoint.id)
    assert await parts.waiting() == 0


async def test_a_name_that_became_private_is_not_sent_to(parts: Parts, receiver: Receiver) -> None:
    """It was public when the endpoint was registered; the message waits, in case that it is again."""

    async def resolve(_host: str, _port: int) -> Sequence[str]:
        return ["127.0.0.1"]

    await parts.register(f"http://hooks.example:{receiver.port}/")
    await parts.start(WebhookSettings(), PublicTransport(resolve=resolve))
    await parts.end_job()
    await parts.until_postponed(1)
    assert receiver.received == []


async def test_a_test_tells_the_status(parts: Parts, receiver: Receiver) -> None:
    """Also one that is no success; no answer at all is WebhookFailed, in a sentence."""
    endpoint = await parts.register(receiver.url)
    sender = await parts.start()
    receiver.answer = status(418)
    assert await sender.test("", endpoint.id, "video.completed") == 418
    assert is_signed(receiver.received[0], endpoint.secret)
    gone = await parts.register("http://127.0.0.1:1/")
    with pytest.raises(WebhookFailed, match="did not answer"):
        await sender.test("", gone.id, "video.completed")


async def test_a_rotated_endpoint_signs_with_both_secrets(parts: Parts, receiver: Receiver) -> None:
    """While the old one was asked to stay."""
    old = await parts.register(receiver.url)
    new = await parts.store.rotate("", old.id, keep_old_s=3600)
    await parts.start()
    await parts.end_job()
    await until(lambda: receiver.received)
    assert is_signed(receiver.received[0], old.secret)
    assert is_signed(receiver.received[0], new.secret)


def test_the_signature_is_that_of_the_standard() -> None:
    """The example of the Standard Webhooks libraries."""
    body = b'{"test": 2432232314}'
    headers = signed_headers(
        "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body, ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(
    ("url", "secret", "says"),
    [
        ("https://example.com/", None, "without webhooks.secret"),
        ("https://example.com/", "", "without webhooks.secret"),
        ("https://example.com/", "whsec_%%%", "not base64"),
        ("https://example.com/", "whsec_abc", "not base64"),
        ("https://example.com/", "whsec_", "not base64"),
        ("https://example.com/", "x" * 256, "at most 255"),
        ("example.com", "s", r"webhooks\.url must be"),
        ("https://me:pw@example.com/", "s", r"webhooks\.url must not have"),
    ],
)
def test_settings_that_cannot_work_stop_the_start(url: str, secret: str | None, says: str) -> None:
    """The sentence names the key and does not show the secret."""
    settings = WebhookSettings(url=url, secret=None if secret is None else SecretStr(secret))
    with pytest.raises(ConfigError, match=says):
        check_settings(settings)


async def test_a_private_url_in_the_settings_stops_the_start(parts: Parts) -> None:
    """Unless private addresses are allowed; a host that is not known yet does not."""
    private = WebhookSettings(url="http://127.0.0.1:1/", secret=SecretStr("s"))
    with pytest.raises(ConfigError, match=r"webhooks\.allow_private"):
        await parts.start(private)
    await parts.start(WebhookSettings(url="http://nowhere.invalid/", secret=SecretStr("s")))


async def test_a_database_that_is_away_does_not_end_the_sender(parts: Parts, receiver: Receiver) -> None:
    """It goes on when the database is back."""
    await parts.register(receiver.url)
    await parts.start()
    with structlog.testing.capture_logs() as logs:
        await parts.rename("webhook_deliveries", "away")
        await until(lambda: any("cannot reach" in entry["event"] for entry in logs))
    await parts.rename("away", "webhook_deliveries")
    await parts.end_job()
    await until(lambda: receiver.received)
