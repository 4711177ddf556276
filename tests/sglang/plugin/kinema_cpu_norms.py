"""A plugin of SGLang's own kind, with which its own Wan pipelines run on a CPU.

They call kernels of sgl-kernel's CPU build there, which the package index does not have. The library says the same in
torch beside them but for one function, which is here.
"""

from __future__ import annotations

_NORMS = "sglang.multimodal_gen.runtime.layers.layernorm"


def load() -> None:
    """Called by the library in each of its processes, before a model is made."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    HookRegistry.register(f"{_NORMS}.fuse_scale_shift_kernel", _scale_shift, HookType.REPLACE)
    for name in ("_NormScaleShift", "_ScaleResidualNormScaleShift"):
        HookRegistry.register(f"{_NORMS}.{name}.forward_cpu", _in_torch, HookType.REPLACE)


def _in_torch(norm, *arguments):
    return norm.forward_native(*arguments)


def _scale_shift(x, scale, shift, *_blocks):
    """``x`` (b, l, c); the other two broadcast to it, or have a row for each latent frame, (b, f, 1, c)."""
    from sglang.kernels.ops.diffusion.modulate.scale_shift_triton import expand_scale_shift_cpu_param

    return x * (1 + expand_scale_shift_cpu_param(scale, x)) + expand_scale_shift_cpu_param(shift, x)
