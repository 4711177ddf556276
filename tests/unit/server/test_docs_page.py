"""``/docs`` is a page that loads nothing from another origin."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import pytest
from pydantic import SecretStr

from kinema.server import docs_page
from kinema.settings import ServerSettings
from tests.serving import Serving, serving
from tests.unit.server.test_bad_input import error_of

_MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css", ".png": "image/png"}
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def it(shared: Serving) -> Serving:
    """One service for all tests here: they change nothing."""
    return shared


class Links(HTMLParser):
    """The addresses that a page loads."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in {"href", "src"}]


async def test_the_page_loads_only_what_this_server_has(it: Serving) -> None:
    """Each file is there, with its type; the files of a version may be kept for ever, the rest is asked for again."""
    page = await it.client.get("/docs")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.headers["cache-control"] == "no-cache"
    links = Links(page.text).found
    assert len(links) == 4
    for link in links:
        assert not urlsplit(link).netloc
        file = await it.client.get(urljoin("http://test/docs", link))
        assert file.status_code == 200
        assert file.headers["content-type"].partition(";")[0] == _MEDIA_TYPES[Path(link).suffix]
        assert file.headers["cache-control"] == (
            "public, max-age=31536000, immutable" if re.search(r"/\d+\.\d+\.\d+/", link) else "no-cache"
        )
        assert int(file.headers["content-length"]) == len(file.content) > 100


async def test_a_browser_may_load_nothing_from_elsewhere(it: Serving) -> None:
    """Whatever the scripts ask for: the policy names this origin, and data: URLs for pictures."""
    policy = (await it.client.get("/docs")).headers["content-security-policy"]
    allowed = {rule.split()[0]: set(rule.split()[1:]) for rule in policy.split("; ")}
    assert allowed.pop("default-src") == {"'self'"}
    assert allowed == {"style-src": {"'self'", "'unsafe-inline'"}, "img-src": {"'self'", "data:"}}


async def test_styles_and_our_script_name_no_other_origin(it: Serving) -> None:
    """Only the library's own script has addresses in it: names of XML, and links in its comments and messages."""
    for link in Links((await it.client.get("/docs")).text).found:
        if not link.endswith("-bundle.js"):
            content = (await it.client.get(urljoin("http://test/docs", link))).content
            assert not re.search(rb"(url\(\s*[\"']?|@import\s*[\"']?|url: \")(https?:)?//", content)
    start = (await it.client.get("/docs/start.js")).text
    assert 'url: "openapi.json"' in start
    assert "validatorUrl: null" in start
    assert (await it.client.get(urljoin("http://test/docs", "openapi.json"))).status_code == 200


async def test_every_file_of_the_library_is_as_it_was_published() -> None:
    """With its licence beside it; the README says where it is from."""
    folder = Path(docs_page.__file__).parent / "swagger_ui"
    (version,) = [path for path in folder.iterdir() if path.is_dir()]
    assert f"version {version.name}" in (folder / "README.md").read_text()
    assert {path.name for path in version.iterdir()} >= {"LICENSE", "NOTICE", "swagger-ui-bundle.js.LICENSE.txt"}
    assert {name.partition("/")[0] for name in docs_page._FILES if "/" in name} == {version.name}


@pytest.mark.parametrize("path", ["/docs/", "/docs/LICENSE", "/docs/../errors.py", "/docs/%2e%2e/errors.py", "/redoc"])
async def test_nothing_else_is_served(it: Serving, path: str) -> None:
    """The files are named one by one."""
    error_of(await it.client.get(path), 404)


async def test_the_page_needs_no_key() -> None:
    """Nor does the description: a person reads it in a browser, which sends none."""
    async with serving(server=ServerSettings(api_keys=SecretStr("one"))) as it:
        for path in ("/docs", "/docs/start.js", "/openapi.json"):
            assert (await it.client.get(path)).status_code == 200
        assert (await it.client.get("/v1/videos")).status_code == 401
