"""``/v1/webhook_endpoints``, as the ``client.webhooks`` of the OpenAI SDK calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Depends, Path, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from kinema.errors import InvalidRequest, Unauthorized, WebhookFailed, WebhookNotFound
from kinema.jobs.webhook_store import COMPLETED, EVENT_TYPES, WebhookEndpoint, is_endpoint_id
from kinema.request.bodies import Body
from kinema.request.fields import Flag, Text, Texts
from kinema.server.api import Caller, CallerParam, FormT, json_response
from kinema.server.description import answers, body_of, changes, reads, takes_body
from kinema.server.paging import After, Limit, Listed, Page, read_after, read_limit
from kinema.service.webhooks import Webhooks

# Enough for a URL of 2,048 characters, a name and a few types, even if every character is escaped.
_MAX_BODY_BYTES = 64 * 1024
_MAX_NAME_LENGTH = 255
_KEEP_OLD_S = 24 * 3600
_HINT_LENGTH = 4


class EndpointChangeBody(Body):
    """The body of ``POST /v1/webhook_endpoints/{id}``: the changes to an endpoint."""

    name: Text = Field(None, description=f"A name for people, of 1 to {_MAX_NAME_LENGTH} characters.")
    url: Text = Field(None, description="The http or https address, a public one, that the messages are sent to.")
    event_types: Texts = Field(None, description=f"The events that the endpoint hears of: {', '.join(EVENT_TYPES)}.")

    def check(self) -> None:
        super().check()
        if self.name is not None and not (self.name.strip() and len(self.name) <= _MAX_NAME_LENGTH):
            raise InvalidRequest(f"name must have 1 to {_MAX_NAME_LENGTH} characters", param="name")
        if self.event_types is not None:
            if not self.event_types:
                raise InvalidRequest(f"event_types is empty; accepted: {', '.join(EVENT_TYPES)}", param="event_types")
            for event_type in self.event_types:
                _check_event_type("event_types", event_type)

    @property
    def known_types(self) -> tuple[str, ...] | None:
        """Each type once, in the order of EVENT_TYPES."""
        return None if self.event_types is None else tuple(known for known in EVENT_TYPES if known in self.event_types)


class EndpointBody(EndpointChangeBody):
    """The body of ``POST /v1/webhook_endpoints``: a new endpoint."""

    required: ClassVar[Mapping[str, str]] = {"name": "", "url": "", "event_types": ""}
    example: ClassVar[Mapping[str, Any]] = {
        "name": "my server",
        "url": "https://example.com/hook",
        "event_types": [COMPLETED],
    }


class RotationBody(Body):
    """The body of ``POST /v1/webhook_endpoints/{id}/rotate_secret``."""

    keep_old_secret_active_for_24_hours: Flag = Field(
        None, description="For 24 hours messages are signed with the old secret, too."
    )


class TestBody(Body):
    """The body of ``POST /v1/webhook_endpoints/{id}/test``."""

    example: ClassVar[Mapping[str, Any]] = {"event_type": COMPLETED}

    event_type: Text = Field(None, description=f"{' or '.join(EVENT_TYPES)}; by default the first.")

    def check(self) -> None:
        super().check()
        if self.event_type:
            _check_event_type("event_type", self.event_type)


FORMS = (EndpointBody, EndpointChangeBody, RotationBody, TestBody)


class Endpoint(Listed):
    """An endpoint. ``signing_secret_hint`` has the last characters of its secret."""

    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str

    @classmethod
    def of(cls, endpoint: WebhookEndpoint) -> Endpoint:
        return cls(**_fields_of(endpoint))


class EndpointWithSecret(Endpoint):
    """An endpoint with its secret. Only the answers that make a secret have it."""

    signing_secret: str

    @classmethod
    def of(cls, endpoint: WebhookEndpoint) -> EndpointWithSecret:
        return cls(**_fields_of(endpoint), signing_secret=endpoint.secret)


class EndpointList(Page[Endpoint]):
    """A page of the list of endpoints."""


class DeletedEndpoint(BaseModel):
    """The endpoint that was deleted."""

    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: bool = True


class TestResult(BaseModel):
    """The endpoint answered the example, with the status ``status_code``."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = True


class EventTypeList(BaseModel):
    """All events that an endpoint can hear of."""

    object: Literal["list"] = "list"
    data: list[str]


async def _webhooks(request: Request) -> Webhooks:
    webhooks: Webhooks = request.app.state.webhooks
    return webhooks


WebhooksParam = Annotated[Webhooks, Depends(_webhooks)]


EndpointId = Annotated[str, Path(description="The id of an endpoint.")]

router = APIRouter(prefix="/v1", tags=["webhooks"])


@router.get("/webhook_event_types", response_model=EventTypeList, responses=answers("The types.", Unauthorized))
async def event_types(_caller: CallerParam) -> Response:
    """List the events that an endpoint can hear of."""
    return json_response(EventTypeList(data=list(EVENT_TYPES)))


