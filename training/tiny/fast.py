"""The same networks, computed the quick way that training needs.

diffusers runs Wan's autoencoder frame by frame through caches, and its transformer with one time embedding per token.
The functions here take whole clips at once and fold what repeats; the results are the same up to rounding, which
`tests/integration/training/test_tiny_fast.py` checks against the shipped classes.
"""

# mypy: disable-error-code="no-any-return,no-untyped-call"
# (array arithmetic comes back as Any from the stubs)

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    patchify,
    unpatchify,
)
from torch import Tensor, nn
from transformers import UMT5EncoderModel
from transformers.models.umt5.modeling_umt5 import UMT5Attention

TEXT_LENGTH = 512  # the length that Wan's pipelines pad every prompt to, pads unmasked
EPS = 1e-6
torch._dynamo.config.recompile_limit = 64  # one small compilation per channel count of the autoencoder
# On Hopper torch 2.11 takes cuDNN's attention, which is wrong for some lengths: pytorch/pytorch issue 196678.
torch.backends.cuda.enable_cudnn_sdp(False)


def _activate(x: Tensor, gamma: Tensor) -> Tensor:
    """RMS norm over channels, then SiLU; x is (b, c, f, h, w)."""
    scale = x.float().square().sum(1, keepdim=True).clamp_min(1e-24).rsqrt() * x.shape[1] ** 0.5
    return F.silu(x.float() * scale * gamma).to(x.dtype)


class FastVae:
    """Whole-clip encode and decode with the weights of an AutoencoderKLWan (not the residual variant)."""

    def __init__(self, vae: AutoencoderKLWan, is_compiled: bool = False, is_channels_last: bool = False) -> None:
        self.vae = vae
        self._order = torch.channels_last_3d if is_channels_last else torch.contiguous_format
        self._activate: Callable[[Tensor, Tensor], Tensor] = (
            torch.compile(_activate, dynamic=True) if is_compiled else _activate
        )

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (b, 3, f, h, w) in [-1, 1] to mean and log variance, each (b, 16, 1 + (f - 1) / 4, h / 8, w / 8)."""
        encoder = self.vae.encoder
        x = _conv(encoder.conv_in, patchify(frames, self.vae.config.patch_size))
        for layer in encoder.down_blocks:
            x = self._layer(layer, x)
        x = self._layer(encoder.mid_block, x)
        x = _conv(encoder.conv_out, self._activate(x, encoder.norm_out.gamma))
        mean, log_variance = _conv(self.vae.quant_conv, x).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, 16, f, h, w) to frames (b, 3, 1 + 4 (f - 1), 8 h, 8 w), not yet clamped to [-1, 1]."""
        decoder = self.vae.decoder
        x = _conv(decoder.conv_in, _conv(self.vae.post_quant_conv, latents))
        x = self._layer(decoder.mid_block, x)
        for block in decoder.up_blocks:
            for layer in [*block.resnets, *(block.upsamplers or [])]:
                x = self._layer(layer, x)
        x = _conv(decoder.conv_out, self._activate(x, decoder.norm_out.gamma))
        return unpatchify(x, self.vae.config.patch_size)

    def _layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, WanResidualBlock):
            return self._residual(layer, x)
        if isinstance(layer, WanResample):
            return _resample(layer, x)
        if isinstance(layer, WanMidBlock):
            x = self._residual(layer.resnets[0], x)
            return self._residual(layer.resnets[1], layer.attentions[0](x))
        assert isinstance(layer, WanAttentionBlock), type(layer)
        return layer(x)

    def _residual(self, block: WanResidualBlock, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=self._order)
        short = x if isinstance(block.conv_shortcut, nn.Identity) else _conv(block.conv_shortcut, x)
        y = _conv(block.conv1, self._activate(x, block.norm1.gamma))
        return short + _conv(block.conv2, self._activate(y, block.norm2.gamma))


def _conv(conv: WanCausalConv3d, x: Tensor) -> Tensor:
    """A causal convolution over the whole clip: zeros before the first frame, spatial padding inside the kernel."""
    past, side = conv._padding[4], conv._padding[0]
    if past:
        x = F.pad(x, (0, 0, 0, 0, past, 0))
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, (0, side, side))


