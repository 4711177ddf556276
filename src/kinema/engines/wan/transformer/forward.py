"""From noisy latents to velocities: the transformer of Wan (arXiv 2503.20314) over its tokens.

Both branches of the guidance begin with the same tokens, and their texts come in at the first block's cross-attention:
what is before that is computed once. A block's last addition is done with the next one's first norm, which reads the
same memory. Letters: b branches, c channels, f latent frames, h and w latent rows and columns, d width, p values of a
patch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.engines.wan.transformer.attention import Attention
from kinema.engines.wan.transformer.block_operations import BlockOperations
from kinema.engines.wan.transformer.embeddings import Modulation, Rotation, Text
from kinema.engines.wan.transformer.network import Network

# With so many tokens or fewer a branch leaves parts of a GPU idle, so both are computed together.
_MAX_TOKENS_TOGETHER = 16_384


@dataclass(frozen=True)
class Shared:
    """What both branches share: hidden states and the first cross-attention's queries, (1, tokens, d) each."""

    hidden: Tensor
    query: Tensor


class Forward:
    """One network with its operations and its self-attention; only the latter sees other tokens."""

    def __init__(self, network: Network, operations: BlockOperations, attention: Attention) -> None:
        self._network = network
        self._operations = operations
        self._attention = attention

    @property
    def attention(self) -> Attention:
        """The self-attention."""
        return self._attention

    def velocities(self, latents: Tensor, modulation: Modulation, rotation: Rotation, text: Text) -> Tensor:
        """The velocities (b, c, f, h, w) of ``latents`` (1, c, f, h, w), one for each prompt of ``text``."""
        shared = self.begin(self.embed(latents), modulation, rotation)
        num_branches = len(text.counts)
        # All tokens count, also where this forward has only some of them: the ranks with the others must do the same.
        if math.prod(grid_of(self._network, latents.shape)) <= _MAX_TOKENS_TOGETHER:
            tokens = self.finish(shared, modulation, rotation, text)
        else:
            branches = [text.branch(index) for index in range(num_branches)]
            tokens = torch.cat([self.finish(shared, modulation, rotation, branch) for branch in branches])
        return self.unpatch(tokens, latents)

    def embed(self, latents: Tensor) -> Tensor:
        """The tokens (1, tokens, d) of latents, frame by frame, row by row."""
        (frames, rows, columns), (time, height, width) = grid_of(self._network, latents.shape), self._network.patch_size
        cut = latents.view(*latents.shape[:2], frames, time, rows, height, columns, width)
        # b c f pf h ph w pw -> b (f h w) (c pf ph pw), the order of the weights of a convolution
        return self._network.patch(cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3))

    def begin(self, tokens: Tensor, modulation: Modulation, rotation: Rotation) -> Shared:
        """The first block up to its cross-attention. Overwrites ``tokens``."""
        first = modulation.blocks[0]
        normed = self._operations.norm(tokens, first[0], first[1], modulation.num_clean)
        return Shared(tokens, self._attend(0, tokens, normed, modulation, rotation))

    def finish(self, shared: Shared, modulation: Modulation, rotation: Rotation, text: Text) -> Tensor:
        """All that follows: the velocities (b, tokens, p) of the patches. Leaves ``shared`` as it is."""
        operations, num_clean = self._operations, modulation.num_clean
        size = len(text.counts)
        hidden = shared.hidden.repeat(size, 1, 1)
        query = shared.query.expand(size, -1, -1)
        branch = hidden
        for index, block in enumerate(self._network.blocks):
            tables = modulation.blocks[index]
            if index > 0:
                gate = modulation.blocks[index - 1, 5]
                normed = operations.add_norm(hidden, branch, gate, tables[0], tables[1], num_clean)
                query = self._attend(index, hidden, normed, modulation, rotation)
            read = block.cross_out(operations.attend_text(query, text.keys_values[index], text))
            normed = operations.add_norm(hidden, read, None, tables[3], tables[4], num_clean)
            branch = block.feed_forward(normed, operations.gelu_linear)
        shift, scale = modulation.head
        gate = modulation.blocks[-1, 5]
        return self._network.head(operations.add_norm(hidden, branch, gate, shift, scale, num_clean))

    def unpatch(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """``tokens`` (b, tokens, p) as velocities (b, c, f, h, w) in the size of ``latents``."""
        frames, rows, columns = grid_of(self._network, latents.shape)
        cut = tokens.view(-1, frames, rows, columns, *self._network.patch_size, self._network.out_channels)
        # b f h w pf ph pw c -> b c (f pf) (h ph) (w pw)
        return cut.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _attend(self, index: int, hidden: Tensor, normed: Tensor, modulation: Modulation, rotation: Rotation) -> Tensor:
        """Add self-attention to ``hidden``; return the queries to the text."""
        operations, block = self._operations, self._network.blocks[index]
        query, key, value = operations.rotate(block.qkv(normed), block.norms, rotation)
        seen = block.out(self._attention(query, key, value).flatten(2))
        gate = modulation.blocks[index, 2]
        normed = operations.add_norm_affine(hidden, seen, gate, block.cross_norm, modulation.num_clean)
        return operations.norm_query(block.cross_q(normed), block.cross_norm_q)


def grid_of(network: Network, shape: torch.Size | tuple[int, ...]) -> tuple[int, int, int]:
    """How many tokens latents of the shape (.., f, h, w) have along each axis."""
    frames, rows, columns = (size // step for size, step in zip(shape[-3:], network.patch_size, strict=True))
    return frames, rows, columns
