"""Errors told by their code."""

from __future__ import annotations

import pytest

from kinema.errors import Drained, EngineFailed, JobNotFound, KinemaError, NoWorker, OutOfMemory, WorkerLost, by_code


@pytest.mark.parametrize("cls", [Drained, EngineFailed, OutOfMemory, WorkerLost, NoWorker, JobNotFound])
def test_an_error_is_found_again_by_its_code(cls: type[KinemaError]) -> None:
    """So the other side of a wire raises what this side raised."""
    assert by_code(cls.code) is cls


def test_an_unknown_code_is_a_failure_of_the_engine() -> None:
    """A newer worker may say what an older frontend does not know."""
    assert by_code("from the future") is EngineFailed


def test_every_code_can_be_made_from_words() -> None:
    """Whatever code arrives, raising it does not fail itself."""
    codes = {cls.code for cls in everything_below(KinemaError)}
    assert [str(by_code(code)("words")) for code in codes] == ["words"] * len(codes)


def everything_below(parent: type[KinemaError]) -> list[type[KinemaError]]:
    return [cls for child in parent.__subclasses__() for cls in (child, *everything_below(child))]
