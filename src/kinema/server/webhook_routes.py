"""Webhook endpoints, as the OpenAI SDK's ``client.webhooks`` registers, changes and tries them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse, Response

from kinema.errors import InvalidRequest
from kinema.jobs.webhook_store import COMPLETED, EVENT_TYPES, WebhookEndpoint, is_endpoint_id
from kinema.request.bodies import explain
from kinema.request.fields import Flag, Text
from kinema.server.api import ERRORS, CallerParam
from kinema.server.bodies import read_body
from kinema.service.webhooks import Webhooks

# A URL of 2,048 characters, a name and a few types, however they are escaped.
_MAX_BODY_BYTES = 64 * 1024
_MAX_NAME_LENGTH = 255
_DEFAULT_LIMIT, _MAX_LIMIT = 20, 100
_KEEP_OLD_S = 24 * 3600
_HINT_LENGTH = 4


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Raises InvalidRequest, which names the field."""
        try:
            return cls.model_validate(fields)
        except ValidationError as exc:
            raise explain(exc.errors(include_url=False)[0], cls) from exc


class EndpointBody(_Body):
    """A new endpoint, for which all three are needed, or what is to change of one."""

    name: Text = Field(None, description="For people.")
    url: Text = Field(None, description="http or https, at a public address.")
    event_types: list[str] | None = Field(None, description="Of /v1/webhook_event_types.")

    def check(self, *, is_whole: bool) -> None:
        """Raises InvalidRequest."""
        for name in ("name", "url", "event_types"):
            if is_whole and getattr(self, name) is None:
                raise InvalidRequest(f"{name} is missing", param=name)
        if self.name is not None and not (self.name.strip() and len(self.name) <= _MAX_NAME_LENGTH):
            raise InvalidRequest(f"name must have 1 to {_MAX_NAME_LENGTH} characters", param="name")
        if self.event_types is not None:
            if not self.event_types:
                raise InvalidRequest(f"event_types is empty; accepted: {', '.join(EVENT_TYPES)}", param="event_types")
            for event_type in self.event_types:
                _check_event_type("event_types", event_type)

    @property
    def known_types(self) -> tuple[str, ...] | None:
        """Each once, in the order of the list of all."""
        return None if self.event_types is None else tuple(known for known in EVENT_TYPES if known in self.event_types)


class RotationBody(_Body):
    keep_old_secret_active_for_24_hours: Flag = None


class TestBody(_Body):
    event_type: Text = None


class Endpoint(BaseModel):
    """``signing_secret`` is told once, to whoever made it; afterwards there is only its end."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str

    @classmethod
    def of(cls, endpoint: WebhookEndpoint) -> dict[str, Any]:
        return cls(
            id=endpoint.id,
            created_at=int(endpoint.created_at),
            updated_at=int(endpoint.updated_at),
            name=endpoint.name,
            url=endpoint.url,
            event_types=list(endpoint.event_types),
            signing_secret_hint=f"whsec_...{endpoint.secret[-_HINT_LENGTH:]}",
        ).model_dump()

    @classmethod
    def with_secret(cls, endpoint: WebhookEndpoint) -> dict[str, Any]:
        return cls.of(endpoint) | {"signing_secret": endpoint.secret}


class EndpointWithSecret(Endpoint):
    signing_secret: str


class EndpointList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Endpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedEndpoint(BaseModel):
    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: bool = True


class TestResult(BaseModel):
    """``success``: there was an answer; ``status_code`` says which."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: str
    status_code: int
    success: Literal[True] = True


class EventTypeList(BaseModel):
    object: Literal["list"] = "list"
    data: list[str]


async def _webhooks(request: Request) -> Webhooks:
    webhooks: Webhooks = request.app.state.webhooks
    return webhooks


WebhooksParam = Annotated[Webhooks, Depends(_webhooks)]


def _body(model: type[BaseModel], *, is_required: bool = True) -> dict[str, Any]:
    """For the description: the handlers parse bodies themselves, so FastAPI does not know them."""
    return {
        "requestBody": {
            "required": is_required,
            "content": {"application/json": {"schema": model.model_json_schema()}},
        }
    }


router = APIRouter(prefix="/v1", tags=["webhooks"], responses=ERRORS)


@router.get("/webhook_event_types", response_model=EventTypeList)
async def event_types(_caller: CallerParam) -> Response:
    """What an endpoint can hear of."""
    return JSONResponse(EventTypeList(data=list(EVENT_TYPES)).model_dump())


