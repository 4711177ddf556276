"""A LoRA of the transformer: low-rank changes of the linear layers of its blocks, and the file they are kept in.

The keys of the file are those that diffusers writes: ``transformer.blocks.0.attn1.to_q.lora_A.weight``. There is no
alpha: a layer's weight grows by ``lora_B @ lora_A``. A file can be made smaller; then layers differ in their rank:

    .venv/bin/python -m training.tiny.lora FILE --bytes 2150000
"""

# mypy: disable-error-code="no-any-return,no-untyped-call"
# (array arithmetic comes back as Any from the stubs)

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LAYERS = (
    *(f"attn{i}.to_{part}" for i in (1, 2) for part in ("q", "k", "v", "out.0")),
    *("ffn.net.0.proj", "ffn.net.2"),
)
PREFIX = "transformer."


class Adapter(nn.Module):
    """The matrices of a LoRA, those of equal layers stacked: down (n, rank, in) and up (n, out, rank)."""

    def __init__(self, model: WanTransformer3DModel, rank: int) -> None:
        super().__init__()
        self.num_blocks = len(model.blocks)
        groups: dict[torch.Size, list[tuple[int, str]]] = defaultdict(list)
        for i, block in enumerate(model.blocks):
            for name in LAYERS:
                groups[block.get_submodule(name).weight.shape].append((i, name))
        self.places = list(groups.values())
        self.frozen = [torch.stack([model.blocks[i].get_submodule(name).weight.detach() for i, name in places])
                       for places in self.places]  # fmt: skip
        device = model.device
        self.down = nn.ParameterList(
            [torch.randn(len(w), rank, w.shape[2], device=device) * w.shape[2] ** -0.5 for w in self.frozen]
        )
        self.up = nn.ParameterList([torch.zeros(len(w), w.shape[1], rank, device=device) for w in self.frozen])

    def weights(self) -> list[dict[str, Tensor]]:
        """What stands in for each block's weights (see `fast.Changed`)."""
        changed: list[dict[str, Tensor]] = [{} for _ in range(self.num_blocks)]
        for places, frozen, up, down in zip(self.places, self.frozen, self.up, self.down, strict=True):
            with torch.autocast(frozen.device.type, enabled=False):
                merged = torch.baddbmm(frozen, up, down).unbind(0)
            for (i, name), weight in zip(places, merged, strict=True):
                changed[i][f"{name}.weight"] = weight
        return changed

    def save(self, path: Path) -> None:
        """Write the file, float16."""
        tensors = {}
        for places, up, down in zip(self.places, self.up, self.down, strict=True):
            for (i, name), b, a in zip(places, up.detach(), down.detach(), strict=True):
                tensors[f"{PREFIX}blocks.{i}.{name}.lora_A.weight"] = a.half().cpu().contiguous()
                tensors[f"{PREFIX}blocks.{i}.{name}.lora_B.weight"] = b.half().cpu().contiguous()
        write(path, tensors)


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file, or replace it as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(path)


def cut(path: Path, num_bytes: int) -> None:
    """Leave out what changes the weights least, until the matrices take no more than so many bytes.

    A layer's change is the sum of as many matrices of rank one as it has ranks. Those go first that are the smallest
    part of their layer's change for each byte; every layer keeps one.
    """
    tensors = load_file(path)
    layers = {key.removesuffix("lora_A.weight") for key in tensors if key.endswith("lora_A.weight")}
    parts: list[tuple[float, str, int]] = []
    for layer in layers:
        down, up = (tensors[f"{layer}lora_{name}.weight"].float() for name in "AB")
        left, sizes, right = torch.linalg.svd(up @ down, full_matrices=False)
        rank, one = len(down), 2 * (down.shape[1] + up.shape[0])
        roots = sizes[:rank].sqrt()
        tensors[f"{layer}lora_A.weight"] = (roots[:, None] * right[:rank]).half()
        tensors[f"{layer}lora_B.weight"] = (left[:, :rank] * roots).half()
        shares = sizes[:rank].square() / sizes.square().sum()
        parts += [(share / one, layer, one) for share in shares[1:].tolist()]
    excess = sum(tensor.nbytes for tensor in tensors.values()) - num_bytes
    ranks = {layer: len(tensors[f"{layer}lora_A.weight"]) for layer in layers}
    for _, layer, one in sorted(parts):
        if excess <= 0:
            break
        ranks[layer] -= 1
        excess -= one
    for layer, rank in ranks.items():
        down, up = f"{layer}lora_A.weight", f"{layer}lora_B.weight"
        tensors[down], tensors[up] = tensors[down][:rank].contiguous(), tensors[up][:, :rank].contiguous()
    write(path, tensors)


@torch.no_grad()
def merge(model: WanTransformer3DModel, path: Path, scale: float = 1.0) -> None:
    """Add a LoRA file to the weights of a model, in place."""
    tensors = load_file(path)
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        up = tensors[key.replace("lora_A", "lora_B")].float()
        weight = model.get_submodule(name).weight
        weight.add_((up @ tensors[key].float()).to(weight), alpha=scale)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make a LoRA file smaller.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--bytes", type=int, required=True, help="what its matrices may take")
    options = parser.parse_args(arguments)
    cut(options.file, options.bytes)


if __name__ == "__main__":
    main()
