"""Sequence parallelism: each rank has a part of the tokens (Ulysses, arXiv 2309.14509).

Only the self-attention of a block looks at more than one token. Before it the ranks exchange, so that each has all
tokens of its part of the heads; it attends, and sends every rank the results of that rank's tokens. The texts are not
split. Any number of tokens works: the parts differ by one at most. Letters: b branches, l tokens of a rank, p values of
a patch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kinema.engines.wan.device_memory import DeviceMemory
from kinema.engines.wan.needs import MeasuredNeed
from kinema.engines.wan.ranks.group import Group
from kinema.engines.wan.transformer.attention import Attention
from kinema.engines.wan.transformer.embeddings import Modulation, Rotation, Text, modulate
from kinema.engines.wan.transformer.forward import Forward, grid_of
from kinema.engines.wan.transformer.model import PreparedRequest, WanTransformer


def parts_of(num_tokens: int, num_ranks: int) -> list[int]:
    """The number of tokens of each rank."""
    share, rest = divmod(num_tokens, num_ranks)
    return [share + (rank < rest) for rank in range(num_ranks)]


class ExchangedAttention:
    """An ``Attention`` over tokens that are split among the ranks."""

    def __init__(self, attention: Attention, group: Group) -> None:
        self._attention = attention
        self._group = group
        # The tokens of each rank, set before each forward.
        self.parts: list[int] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention for this rank's tokens; query, key, value and result are (b, l, heads, head_dim)."""
        ranks, mine = self._group.num_ranks, query.shape[1]
        # Tokens come first, so that received parts lie one after another: (ranks, l, b, 3, heads of a rank, head_dim).
        split = [_part_heads(x, ranks).permute(2, 1, 0, 3, 4) for x in (query, key, value)]
        sent = torch.stack(split, dim=3).flatten(0, 1)
        q, k, v = self._group.exchange(sent, [mine] * ranks, self.parts).transpose(0, 1).unbind(2)
        seen = self._attention(q, k, v).transpose(0, 1)
        back = self._group.exchange(seen, self.parts, [mine] * ranks)
        return back.view(ranks, mine, *back.shape[1:]).permute(2, 1, 0, 3, 4).flatten(2, 3)


def _part_heads(x: Tensor, ranks: int) -> Tensor:
    """``x`` as a view (b, l, ranks, heads of a rank, head_dim)."""
    return x.view(*x.shape[:2], ranks, -1, x.shape[3])


class ShardedForward(Forward):
    """A ``Forward`` over this rank's tokens; all ranks call it together."""

    def __init__(self, transformer: WanTransformer, attention: Attention, group: Group) -> None:
        self._exchanged = ExchangedAttention(attention, group)
        super().__init__(transformer.network, transformer.operations, self._exchanged)
        self._group = group

    def velocities(self, latents: Tensor, modulation: Modulation, rotation: Rotation, text: Text) -> Tensor:
        """The velocities that one device would compute, the same on every rank."""
        start, stop = self._share(latents)
        return super().velocities(latents, modulation.shard(start, stop), rotation.shard(start, stop), text)

    def embed(self, latents: Tensor) -> Tensor:
        start, stop = self._share(latents)
        return super().embed(latents)[:, start:stop].contiguous()

    def unpatch(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """Collect all ranks' ``tokens`` (b, l, p), and order them as velocities."""
        ranks, parts = self._group.num_ranks, self._exchanged.parts
        sent = tokens.transpose(0, 1).repeat(ranks, 1, 1)
        gathered = self._group.exchange(sent, [tokens.shape[1]] * ranks, parts)
        return super().unpatch(gathered.transpose(0, 1).contiguous(), latents)

    def _share(self, latents: Tensor) -> tuple[int, int]:
        """The first of this rank's tokens, and the first behind them."""
        parts = parts_of(math.prod(grid_of(self._network, latents.shape)), self._group.num_ranks)
        self._exchanged.parts = parts
        start = sum(parts[: self._group.rank])
        return start, start + parts[self._group.rank]


class ShardedTransformer:
    """Computes a transformer's velocities by all ranks together, as ``forward`` shares them. It has no CUDA graphs,
    since a step that is worth splitting keeps a GPU busy without.
    """

    def __init__(self, transformer: WanTransformer, forward: Forward, memory: DeviceMemory | None = None) -> None:
        self._transformer = transformer
        self._forward = forward
        self._memory = memory
        # What a step takes by the latents' size, on this rank.
        self._need = MeasuredNeed()

    def reserve(self, prepared: PreparedRequest, latents: Tensor) -> None:
        """Take what a step needs, by what was measured of others, and let it go: a rank that fails in the middle of an
        exchange costs all of them. Raises torch.OutOfMemoryError.
        """
        self._transformer.expand(prepared)
        self._transformer.reserve()
        need = None if self._memory is None else self._need.line()
        if need is not None:
            torch.empty(int(need.bytes_for(latents.numel())), dtype=torch.uint8, device=latents.device)

    def velocities(self, prepared: PreparedRequest, latents: Tensor, index: int) -> Tensor:
        """See ``WanTransformer.velocities``; all ranks call it together, after all of them could ``reserve``."""
        if self._memory is None:
            return self._compute(prepared, latents, index)
        self._memory.begin_peak()
        velocities = self._compute(prepared, latents, index)
        self._need.observe(latents.numel(), self._memory.peak_bytes() - self._memory.allocated_bytes())
        return velocities

    def _compute(self, prepared: PreparedRequest, latents: Tensor, index: int) -> Tensor:
        network, expanded = self._transformer.network_of(prepared), self._transformer.expand(prepared)
        modulation = modulate(network, *prepared.times.rows(index), prepared.num_clean)
        return self._forward.over(network).velocities(latents, modulation, expanded.rotation, expanded.text)
