"""Tells other servers that a job has ended: takes due messages from the store, signs and sends them.

A message is sent until its endpoint answers 2xx or 410, or until it is too old, each time with the same id and a new
signature, by the server that has claimed it. So an endpoint may get a message twice, but never not at all. This file
knows no jobs; ``jobs/webhook_store.py`` writes the messages.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx
import structlog

from kinema import __version__
from kinema.errors import ConfigError, InvalidRequest, KinemaError, StoreUnavailable, WebhookFailed
from kinema.jobs.webhook_store import SqlWebhookStore, WebhookDelivery, WebhookEndpoint, event_payload
from kinema.service.outbound import PublicTransport, parse_url
from kinema.settings import WebhookSettings

log = structlog.get_logger(__name__)

# The time for an endpoint's whole answer. It should answer first and use the message afterwards.
_TIMEOUT_S = 10.0
# Shorter, so that a second address of the host can be tried in the same time.
_CONNECT_TIMEOUT_S = 4.0
# A message that a dead server had claimed is sent again after this time. It is well above the timeout, so two servers
# never send one message at the same time.
_LEASE_S = 60.0
# A slow endpoint delays its own messages and no others: even if all endpoints of one key are slow, at two messages
# each, places are left for other keys.
_MAX_SENDING = 64
_MAX_SENDING_PER_ENDPOINT = 2
# The wait after the n-th attempt: 5 s, 10 s, 20 s, ... up to an hour. Each is up to a fifth longer or shorter, so that
# an endpoint that comes back does not get all messages at once.
_FIRST_DELAY_S = 5.0
_MAX_DELAY_S = 3600.0
_JITTER = 0.2
# The statuses that may come with a Retry-After, and the one after which nothing is sent any more.
_LATER = (429, 503)
_GONE = 410
# A stop waits this long for answers; unanswered messages are sent again after the restart.
_STOP_S = 2.0
# The width of the database's column.
_MAX_SECRET_LENGTH = 255
_PREFIX = "whsec_"
# The id of a video in a test message; no such video exists.
_TEST_JOB_ID = "video_test"


@dataclass(frozen=True, slots=True)
class _Failure:
    """The reason why a message was not delivered. ``not_before`` is the earliest time at which the endpoint wants it
    again; after a failure that ``is_final`` it wants none."""

    reason: str
    not_before: float = 0.0
    is_final: bool = False


class Webhooks:
    """Sends messages from ``start`` to ``stop``. Several senders may share one store; each message has one at a
    time."""

    def __init__(
        self,
        store: SqlWebhookStore,
        settings: WebhookSettings,
        *,
        clock: Callable[[], float] = time.time,
        transport: PublicTransport | None = None,
        poll_s: float = 1.0,
    ) -> None:
        self.store = store
        self._settings = settings
        self._clock = clock
        self._poll_s = poll_s
        self._transport = transport or PublicTransport(allow_private=settings.allow_private)
        # trust_env is off: a proxy of the environment would look names up by itself.
        timeout = httpx.Timeout(_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
        self._client = httpx.AsyncClient(
            transport=self._transport, timeout=timeout, trust_env=False, follow_redirects=False
        )
        self._sending: dict[asyncio.Task[None], WebhookDelivery] = {}
        self._loop: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    async def start(self) -> None:
        """Begin to send. Raises ConfigError when the settings name an endpoint that cannot be used."""
        url, secret = check_settings(self._settings)
        if url is not None:
            await self._check_shared(url)
        await self.store.set_shared(url, secret)
        self._loop = asyncio.create_task(self._send_loop())

    async def stop(self) -> None:
        """Wait a little for answers. A message without an answer is due at once, for the next sender."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        sending = dict(self._sending)
        if sending:
            _, unfinished = await asyncio.wait(sending, timeout=_STOP_S)
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
            await self._hand_back([sending[task] for task in unfinished if task.cancelled()])
        await self._client.aclose()

    async def register(self, key_id: str, name: str, url: str, event_types: Sequence[str]) -> WebhookEndpoint:
        """Add an endpoint of a key. Raises InvalidRequest for a URL to which nothing may be sent, or for too many."""
        await self._check(url)
        return await self.store.create(key_id, name, url, event_types)

    async def update(
        self,
        key_id: str,
        endpoint_id: str,
        *,
        name: str | None = None,
        url: str | None = None,
        event_types: Sequence[str] | None = None,
    ) -> WebhookEndpoint:
        """Change an endpoint of a key. Raises WebhookNotFound, and InvalidRequest as ``register`` does."""
        await self.store.get(key_id, endpoint_id)
        if url is not None:
            await self._check(url)
        return await self.store.update(key_id, endpoint_id, name=name, url=url, event_types=event_types)

    async def test(self, key_id: str, endpoint_id: str, event_type: str) -> int:
        """Send an example now and return the status of the answer. Raises WebhookNotFound, WebhookFailed."""
        endpoint = await self.store.get(key_id, endpoint_id)
        payload = event_payload(event_type, _TEST_JOB_ID, self._clock())
        return (await self._post(endpoint, f"wh_test_{secrets.token_hex(10)}", payload)).status_code

    async def _check(self, url: str) -> None:
        await self._transport.addresses(parse_url(url))

    async def _check_shared(self, url: str) -> None:
        """Raise ConfigError for a private address that is not allowed. An unknown host does not stop the start, since
        the name service may only be unavailable."""
        found = await self._transport.known_addresses(parse_url(url))
        if not found:
            log.warning("the host of webhooks.url is not known; messages wait until it is")
        if not self._transport.may_send_to(found):
            raise ConfigError(
                "webhooks.url leads to a private address; name a public one, or set webhooks.allow_private"
            )

    async def _send_loop(self) -> None:
        while True:
            self._wake.clear()
            try:
                while (delivery := await self._claim()) is not None:
                    self._begin(delivery)
            except StoreUnavailable as exc:
                log.warning("cannot reach the job database for webhooks", reason=exc.message)
            except Exception:
                log.exception("sending webhooks failed")
            # Not wait_for: Python 3.11's loses a cancellation that comes together with the news.
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s):
                    await self._wake.wait()

    async def _claim(self) -> WebhookDelivery | None:
        """The next message that may be sent now; None when there is none, or too many are being sent."""
        if len(self._sending) >= _MAX_SENDING:
            return None
        counts = Counter(delivery.endpoint.id for delivery in self._sending.values())
        busy = [endpoint_id for endpoint_id, count in counts.items() if count >= _MAX_SENDING_PER_ENDPOINT]
        return await self.store.claim(_LEASE_S, busy)

    def _begin(self, delivery: WebhookDelivery) -> None:
        task = asyncio.create_task(self._deliver(delivery), name=f"webhook {delivery.id}")
        self._sending[task] = delivery
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        del self._sending[task]
        self._wake.set()

    async def _deliver(self, delivery: WebhookDelivery) -> None:
        """Send the message once, and record the result."""
        failure = await self._attempt(delivery)
        try:
            if failure is None:
                await self.store.forget(delivery)
            else:
                await self._after_failure(delivery, failure)
        except StoreUnavailable as exc:
            log.warning("a webhook's attempt was not recorded; it is sent again", id=delivery.id, reason=exc.message)

    async def _attempt(self, delivery: WebhookDelivery) -> _Failure | None:
        """Send the message once, and return why it was not delivered; None when it was."""
        try:
            answer = await self._post(delivery.endpoint, delivery.id, delivery.payload)
        except KinemaError as exc:
            return _Failure(exc.message)
        except Exception as exc:
            log.exception("a webhook failed unexpectedly", id=delivery.id)
            return _Failure(type(exc).__name__)
        return None if answer.is_success else _failure(answer, self._clock())

    async def _after_failure(self, delivery: WebhookDelivery, failure: _Failure) -> None:
        now, attempts = self._clock(), delivery.attempts
        last_at = delivery.created_at + self._settings.give_up_after_h * 3600
        told = {"id": delivery.id, "endpoint_id": delivery.endpoint.id, "attempts": attempts}
        told["reason"] = failure.reason
        if failure.is_final or now >= last_at:
            await self.store.forget(delivery)
            log.error("a webhook was given up", **told)
        else:
            next_at = max(now + retry_delay_s(attempts), failure.not_before)
            await self.store.postpone(delivery, min(next_at, last_at))
            log.warning("a webhook was not delivered yet", **told)

    async def _post(self, endpoint: WebhookEndpoint, message_id: str, payload: str) -> httpx.Response:
        """Send a message and return the answer's status and headers. Its body is not read. Raises WebhookFailed."""
        body, now = payload.encode(), self._clock()
        headers = signed_headers(message_id, int(now), body, endpoint.secrets(now))
        try:
            async with (
                asyncio.timeout(_TIMEOUT_S),
                self._client.stream("POST", endpoint.url, content=body, headers=headers) as answer,
            ):
                return answer
        except (TimeoutError, httpx.TimeoutException) as exc:
            raise WebhookFailed(f"the endpoint did not answer within {_TIMEOUT_S:g} s") from exc
        except InvalidRequest as exc:
            raise WebhookFailed(f"the endpoint's {exc.message}") from exc
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise WebhookFailed(f"the endpoint did not answer: {str(exc) or type(exc).__name__}") from exc

    async def _hand_back(self, cut_off: Sequence[WebhookDelivery]) -> None:
        try:
            for delivery in cut_off:
                await self.store.postpone(delivery, self._clock())
        except StoreUnavailable as exc:
            log.warning("webhooks were not handed back; their leases run out", reason=exc.message)