@router.post("/webhook_endpoints", response_model=EndpointWithSecret, openapi_extra=_body(EndpointBody))
async def create(request: Request, webhooks: WebhooksParam, caller: CallerParam) -> Response:
    """Send these events of this key's videos to the URL. The answer has the secret that signs them, this once."""
    body = EndpointBody.parse(await _fields(request))
    body.check(is_whole=True)
    endpoint = await webhooks.register(caller.key_id, body.name or "", body.url or "", body.known_types or ())
    return JSONResponse(Endpoint.with_secret(endpoint))


@router.get("/webhook_endpoints", response_model=EndpointList)
async def list_endpoints(request: Request, webhooks: WebhooksParam, caller: CallerParam) -> Response:
    """This key's endpoints, the newest first; `after` is the last id of the page before, `limit` 0 to 100."""
    found, has_more = await webhooks.store.list_page(caller.key_id, after=_after(request), limit=_limit(request))
    ids: list[str | None] = [*(endpoint.id for endpoint in found)] or [None]
    page = {"object": "list", "data": [Endpoint.of(endpoint) for endpoint in found]}
    return JSONResponse(page | {"first_id": ids[0], "last_id": ids[-1], "has_more": has_more})


@router.get("/webhook_endpoints/{endpoint_id}", response_model=Endpoint)
async def retrieve(webhooks: WebhooksParam, caller: CallerParam, endpoint_id: str) -> Response:
    """One endpoint."""
    return JSONResponse(Endpoint.of(await webhooks.store.get(caller.key_id, endpoint_id)))


@router.post("/webhook_endpoints/{endpoint_id}", response_model=Endpoint, openapi_extra=_body(EndpointBody))
async def update(request: Request, webhooks: WebhooksParam, caller: CallerParam, endpoint_id: str) -> Response:
    """Change what the body names."""
    body = EndpointBody.parse(await _fields(request))
    body.check(is_whole=False)
    endpoint = await webhooks.update(
        caller.key_id, endpoint_id, name=body.name, url=body.url, event_types=body.known_types
    )
    return JSONResponse(Endpoint.of(endpoint))


@router.delete("/webhook_endpoints/{endpoint_id}", response_model=DeletedEndpoint)
async def delete(webhooks: WebhooksParam, caller: CallerParam, endpoint_id: str) -> Response:
    """Send nothing more to it, not even what waits."""
    await webhooks.store.delete(caller.key_id, endpoint_id)
    return JSONResponse(DeletedEndpoint(id=endpoint_id).model_dump())


@router.post(
    "/webhook_endpoints/{endpoint_id}/rotate_secret",
    response_model=EndpointWithSecret,
    openapi_extra=_body(RotationBody, is_required=False),
)
async def rotate_secret(request: Request, webhooks: WebhooksParam, caller: CallerParam, endpoint_id: str) -> Response:
    """A new secret, told this once; for 24 hours messages can carry the old one's signature too."""
    body = RotationBody.parse(await _fields(request))
    keep_old_s = _KEEP_OLD_S if body.keep_old_secret_active_for_24_hours else 0
    return JSONResponse(
        Endpoint.with_secret(await webhooks.store.rotate(caller.key_id, endpoint_id, keep_old_s=keep_old_s))
    )


@router.post(
    "/webhook_endpoints/{endpoint_id}/test",
    response_model=TestResult,
    openapi_extra=_body(TestBody, is_required=False),
)
async def test(request: Request, webhooks: WebhooksParam, caller: CallerParam, endpoint_id: str) -> Response:
    """Send a signed example now, of a video that does not exist, and tell the status of the answer."""
    event_type = TestBody.parse(await _fields(request)).event_type or COMPLETED
    _check_event_type("event_type", event_type)
    status = await webhooks.test(caller.key_id, endpoint_id, event_type)
    result = TestResult(webhook_endpoint_id=endpoint_id, event_type=event_type, status_code=status)
    return JSONResponse(result.model_dump())


async def _fields(request: Request) -> dict[str, Any]:
    """The body's, or none where a client sends no body at all."""
    has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
    return await read_body(request, _MAX_BODY_BYTES) if has_body else {}


def _after(request: Request) -> str | None:
    after = request.query_params.get("after")
    if after and not is_endpoint_id(after):
        raise InvalidRequest("after must be the id of a webhook endpoint", param="after")
    return after or None


def _limit(request: Request) -> int:
    text = request.query_params.get("limit") or str(_DEFAULT_LIMIT)
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and int(text) <= _MAX_LIMIT):
        raise InvalidRequest(f"limit must be a whole number from 0 to {_MAX_LIMIT}", param="limit")
    return int(text)


def _check_event_type(name: str, event_type: str) -> None:
    if event_type not in EVENT_TYPES:
        raise InvalidRequest(
            f"{name} {event_type[:40]!r} is not sent here; accepted: {', '.join(EVENT_TYPES)}", param=name
        )
