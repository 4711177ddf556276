"""The diffusers engine on a GPU, which settings name with or without its number."""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest

from kinema.engines.registry import create_engine
from kinema.settings import EngineSettings
from tests.contract.engine import begin, frames_of, make_all
from tests.dummies.pipelines import make

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("device", ["auto", "cuda:0"])
def test_videos_in_turn_are_those_alone(device: str, tmp_path: Path) -> None:
    make("LTX-Video").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "kinema.json").write_text(json.dumps({"size": "96x64", "num_frames": 9}))
    engine = create_engine(EngineSettings(model=str(tmp_path / "model"), device=device))
    engine.load()
    assert engine.device.startswith("cuda")
    alone = [frames_of(make_all(engine, seed=seed)) for seed in (3, 4)]
    together = list(zip_longest(begin(engine, seed=3), begin(engine, seed=4)))
    for video, outputs in zip(alone, zip(*together, strict=True), strict=True):
        assert len(np.unique(video)) > 1
        assert np.array_equal(frames_of([output for output in outputs if output is not None]), video)
