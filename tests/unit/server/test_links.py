"""Links that open a video without a key: for a while, for that video alone, and made by nobody else."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from urllib.parse import parse_qsl, urlsplit

import pytest

from kinema.errors import Unauthorized
from kinema.ids import new_job_id
from kinema.server.links import Links
from kinema.settings import ServerSettings
from tests.serving import SMALL, Serving, serving

URL = "/v1/videos"
KEYS = ServerSettings(api_keys="alpha,beta")
ALPHA, BETA = ({"authorization": f"Bearer {key}"} for key in ("alpha", "beta"))


@dataclass
class Clock:
    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def parts(query: str) -> dict[str, str]:
    return dict(parse_qsl(query))


def test_a_link_opens_until_its_end() -> None:
    """At least as long as is set, and little longer; the sentence says what to do then."""
    clock, job_id = Clock(), new_job_id()
    links = Links(b"secret", 3600, clock)
    link = parts(links.query(job_id))
    assert 3600 <= int(link["expires"]) - clock.now <= 3600 * 25 / 24 + 1
    clock.now = int(link["expires"]) - 1
    links.check(job_id, **link)
    clock.now = int(link["expires"])
    with pytest.raises(Unauthorized, match="this link has expired; ask for the video again to get a new link"):
        links.check(job_id, **link)


def test_answers_within_a_while_have_the_same_link() -> None:
    """So a page that asks every second does not load the video every second."""
    clock, job_id = Clock(), new_job_id()
    links = Links(b"secret", 24 * 3600, clock)
    made = set()
    for _ in range(3600):
        made.add(links.query(job_id))
        clock.now += 1
    assert len(made) <= 2


@pytest.mark.parametrize("lifetime_s", [0.001, 1, 59, 86400, 366 * 86400])
def test_every_lifetime_gives_a_link_that_opens(lifetime_s: float) -> None:
    """A very short one too."""
    links, job_id = Links(b"secret", lifetime_s, Clock(1_234_567.89)), new_job_id()
    links.check(job_id, **parts(links.query(job_id)))


@pytest.mark.parametrize(
    "altered",
    [
        {"expires": "9999999999"},
        {"expires": ""},
        {"expires": "²"},
        {"expires": "1" * 10_000},
        {"expires": " 1003600"},
        {"signature": ""},
        {"signature": "0" * 32},
        {"signature": "é" * 32},
    ],
)
def test_an_altered_link_does_not_open(altered: dict[str, str]) -> None:
    """Neither a later end nor another signature."""
    links, job_id = Links(b"secret", 3600, Clock()), new_job_id()
    link = parts(links.query(job_id)) | altered
    with pytest.raises(Unauthorized, match="signature of this link is not valid"):
        links.check(job_id, **link)


def test_a_link_is_of_one_video_and_one_secret() -> None:
    """Another video, another database."""
    links, job_id = Links(b"secret", 3600, Clock()), new_job_id()
    link = parts(links.query(job_id))
    for other, asked in ((links, new_job_id()), (replace(links, secret=b"other"), job_id)):
        with pytest.raises(Unauthorized):
            other.check(asked, **link)


async def finished(it: Serving, headers: dict[str, str]) -> str:
    answer = await it.client.post(f"{URL}/generations", json=SMALL, headers=headers)
    url: str = answer.json()["data"][0]["url"]
    return url


async def test_who_knows_a_key_makes_no_link() -> None:
    """The key that made a video is not what signs it: another secret does."""
    async with serving(server=KEYS) as it:
        url = urlsplit(await finished(it, ALPHA))
        job_id = url.path.split("/")[3]
        for secret in (b"alpha", b"", b"beta"):
            forged = Links(secret, 3600).query(job_id)  # type: ignore[arg-type]
            assert (await it.client.get(f"{url.path}?{forged}")).status_code == 401


async def test_a_link_opens_every_file_of_the_video_and_says_so_in_the_end() -> None:
    """With the head alone, too; an altered one is refused in a sentence, and a deleted video is not found."""
    async with serving(server=KEYS) as it:
        url = await finished(it, ALPHA)
        assert re.fullmatch(r"http://test/v1/videos/video_\w+/content\?expires=\d+&signature=[0-9a-f]{32}", url)
        for variant in ("", "&variant=thumbnail"):
            assert (await it.client.get(url + variant)).status_code == 200
            assert (await it.client.head(url + variant)).status_code == 200
        expires = int(parts(urlsplit(url).query)["expires"])
        refused = await it.client.get(url.replace(f"expires={expires}", f"expires={expires + 1}"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert "signature of this link is not valid" in refused.json()["error"]["message"]
        await it.client.delete(urlsplit(url).path.removesuffix("/content"), headers=ALPHA)
        assert (await it.client.get(url)).status_code == 404


async def test_an_expired_link_is_refused_and_the_next_answer_has_a_new_one() -> None:
    """Also for a part of the file."""
    async with serving(server=KEYS) as it:
        url = await finished(it, ALPHA)
        api, path = it.app.state.api, urlsplit(url).path.removesuffix("/content")
        later = int(parts(urlsplit(url).query)["expires"])
        it.app.state.api = replace(api, links=replace(api.links, clock=lambda: later))
        for headers in ({}, {"range": "bytes=0-1"}):
            refused = await it.client.get(url, headers=headers)
            assert (refused.status_code, refused.headers["content-type"]) == (401, "application/json")
            assert "this link has expired; ask for the video again" in refused.json()["error"]["message"]
        renewed = (await it.client.get(path, headers=ALPHA)).json()["data"][0]["url"]
        assert renewed != url
        assert (await it.client.get(renewed)).status_code == 200


async def test_a_link_ends_with_its_key() -> None:
    """A key that was taken back opens nothing, also not by the links that it has."""
    async with serving(server=KEYS) as it:
        urls = [await finished(it, headers) for headers in (ALPHA, BETA)]
        api = it.app.state.api
        it.app.state.api = replace(api, keys=type(api.keys)("beta"))
        refused, opened = [await it.client.get(url) for url in urls]
        assert (refused.status_code, opened.status_code) == (401, 200)
        assert "no longer accepted" in refused.json()["error"]["message"]


async def test_without_keys_a_link_needs_no_signature() -> None:
    """Everybody may open everything there."""
    async with serving() as it:
        url = await finished(it, {})
        assert url.endswith("/content")
        assert (await it.client.get(url)).status_code == 200
