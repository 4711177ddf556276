"""Requests as a mutation takes them apart, and what of them goes over the wire."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

BOUNDARY = "fuzz-6e2f0c"
_SHOWN_BYTES = 1000


@dataclass(frozen=True)
class Part:
    """One part of a form; with a file name it is a file."""

    name: str
    value: bytes
    file_name: str | None = None
    content_type: str | None = None

    @property
    def encoded(self) -> bytes:
        disposition = f'form-data; name="{self.name}"'
        if self.file_name is not None:
            disposition += f'; filename="{self.file_name}"'
        lines = [f"content-disposition: {disposition}"]
        if self.content_type is not None:
            lines.append(f"content-type: {self.content_type}")
        return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogatepass") + self.value


@dataclass(frozen=True)
class Form:
    parts: Sequence[Part]

    @property
    def encoded(self) -> bytes:
        parts = [b"--%s\r\n%s\r\n" % (BOUNDARY.encode(), part.encoded) for part in self.parts]
        return b"".join(parts) + b"--%s--\r\n" % BOUNDARY.encode()


@dataclass(frozen=True)
class Json:
    value: Any

    @property
    def encoded(self) -> bytes:
        return json.dumps(self.value).encode()


@dataclass(frozen=True)
class Raw:
    """A body of that content type, byte by byte."""

    content_type: str
    encoded: bytes


Body = Json | Form | Raw | None


@dataclass(frozen=True)
class Request:
    """``path`` and ``query`` are as they stand in the request, encoded; header values may be any bytes."""

    method: str
    path: str
    query: Sequence[tuple[str, str]] = ()
    headers: Sequence[tuple[str, bytes]] = ()
    body: Body = None
    # Whether the length of the body is what the headers say; else the server may wait for more, or see less.
    is_framed: bool = field(default=True, compare=False)

    @property
    def target(self) -> str:
        return self.path + ("?" + "&".join(f"{name}={value}" for name, value in self.query) if self.query else "")

    @property
    def encoded(self) -> bytes:
        body = b"" if self.body is None else self.body.encoded
        own = {name.lower() for name, _ in self.headers}
        headers = [("host", b"127.0.0.1")] if "host" not in own else []
        if self.body is not None:
            headers += [("content-type", _content_type(self.body))] if "content-type" not in own else []
            if not own & {"content-length", "transfer-encoding"}:
                headers.append(("content-length", b"%d" % len(body)))
        lines = [f"{self.method} {self.target} HTTP/1.1".encode("latin-1", "replace")]
        lines += [name.encode("latin-1", "replace") + b": " + value for name, value in (*headers, *self.headers)]
        return b"\r\n".join([*lines, b"", b""]) + body

    def with_header(self, name: str, value: str | bytes) -> Request:
        """The request with that header in place of one of the same name."""
        kept = [pair for pair in self.headers if pair[0].lower() != name.lower()]
        encoded = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
        return replace(self, headers=[*kept, (name, encoded)])

    def __str__(self) -> str:
        encoded = self.encoded
        more = len(encoded) - _SHOWN_BYTES
        return f"{encoded[:_SHOWN_BYTES]!r}" + (f" and {more} bytes more" if more > 0 else "")


def _content_type(body: Json | Form | Raw) -> bytes:
    match body:
        case Json():
            return b"application/json"
        case Form():
            return b"multipart/form-data; boundary=" + BOUNDARY.encode()
        case Raw():
            return body.content_type.encode("utf-8", "surrogatepass")


def percent_encoded(text: str) -> str:
    return quote(text.encode("utf-8", "surrogatepass"), safe="")
