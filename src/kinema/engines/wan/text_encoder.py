"""UMT5's encoder (arXiv 2304.09151), which Wan reads prompts with: transformers' ``UMT5EncoderModel`` for one prompt.

It is T5's (arXiv 1910.10683) with a table of relative positions in every layer. One prompt at a time is encoded, on a
CPU at its own length, so nothing is padded or masked; ``text_graphs.py`` says what a GPU does. The operations and their
order are those of transformers, so that every bit of a result is too.

Axis letters: t tokens, d width, n heads, k width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from kinema.engines.wan.configs import TextEncoderConfig
from kinema.engines.wan.device_memory import bytes_of
from kinema.engines.wan.streaming import BlockStream, Layers, StreamedBlocks, move
from kinema.engines.wan.transformer.fp8_operations import ScaledRows, quantise

_TOKENS, _LAST_NORM = "shared.weight", "encoder.final_layer_norm.weight"
# A file may have the table of tokens under either name, or under both.
ALIASES = {_TOKENS: "encoder.embed_tokens.weight"}


def shapes(config: TextEncoderConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every weight, as transformers' files have them."""
    width, inner, hidden = config.d_model, config.num_heads * config.d_kv, config.d_ff
    found: dict[str, tuple[int, ...]] = {_TOKENS: (config.vocab_size, width)}
    for index in range(config.num_layers):
        attention, forward = _attention(index), _forward(index)
        found |= {f"{attention}.SelfAttention.{name}.weight": (inner, width) for name in "qkv"}
        found[f"{attention}.SelfAttention.o.weight"] = (width, inner)
        found[f"{attention}.SelfAttention.relative_attention_bias.weight"] = (
            config.relative_attention_num_buckets,
            config.num_heads,
        )
        found[f"{attention}.layer_norm.weight"] = (width,)
        found |= {f"{forward}.DenseReluDense.{name}.weight": (hidden, width) for name in ("wi_0", "wi_1")}
        found[f"{forward}.DenseReluDense.wo.weight"] = (width, hidden)
        found[f"{forward}.layer_norm.weight"] = (width,)
    found[_LAST_NORM] = (width,)
    return found


def _attention(index: int) -> str:
    return f"encoder.block.{index}.layer.0"


def _forward(index: int) -> str:
    return f"encoder.block.{index}.layer.1"