def _resample(layer: WanResample, x: Tensor) -> Tensor:
    """Halve or double the grid; the first frame stands alone in time, as the frame-by-frame cache makes it."""
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        b, c, f, h, w = x[:, :, 1:].shape
        pairs = _conv(layer.time_conv, x[:, :, 1:]).view(b, 2, c, f, h, w)
        x = torch.cat([x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * f, h, w)], dim=2)
    b, _, f, _, _ = x.shape
    x = layer.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (b, f)).transpose(1, 2)
    if layer.mode == "downsample3d" and f > 1:
        x = torch.cat([x[:, :, :1], _conv(layer.time_conv, x)], dim=2)
    return x


@dataclass(frozen=True)
class Text:
    """What the blocks attend to: keys (b, l, d), the last of which stands for all remaining pads, and its log count."""

    keys: Tensor
    bias: Tensor


def embed_text(transformer: WanTransformer3DModel, hidden: Tensor, lengths: Tensor) -> Text:
    """Fold the pads of prompts into one key: n equal keys weigh as much as one whose score is log(n) higher.

    hidden is the text encoder's output (b, l, text_dim), lengths (b,) its true lengths.
    """
    length = hidden.shape[1]
    is_word = torch.arange(length, device=hidden.device) < lengths[:, None]
    hidden = F.pad(hidden * is_word[..., None], (0, 0, 0, 1))  # the pipelines zero what follows the prompt
    bias = torch.zeros(length + 1, device=hidden.device)
    bias[-1] = math.log(TEXT_LENGTH - length)
    return Text(transformer.condition_embedder.text_embedder(hidden), bias)


# For each block the weights that are not the model's own, by their names in the block.
Changed = Sequence[Mapping[str, Tensor]]


