"""The names and shapes of what the VAE's encoder and decoder are both made of, as diffusers' files have them."""

from __future__ import annotations

Spec = dict[str, tuple[int, ...]]


def convolution_shapes(name: str, before: int, after: int, taps: tuple[int, ...]) -> Spec:
    """A convolution from ``before`` to ``after`` channels."""
    return {f"{name}.weight": (after, before, *taps), f"{name}.bias": (after,)}


def residual_shapes(name: str, before: int, after: int) -> Spec:
    """Norm and convolution, twice; a shortcut where the number of channels changes."""
    found: Spec = {f"{name}.norm1.gamma": (before, 1, 1, 1)}
    found |= convolution_shapes(f"{name}.conv1", before, after, (3, 3, 3))
    found[f"{name}.norm2.gamma"] = (after, 1, 1, 1)
    found |= convolution_shapes(f"{name}.conv2", after, after, (3, 3, 3))
    if before != after:
        found |= convolution_shapes(f"{name}.conv_shortcut", before, after, (1, 1, 1))
    return found


def attention_shapes(name: str, width: int) -> Spec:
    """One head over the pixels of a frame."""
    found: Spec = {f"{name}.norm.gamma": (width, 1, 1)}
    found |= convolution_shapes(f"{name}.to_qkv", width, 3 * width, (1, 1))
    return found | convolution_shapes(f"{name}.proj", width, width, (1, 1))