def check_settings(settings: WebhookSettings) -> tuple[str | None, str | None]:
    """The URL and the secret of the settings, or two times None. Raises ConfigError when they cannot be used."""
    if settings.url is None:
        return None, None
    try:
        parse_url(settings.url)
    except InvalidRequest as exc:
        raise ConfigError(f"webhooks.{exc.message}") from exc
    secret = settings.secret.get_secret_value() if settings.secret is not None else ""
    if not secret:
        raise ConfigError("webhooks.url is set without webhooks.secret; give whsec_ and base64, or plain text")
    if len(secret) > _MAX_SECRET_LENGTH:
        raise ConfigError(f"webhooks.secret is too long; at most {_MAX_SECRET_LENGTH} characters")
    try:
        has_key = bool(signing_key(secret))
    except ValueError:
        has_key = False
    if not has_key:
        raise ConfigError(
            f"webhooks.secret begins with {_PREFIX}, and what follows is not base64; give both, or plain text"
        )
    return settings.url, secret


def signing_key(secret: str) -> bytes:
    """The bytes of a secret, as the OpenAI SDK reads it: base64 after ``whsec_``, else the text itself.

    Raises ValueError when it is not base64.
    """
    if not secret.startswith(_PREFIX):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except binascii.Error as exc:
        raise ValueError("not base64") from exc