# (out, in), in the weights' type or in e4m3.
_Matrix = Tensor | ScaledRows


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer; ``positions`` is (buckets, n)."""

    norm: Tensor
    query: _Matrix
    key: _Matrix
    value: _Matrix
    out: _Matrix
    positions: Tensor
    norm_forward: Tensor
    gate: _Matrix
    up: _Matrix
    down: _Matrix


class TextEncoder:
    """The encoder with its weights, which stay where they are and are shared with ``weights``."""

    def __init__(self, config: TextEncoderConfig, weights: dict[str, Tensor]) -> None:
        """``weights`` has a tensor for each name in ``shapes(config)``."""
        self.config = config
        self.weights = weights
        self.device = weights[_TOKENS].device
        self._layers: Layers[_Layer] = [_layer(weights, index) for index in range(config.num_layers)]

    @property
    def device_bytes(self) -> int:
        """What the weights take of the device that computes, without layers that only pass by."""
        return bytes_of(self.weights, self._layers, device=self.device)

    @torch.inference_mode()
    def quantise(self, device: torch.device) -> None:
        """Keep the layers' matrices in e4m3 from now on, which ``device`` computes; the table of tokens stays.
        ``weights`` loses them layer by layer, so that no more than one is in memory twice."""
        layers = []
        for index, layer in enumerate(self._layers):
            found = {field: self.weights.pop(name) for field, name in _matrices(index).items()}
            quantised = {field: move(quantise(one.to(device)), one.device) for field, one in found.items()}
            layers.append(replace(layer, **quantised))  # type: ignore[arg-type] # all of them are matrices
        self._layers = layers

    def keep_in_host(self, stream: BlockStream) -> None:
        """Compute on the device of the ``stream`` from now on, with weights that were read into the host's memory and
        stay there; ``weights`` keeps those that are in no layer."""
        self.device = stream.device
        rest = {_TOKENS: self.weights[_TOKENS], _LAST_NORM: self.weights[_LAST_NORM].to(self.device)}
        left, self.weights, self._layers = list(self._layers), rest, ()
        count = len(left)
        left.reverse()
        self._layers = StreamedBlocks((left.pop() for _ in range(count)), count, stream)

    def __call__(self, tokens: list[int]) -> Tensor:
        """The states (1, t, d) of a prompt's tokens, in the weights' type."""
        return self.encode(self._numbers(tokens))

    def padded(self, tokens: list[int], length: int) -> Tensor:
        """The states (1, ``length``, d), of which the first are those of the tokens, to rounding."""
        count = torch.tensor(len(tokens), device=self.device)
        return self.encode(self._numbers(tokens + [0] * (length - len(tokens))), count)

    def _numbers(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], dtype=torch.long, device=self.weights[_TOKENS].device)

    def encode(self, numbers: Tensor, count: Tensor | None = None) -> Tensor:
        """The states (1, t, d) of tokens (1, t); no token attends to those behind the first ``count`` (scalar)."""
        hidden = functional.embedding(numbers, self.weights[_TOKENS]).to(self.device)
        buckets, hidden_keys = self._buckets(numbers.shape[1]), None
        if count is not None:
            hidden_keys = torch.arange(numbers.shape[1], device=self.device) >= count
        for layer in self._layers:
            hidden = _bounded(hidden + self._attend(layer, self._norm(hidden, layer.norm), buckets, hidden_keys))
            hidden = _bounded(hidden + _feed_forward(layer, self._norm(hidden, layer.norm_forward)))
        return self._norm(hidden, self.weights[_LAST_NORM])

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """RMS norm. It is float32 up to the product with the weight, which is in the weights' type."""
        variance = hidden.float().pow(2).mean(-1, keepdim=True)
        normed = hidden * torch.rsqrt(variance + self.config.layer_norm_epsilon)
        return weight * normed.to(weight.dtype)

    def _attend(self, layer: _Layer, normed: Tensor, buckets: Tensor, hidden_keys: Tensor | None) -> Tensor:
        """Attention without a scale; each layer has its own bias for a distance. ``hidden_keys`` (t,) are left out."""
        query, key, value = (self._heads(normed, matrix) for matrix in (layer.query, layer.key, layer.value))
        bias = functional.embedding(buckets, layer.positions).permute(2, 0, 1)[None]
        if hidden_keys is not None:
            bias = bias.masked_fill(hidden_keys, -math.inf)
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        return _multiply(seen.transpose(1, 2).flatten(2), layer.out)

    def _heads(self, normed: Tensor, matrix: _Matrix) -> Tensor:
        """(1, n, t, k)."""
        made = _multiply(normed, matrix)
        return made.view(1, len(made[0]), self.config.num_heads, self.config.d_kv).transpose(1, 2)

    def _buckets(self, num_tokens: int) -> Tensor:
        """The bucket (t, t) of each distance from a query (rows) to a key: half of them for keys that come later.

        Small distances have a bucket each; the larger ones share theirs, by the distance's logarithm.
        """
        config, places = self.config, torch.arange(num_tokens, device=self.device)
        distance = places[None, :] - places[:, None]
        num_buckets = config.relative_attention_num_buckets // 2
        first = (distance > 0).long() * num_buckets
        distance, num_exact = distance.abs(), num_buckets // 2
        ratio = torch.log(distance.float() / num_exact) / math.log(config.relative_attention_max_distance / num_exact)
        shared = num_exact + (ratio * (num_buckets - num_exact)).long()
        shared = torch.min(shared, torch.full_like(shared, num_buckets - 1))
        return first + torch.where(distance < num_exact, distance, shared)


def _layer(weights: Mapping[str, Tensor], index: int) -> _Layer:
    attention, forward = _attention(index), _forward(index)
    return _Layer(
        norm=weights[f"{attention}.layer_norm.weight"],
        positions=weights[f"{attention}.SelfAttention.relative_attention_bias.weight"],
        norm_forward=weights[f"{forward}.layer_norm.weight"],
        **{field: weights[name] for field, name in _matrices(index).items()},
    )


def _matrices(index: int) -> dict[str, str]:
    """The names of a layer's matrices in the files, by their names in ``_Layer``."""
    attention, forward = f"{_attention(index)}.SelfAttention", f"{_forward(index)}.DenseReluDense"
    return {
        "query": f"{attention}.q.weight",
        "key": f"{attention}.k.weight",
        "value": f"{attention}.v.weight",
        "out": f"{attention}.o.weight",
        "gate": f"{forward}.wi_0.weight",
        "up": f"{forward}.wi_1.weight",
        "down": f"{forward}.wo.weight",
    }


def _multiply(x: Tensor, matrix: _Matrix) -> Tensor:
    """The product (.., out) in the type of ``x`` (.., in), in which a matrix in e4m3 is restored."""
    return functional.linear(x, matrix.restored(x.dtype) if isinstance(matrix, ScaledRows) else matrix)


def _feed_forward(layer: _Layer, normed: Tensor) -> Tensor:
    """Gated by a GELU, whose approximation is that of BERT's first code."""
    x = _multiply(normed, layer.gate)
    gate = 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
    return _multiply(gate * _multiply(normed, layer.up), layer.down)


def _bounded(hidden: Tensor) -> Tensor:
    """In float16, whose range UMT5 leaves, infinity becomes a large number."""
    if hidden.dtype != torch.float16:
        return hidden
    largest = torch.finfo(hidden.dtype).max
    bound = torch.where(torch.isinf(hidden).any(), largest - 1000, largest)
    return torch.clamp(hidden, min=-bound, max=bound)
