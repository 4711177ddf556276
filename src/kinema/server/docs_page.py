"""The page at ``/docs``, which shows ``/openapi.json`` with Swagger UI.

Its files are in the package (``swagger_ui/``), and its Content-Security-Policy lets a browser load nothing from another
origin, so it works without the internet. No key is needed, as for the description itself.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response

PATH = "/docs"
_FOLDER = Path(__file__).parent / "swagger_ui"
_MAY_CHANGE = "no-cache"
# The version is in the path.
_NEVER_CHANGES = "public, max-age=31536000, immutable"
# Every file of the page under its path below PATH, and how long a browser may keep it.
_FILES = {
    "start.js": _MAY_CHANGE,
    "5.35.0/swagger-ui-bundle.js": _NEVER_CHANGES,
    "5.35.0/swagger-ui.css": _NEVER_CHANGES,
    "5.35.0/favicon-32x32.png": _NEVER_CHANGES,
}
# Swagger UI sets styles of elements and has its icons as data: URLs.
_POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"


def add_docs_page(app: FastAPI) -> None:
    app.add_route(PATH, _page, include_in_schema=False)
    app.add_route(PATH + "/{name:path}", _file, include_in_schema=False)


async def _page(_request: Request) -> Response:
    return _answer("index.html", _MAY_CHANGE, {"content-security-policy": _POLICY})


async def _file(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _FILES:
        raise HTTPException(404)
    return _answer(name, _FILES[name])


def _answer(name: str, cache_control: str, headers: dict[str, str] | None = None) -> Response:
    headers = {"cache-control": cache_control, "x-content-type-options": "nosniff"} | (headers or {})
    return FileResponse(_FOLDER / name, headers=headers)
