"""Quantised numbers that are restored on their way to a GPU have the bits of those that are restored on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kinema.engines.wan.tensors import TensorReader, list_tensors

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_times_its_scale(kind: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    """Rounded once, to the type of the target."""
    values = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).to(kind)
    save_file({"a": values}, tmp_path / "a.safetensors")
    scale = torch.tensor(0.0123).item()
    source = {"a": replace(list_tensors(tmp_path / "a.safetensors")[0]["a"], scale=scale)}
    expected = (values.float() * scale).to(dtype)
    for device in ("cpu", "cuda"):
        target = torch.empty(64, 96, dtype=dtype, device=device)
        with TensorReader(torch.device(device)) as reader:
            reader.begin(source, {"a": target}).wait()
        assert torch.equal(target.cpu(), expected), device
