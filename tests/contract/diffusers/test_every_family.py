"""The whole engine contract for every row of the table of families (`scripts/test-families`, which takes minutes).

Each model is a folder of its tiny pipeline, read as the service reads it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from kinema.engines.base import Engine, Note
from kinema.engines.diffusers.families import FAMILIES, Family
from kinema.engines.diffusers.model_folder import Model, inspect
from kinema.request.request import GenerationRequest
from tests.contract.engine import EngineContract, make_all

SERVED = [family for family in FAMILIES if family.needs is None]


class FamilyContract(EngineContract):
    """That of the row ``family``."""

    family: Family

    @classmethod
    def make(cls, folder: Path) -> Engine:
        from kinema.engines.diffusers.engine import DiffusersEngine
        from tests.dummies.pipelines import make

        if not cls.family.packages and not cls.family.is_tiled:
            make(cls.family.name).save_pretrained(folder / "model")
            return DiffusersEngine(inspect(str(folder / "model")), "cpu")
        # The one is read with those packages alone, and the tiles of the other's VAE are not in its config.
        small = replace(cls.family, sizes=("96x64", "64x64", "64x96") if cls.family.sizes else ())
        index = {"_class_name": small.pipelines[0]}
        model = Model(small.name, folder, index, small, {"size": "96x64"}, flow_shift=None)
        return DiffusersEngine(model, "cpu", load_pipeline=lambda *_: make(small.name))


class OfOwnSizesContract(FamilyContract):
    """It makes the shape of its picture in a size of its own, and a note says so."""

    def shape_made(self, engine: Engine, request: GenerationRequest) -> tuple[int, ...]:
        made = make_all(engine, size=str(request.size), num_frames=request.num_frames)
        (note,) = {output.text for output in made if isinstance(output, Note)}
        found = re.fullmatch(r"the video has (\d+) frames of (\d+)x(\d+), not .*", note)
        assert found is not None
        num_frames, width, height = map(int, found.groups())
        return (num_frames, height, width, 3)


for _family in SERVED:
    _name = f"Test{''.join(filter(str.isalnum, _family.name))}"
    _attributes = {"family": _family, "reads_prompts": _family.has_prompt, "__module__": __name__}
    _kind = OfOwnSizesContract if _family.name == "HunyuanVideo 1.5 image-to-video" else FamilyContract
    globals()[_name] = pytest.mark.filterwarnings("ignore")(pytest.mark.families(type(_name, (_kind,), _attributes)))
