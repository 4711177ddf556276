"""The commands of the training refuse a folder that they cannot use, before they write anything."""

from __future__ import annotations

from pathlib import Path

import pytest


def refusal(capsys: pytest.CaptureFixture[str], ended: pytest.ExceptionInfo[SystemExit]) -> str:
    """The last line that was printed; the exit code is that of a wrong argument."""
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_export_wants_what_training_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without weights, and one that lacks a part which is not in the target folder either."""
    from training.tiny import export

    to = tmp_path / "model"
    with pytest.raises(SystemExit) as ended:
        export.main(["--out", str(tmp_path), "--to", str(to)])
    assert f"--out {tmp_path} has neither vae.pt nor denoiser.pt" in refusal(capsys, ended)
    (tmp_path / "vae.pt").touch()
    with pytest.raises(SystemExit) as ended:
        export.main(["--out", str(tmp_path), "--to", str(to)])
    assert f"--out {tmp_path} has no denoiser.pt, and --to {to} has no transformer" in refusal(capsys, ended)
    assert not to.exists()


def test_evaluate_wants_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without model_index.json; no report is begun."""
    from training.tiny import evaluate

    report = tmp_path / "runs/report.json"
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["--model", str(tmp_path / "absent"), "--report", str(report)])
    assert f"--model {tmp_path / 'absent'} has no model_index.json" in refusal(capsys, ended)
    assert not report.parent.exists()
