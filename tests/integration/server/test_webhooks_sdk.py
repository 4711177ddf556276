"""Webhooks as the OpenAI SDK registers them and verifies what comes."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator

import httpx2
import openai
import pytest
from pydantic import SecretStr

from kinema.settings import WebhookSettings
from tests.receiver import Received, Receiver, receiving
from tests.serving import SMALL, Serving, serving, until

CLIENT = openai.OpenAI(api_key="unused")


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


def sdk(it: Serving) -> openai.AsyncOpenAI:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=it.app))
    return openai.AsyncOpenAI(
        api_key="unused", base_url="http://test/v1", http_client=http, _strict_response_validation=True
    )


def verified_type(received: Received, secret: str) -> str:
    """The event's type, from the SDK. Raises when the signature is not right."""
    CLIENT.webhooks.verify_signature(received.body, received.headers, secret=secret)
    return str(CLIENT.webhooks.unwrap(received.body, received.headers, secret=secret).type)


@pytest.mark.parametrize("secret", ["whsec_" + base64.b64encode(b"k" * 32).decode(), "plain text"])
async def test_what_is_delivered_verifies(receiver: Receiver, secret: str) -> None:
    """With both forms of secret, and with no other."""
    settings = WebhookSettings(url=receiver.url, secret=SecretStr(secret), allow_private=True)
    async with serving(webhooks=settings) as it:
        video = (await it.client.post("/v1/videos/generations", json=SMALL)).json()
        await until(lambda: receiver.received)
        (received,) = receiver.received
        assert verified_type(received, secret) == "video.completed"
        event = CLIENT.webhooks.unwrap(received.body, received.headers, secret=secret)
        assert event.data.id == video["id"]
        with pytest.raises(openai.InvalidWebhookSignatureError):
            verified_type(received, "another")


async def test_the_sdk_manages_endpoints(receiver: Receiver) -> None:
    """Every call of ``client.webhooks``, with answers that the SDK checks strictly."""
    async with serving(webhooks=WebhookSettings(allow_private=True)) as it, sdk(it) as client:
        assert (await client.webhooks.event_types.list()).data == ["video.completed", "video.failed"]
        made = await client.webhooks.create(
            name="mine", url=receiver.url, event_types=["video.completed", "video.failed"]
        )
        for number in range(3):
            await client.webhooks.create(name=str(number), url=receiver.url, event_types=["video.failed"])
        listed = [endpoint.id async for endpoint in client.webhooks.list(limit=2)]
        assert len(listed) == 4
        assert (await client.webhooks.retrieve(made.id)).signing_secret_hint == made.signing_secret_hint
        renamed = await client.webhooks.update(made.id, name="new")
        assert (renamed.name, renamed.url) == ("new", receiver.url)
        result = await client.webhooks.test(made.id, event_type="video.failed")
        assert (result.status_code, result.success) == (200, True)
        assert verified_type(receiver.received[0], made.signing_secret) == "video.failed"
        rotated = await client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
        await client.webhooks.test(made.id, event_type="video.completed")
        for secret in (made.signing_secret, rotated.signing_secret):
            assert verified_type(receiver.received[1], secret) == "video.completed"
        assert (await client.webhooks.delete(made.id)).deleted is True
        with pytest.raises(openai.NotFoundError):
            await client.webhooks.retrieve(made.id)
