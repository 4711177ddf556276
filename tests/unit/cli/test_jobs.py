"""``kinema jobs create`` looks at the name of its file before it calls a service."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from kinema.cli.jobs import app


@pytest.mark.parametrize(
    ("asked", "endings"),
    [
        (["-o", "film.txt"], ".mp4, .webm, .gif"),
        (["-o", "film"], ".mp4, .webm, .gif"),
        (["-o", "film.mp4", "--output-format", "webm"], ".webm"),
    ],
)
def test_a_name_that_is_of_no_such_video_is_refused(asked: list[str], endings: str) -> None:
    refused = CliRunner().invoke(app, ["create", "a red circle", "--url", "http://127.0.0.1:9", *asked])
    assert refused.exit_code == 2
    assert f"give a name that ends in {endings}" in " ".join(refused.output.replace("│", " ").split())
