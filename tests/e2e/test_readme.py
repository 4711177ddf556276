"""What the README says works as it is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.server_process import Server

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_curl_line_makes_a_video_whose_url_opens(tiny_server: Server) -> None:
    """The body of the README's curl line, sent as it stands; every field of the shown answer is in the real one."""
    body = re.search(r"-d '(\{.*\})'", README)
    shown = re.search(r'^\{"id".*?\}$', README, re.DOTALL | re.MULTILINE)
    assert body is not None
    assert shown is not None
    with tiny_server.client() as client:
        headers = {"content-type": "application/json"}
        answer = client.post("/v1/videos/generations", content=body[1], headers=headers).raise_for_status().json()
        assert client.get(answer["data"][0]["url"]).headers["content-type"] == "video/mp4"
    expected = json.loads(shown[0])
    assert expected.keys() <= answer.keys()
    changing = {"id", "data", "inference_time_s"}
    assert {key: answer[key] for key in expected.keys() - changing} == {
        key: expected[key] for key in expected.keys() - changing
    }


def test_every_file_that_the_documents_link_to_exists() -> None:
    """In the README, and the file names in ARCHITECTURE's table of words."""
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    words = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_/]+(?:\.py|/))`", words)
    assert links
    assert named
    for link in links:
        assert (ROOT / link.partition("#")[0]).exists(), link
    folders = [ROOT, *(ROOT / "src/kinema" / folder for folder in ("", "request", "engines/wan", "bench/wan"))]
    for name in named:
        assert any((folder / name).exists() for folder in folders), name