def signed_headers(message_id: str, timestamp: int, body: bytes, keys: Sequence[str]) -> dict[str, str]:
    """The headers of Standard Webhooks (standard-webhooks/spec), with a signature for each secret."""
    content = b".".join((message_id.encode(), str(timestamp).encode(), body))
    digests = [hmac.new(signing_key(secret), content, hashlib.sha256).digest() for secret in keys]
    return {
        "content-type": "application/json",
        "user-agent": f"Kinema/{__version__}",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests),
    }


def _failure(answer: httpx.Response, now: float) -> _Failure:
    """The failure that an answer without success means."""
    asked_s = _retry_after_s(answer.headers.get("retry-after", ""), now) if answer.status_code in _LATER else 0.0
    return _Failure(
        f"the endpoint answered {answer.status_code}",
        not_before=now + min(asked_s, _MAX_DELAY_S),
        is_final=answer.status_code == _GONE,
    )


def _retry_after_s(text: str, now: float) -> float:
    """The seconds in a Retry-After header, which has seconds or a date (RFC 9110, 10.2.3); 0 for any other text."""
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return parsedate_to_datetime(text).timestamp() - now
    except (ValueError, OverflowError):
        return 0.0


def retry_delay_s(attempts: int) -> float:
    """The wait after this number of attempts, drawn at random within its bounds."""
    delay = min(_FIRST_DELAY_S * 2.0 ** min(attempts - 1, 32), _MAX_DELAY_S)
    return delay * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - spread, not secrecy