class FastTransformer:
    """WanTransformer3DModel's forward for clips whose tokens have only two times: that of the clip, and zero."""

    def __init__(self, transformer: WanTransformer3DModel, is_compiled: bool = False) -> None:
        self.model = transformer
        self._block = torch.compile(_block, dynamic=True) if is_compiled else _block

    def __call__(
        self, latents: Tensor, timestep: Tensor, is_given: Tensor, text: Text, changed: Changed | None = None
    ) -> Tensor:
        """Predicted velocity, like latents (b, 16, f, h, w).

        timestep is (b,) in [0, 1000]; is_given (b,) says whose first latent frame is clean, its tokens at time zero.
        changed has the weights that stand in for those of the model.
        """
        model = self.model
        b, _, f, h, w = latents.shape
        x = _linear_patches(model, latents)
        if torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()  # so that the first block is compiled as the others are
        cos, sin = (part[0, :, 0, ::2].contiguous() for part in model.rope(latents))
        is_first = torch.arange(x.shape[1], device=x.device) < h * w // 4
        is_clean = (is_given[:, None] & is_first)[..., None]
        temb, proj = self._time(torch.cat([timestep, timestep.new_zeros(1)]))
        for i, block in enumerate(model.blocks):
            weights = {**dict(block.named_parameters()), **(changed[i] if changed else {})}
            x = self._block(weights, x, text.keys, text.bias, cos, sin, proj, is_clean)
        shift, scale = (model.scale_shift_table + temb[:, None]).float().chunk(2, dim=1)
        x = F.layer_norm(x.float(), x.shape[-1:], eps=EPS) * (1 + _choose(scale, is_clean)) + _choose(shift, is_clean)
        x = model.proj_out(x).view(b, f, h // 2, w // 2, 2, 2, -1)
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(b, -1, f, h, w)

    def _time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        embedder = self.model.condition_embedder
        temb = embedder.time_embedder(embedder.timesteps_proj(timestep))
        return temb, embedder.time_proj(F.silu(temb)).unflatten(1, (6, -1))


def _linear_patches(model: WanTransformer3DModel, latents: Tensor) -> Tensor:
    """The patch embedding as a matrix product: (b, c, f, h, w) to (b, f * h/2 * w/2, d)."""
    b, c, f, h, w = latents.shape
    patches = latents.view(b, c, f, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6).reshape(b, -1, c * 4)
    return F.linear(patches, model.patch_embedding.weight.flatten(1), model.patch_embedding.bias).float()


def _choose(values: Tensor, is_clean: Tensor) -> Tensor:
    """Per token the value of its clip, or the last row (time zero) where it is clean; values (b + 1, 1, d)."""
    return torch.where(is_clean, values[-1:], values[:-1])


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (b, n, heads, d) by angles (n, d / 2), neighbours in pairs."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 32))


def _block(
    p: dict[str, Any], x: Tensor, text: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, proj: Tensor, is_clean: Tensor
) -> Tensor:
    """One WanTransformerBlock as a function of its parameters, so that all blocks share one compilation.

    x is (b, n, d) float32, proj (b + 1, 6, d) the time's shifts, scales and gates, its last row those of time zero.
    """
    mods = [_choose(m, is_clean) for m in (p["scale_shift_table"] + proj.float()).chunk(6, dim=1)]
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype

    y = (F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + mods[1]) + mods[0]).to(dtype)
    weight = torch.cat([p[f"attn1.to_{i}.weight"] for i in "qkv"]).to(dtype)
    offset = torch.cat([p[f"attn1.to_{i}.bias"] for i in "qkv"]).to(dtype)
    q, k, v = F.linear(y, weight, offset).chunk(3, dim=-1)
    q = _rotate(_heads(_rms(q, p["attn1.norm_q.weight"])), cos, sin).to(dtype)
    k = _rotate(_heads(_rms(k, p["attn1.norm_k.weight"])), cos, sin).to(dtype)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), _heads(v).transpose(1, 2))
    y = F.linear(y.transpose(1, 2).flatten(2), p["attn1.to_out.0.weight"].to(dtype), p["attn1.to_out.0.bias"].to(dtype))
    x = x + y * mods[2]

    y = F.layer_norm(x, x.shape[-1:], p["norm2.weight"], p["norm2.bias"], EPS).to(dtype)
    q = F.linear(y, p["attn2.to_q.weight"].to(dtype), p["attn2.to_q.bias"].to(dtype))
    k, v = (
        F.linear(text.to(dtype), p[f"attn2.to_{i}.weight"].to(dtype), p[f"attn2.to_{i}.bias"].to(dtype)) for i in "kv"
    )
    q = _heads(_rms(q, p["attn2.norm_q.weight"])).to(dtype).transpose(1, 2)
    k = _heads(_rms(k, p["attn2.norm_k.weight"])).to(dtype).transpose(1, 2)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5 + bias  # few keys, so this is small
    y = scores.softmax(-1).to(dtype) @ _heads(v).transpose(1, 2)
    y = F.linear(y.transpose(1, 2).flatten(2), p["attn2.to_out.0.weight"].to(dtype), p["attn2.to_out.0.bias"].to(dtype))
    x = x + y

    y = (F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + mods[4]) + mods[3]).to(dtype)
    y = F.gelu(
        F.linear(y, p["ffn.net.0.proj.weight"].to(dtype), p["ffn.net.0.proj.bias"].to(dtype)), approximate="tanh"
    )
    return x + F.linear(y, p["ffn.net.2.weight"].to(dtype), p["ffn.net.2.bias"].to(dtype)) * mods[5]


class FastTextEncoder:
    """UMT5EncoderModel's forward without its checks of the mask, which would make the host wait for the device."""

    def __init__(self, encoder: UMT5EncoderModel) -> None:
        self.model = encoder

    def __call__(self, tokens: Tensor) -> Tensor:
        """Hidden states (b, l, d) of token ids (b, l) padded with zeros."""
        stack = self.model.encoder
        x = stack.embed_tokens(tokens)
        mask = torch.where(tokens == 0, torch.finfo(x.dtype).min, 0.0)[:, None, None]
        for block in stack.block:
            attention, feed_forward = block.layer
            x = x + self._attend(attention.SelfAttention, attention.layer_norm(x), mask)
            x = x + feed_forward.DenseReluDense(feed_forward.layer_norm(x))
        return stack.final_layer_norm(x)

    @staticmethod
    def _attend(attention: UMT5Attention, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)
                   for part in (attention.q, attention.k, attention.v))  # fmt: skip
        scores = q @ k.transpose(-1, -2) + attention.compute_bias(x.shape[1], x.shape[1]) + mask
        return attention.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