@router.post(
    "/webhook_endpoints",
    response_model=EndpointWithSecret,
    responses=takes_body("The endpoint and, this once, its secret."),
    openapi_extra=body_of(EndpointBody),
)
async def create(request: Request, webhooks: WebhooksParam, caller: CallerParam) -> Response:
    """Send these events of this key's videos to a URL. The secret in the answer signs the messages."""
    body = await _read(request, caller, EndpointBody)
    endpoint = await webhooks.register(caller.key_id, body.name or "", body.url or "", body.known_types or ())
    return json_response(EndpointWithSecret.of(endpoint))


@router.get("/webhook_endpoints", response_model=EndpointList, responses=reads("A page of the list.", InvalidRequest))
async def list_endpoints(
    webhooks: WebhooksParam, caller: CallerParam, after: After = None, limit: Limit = None
) -> Response:
    """List this key's endpoints, the newest first."""
    found, has_more = await webhooks.store.list_page(
        caller.key_id, after=read_after(after, is_endpoint_id, "webhook endpoint"), limit=read_limit(limit)
    )
    return json_response(EndpointList.of([Endpoint.of(endpoint) for endpoint in found], has_more=has_more))


@router.get(
    "/webhook_endpoints/{endpoint_id}", response_model=Endpoint, responses=reads("The endpoint.", WebhookNotFound)
)
async def retrieve(webhooks: WebhooksParam, caller: CallerParam, endpoint_id: EndpointId) -> Response:
    """Show one endpoint."""
    return json_response(Endpoint.of(await webhooks.store.get(caller.key_id, endpoint_id)))


@router.post(
    "/webhook_endpoints/{endpoint_id}",
    response_model=Endpoint,
    responses=takes_body("The endpoint as it is now.", WebhookNotFound),
    openapi_extra=body_of(EndpointChangeBody),
)
async def update(request: Request, webhooks: WebhooksParam, caller: CallerParam, endpoint_id: EndpointId) -> Response:
    """Change the fields that the body has."""
    body = await _read(request, caller, EndpointChangeBody)
    endpoint = await webhooks.update(
        caller.key_id, endpoint_id, name=body.name, url=body.url, event_types=body.known_types
    )
    return json_response(Endpoint.of(endpoint))


@router.delete(
    "/webhook_endpoints/{endpoint_id}",
    response_model=DeletedEndpoint,
    responses=changes("The endpoint is gone.", WebhookNotFound),
)
async def delete(webhooks: WebhooksParam, caller: CallerParam, endpoint_id: EndpointId) -> Response:
    """Delete an endpoint. Messages that wait for it are not sent any more."""
    await webhooks.store.delete(caller.key_id, endpoint_id)
    return json_response(DeletedEndpoint(id=endpoint_id))


@router.post(
    "/webhook_endpoints/{endpoint_id}/rotate_secret",
    response_model=EndpointWithSecret,
    responses=takes_body("The endpoint and, this once, its new secret.", WebhookNotFound),
    openapi_extra=body_of(RotationBody, is_required=False),
)
async def rotate_secret(
    request: Request, webhooks: WebhooksParam, caller: CallerParam, endpoint_id: EndpointId
) -> Response:
    """Give an endpoint a new secret."""
    body = await _read(request, caller, RotationBody)
    keep_old_s = _KEEP_OLD_S if body.keep_old_secret_active_for_24_hours else 0
    endpoint = await webhooks.store.rotate(caller.key_id, endpoint_id, keep_old_s=keep_old_s)
    return json_response(EndpointWithSecret.of(endpoint))


@router.post(
    "/webhook_endpoints/{endpoint_id}/test",
    response_model=TestResult,
    responses=takes_body("The endpoint answered.", WebhookNotFound, WebhookFailed),
    openapi_extra=body_of(TestBody, is_required=False),
)
async def test(request: Request, webhooks: WebhooksParam, caller: CallerParam, endpoint_id: EndpointId) -> Response:
    """Send a signed example now, about a video that does not exist, and tell the status of the answer."""
    event_type = (await _read(request, caller, TestBody)).event_type or COMPLETED
    status = await webhooks.test(caller.key_id, endpoint_id, event_type)
    return json_response(TestResult(webhook_endpoint_id=endpoint_id, event_type=event_type, status_code=status))


async def _read(request: Request, caller: Caller, form: type[FormT]) -> FormT:
    """Return the body; an empty one when the client sends none at all. Raises InvalidRequest."""
    has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
    if not has_body:
        return form.parse({})
    async with caller.api.bodies.read(request, caller.name, form.parse, _MAX_BODY_BYTES) as body:
        return body


def _fields_of(endpoint: WebhookEndpoint) -> dict[str, Any]:
    return {
        "id": endpoint.id,
        "created_at": int(endpoint.created_at),
        "updated_at": int(endpoint.updated_at),
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": list(endpoint.event_types),
        "signing_secret_hint": f"whsec_...{endpoint.secret[-_HINT_LENGTH:]}",
    }


def _check_event_type(name: str, event_type: str) -> None:
    if event_type not in EVENT_TYPES:
        raise InvalidRequest(
            f"{name} {event_type[:40]!r} is not sent here; accepted: {', '.join(EVENT_TYPES)}", param=name
        )
