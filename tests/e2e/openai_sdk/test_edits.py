"""``videos.edit``: a film that is made anew under another prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from openai import OpenAI, omit

from tests.e2e.openai_sdk.sdk import count_frames, create, download, finish, frames_of
from tests.e2e.openai_sdk.test_remakes import STEPS, sources


def test_an_edit_makes_a_video_anew(client: OpenAI, tmp_path: Path) -> None:
    """From a file or from one that was made here; as long and as large, under the new prompt."""
    first = finish(client, create(client, num_frames=9))
    for form, arguments in sources(client, first, tmp_path).items():
        body = STEPS | arguments.pop("extra_body", {})
        edit = finish(client, client.videos.edit(prompt="at night", **arguments, extra_body=body))
        assert (edit.error, edit.status, edit.prompt, edit.size) == (None, "completed", "at night", "64x64"), form
        assert count_frames(download(client, edit)) == 9, form


def test_an_edit_by_the_real_model(tiny: OpenAI) -> None:
    """``strength`` says how much may change: of a little, the film stays nearer to what it was."""
    made = finish(tiny, create(tiny, num_frames=9, num_inference_steps=8))
    source = frames_of(download(tiny, made))

    def change(strength: float) -> float:
        body = {"video": {"id": made.id}, "num_inference_steps": 8, "seed": 1, "strength": strength}
        edit = finish(tiny, tiny.videos.edit(prompt="a blue square moving up", video=omit, extra_body=body))
        assert (edit.error, edit.status) == (None, "completed")
        frames = frames_of(download(tiny, edit))
        assert frames.shape == source.shape
        return float(np.abs(frames - source).mean())

    assert change(0.25) < change(1.0)
