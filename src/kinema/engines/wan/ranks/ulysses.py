"""Sequence parallelism: each rank has a part of the tokens (Ulysses, arXiv 2309.14509).

All of a block but its self-attention treats each token by itself. There the ranks exchange: each gets all tokens of its
part of the heads, attends, and gives every rank what belongs to its tokens. The texts are not split. Any number of
tokens works, since the parts differ by one at most. Letters: b branches, l tokens of a rank, p values of a patch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kinema.engines.wan.ranks.group import Group
from kinema.engines.wan.transformer.attention import Attention
from kinema.engines.wan.transformer.embeddings import Modulation, Rotation, Text, modulate
from kinema.engines.wan.transformer.forward import Forward, grid_of
from kinema.engines.wan.transformer.model import Prepared, WanTransformer


def parts_of(num_tokens: int, num_ranks: int) -> list[int]:
    """How many tokens each rank has."""
    share, rest = divmod(num_tokens, num_ranks)
    return [share + (rank < rest) for rank in range(num_ranks)]


class ExchangedAttention:
    """An ``Attention`` of tokens that are spread over the ranks."""

    def __init__(self, attention: Attention, group: Group) -> None:
        self._attention = attention
        self._group = group
        # Set before each forward.
        self.parts: list[int] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(b, l, heads, head_dim) each, of this rank's tokens."""
        ranks, mine = self._group.num_ranks, query.shape[1]
        # Tokens first, so that the parts which come lie one after another: (ranks, l, b, 3, heads of a rank, head_dim).
        split = [_part_heads(x, ranks).permute(2, 1, 0, 3, 4) for x in (query, key, value)]
        sent = torch.stack(split, dim=3).flatten(0, 1)
        q, k, v = self._group.exchange(sent, [mine] * ranks, self.parts).transpose(0, 1).unbind(2)
        seen = self._attention(q, k, v).transpose(0, 1)
        back = self._group.exchange(seen, self.parts, [mine] * ranks)
        return back.view(ranks, mine, *back.shape[1:]).permute(2, 1, 0, 3, 4).flatten(2, 3)


def _part_heads(x: Tensor, ranks: int) -> Tensor:
    """(b, l, ranks, heads of a rank, head_dim), as a view."""
    return x.view(*x.shape[:2], ranks, -1, x.shape[3])


class ShardedForward(Forward):
    """A Forward of this rank's tokens; all ranks call it together."""

    def __init__(self, transformer: WanTransformer, attention: Attention, group: Group) -> None:
        self._exchanged = ExchangedAttention(attention, group)
        super().__init__(transformer.network, transformer.operations, self._exchanged)
        self._group = group

    def velocities(self, latents: Tensor, modulation: Modulation, rotation: Rotation, text: Text) -> Tensor:
        """As of one device, and the same on every rank."""
        start, stop = self._share(latents)
        return super().velocities(latents, modulation.shard(start, stop), rotation.shard(start, stop), text)

    def embed(self, latents: Tensor) -> Tensor:
        start, stop = self._share(latents)
        return super().embed(latents)[:, start:stop].contiguous()

    def unpatch(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """``tokens`` (b, l, p)."""
        ranks, parts = self._group.num_ranks, self._exchanged.parts
        sent = tokens.transpose(0, 1).repeat(ranks, 1, 1)
        gathered = self._group.exchange(sent, [tokens.shape[1]] * ranks, parts)
        return super().unpatch(gathered.transpose(0, 1).contiguous(), latents)

    def _share(self, latents: Tensor) -> tuple[int, int]:
        """From which token on and up to which one this rank has them."""
        parts = parts_of(math.prod(grid_of(self._network, latents.shape)), self._group.num_ranks)
        self._exchanged.parts = parts
        start = sum(parts[: self._group.rank])
        return start, start + parts[self._group.rank]


class ShardedTransformer:
    """A transformer's velocities, computed by all ranks together. Without CUDA graphs: what is worth splitting keeps
    a GPU busy by itself.
    """

    def __init__(self, transformer: WanTransformer, attention: Attention, group: Group) -> None:
        self._network = transformer.network
        self._forward = ShardedForward(transformer, attention, group)

    def velocities(self, prepared: Prepared, latents: Tensor, index: int) -> Tensor:
        """As ``WanTransformer.velocities``."""
        modulation = modulate(self._network, *prepared.times.rows(index), prepared.num_clean)
        return self._forward.velocities(latents, modulation, prepared.rotation, prepared.text)
