"""From noisy latents to velocities: the transformer of Wan (arXiv 2503.20314) over its tokens.

Both branches of the guidance begin with the same tokens and meet their texts in the first block's cross-attention, so
all before that is computed once. A block's last addition belongs to the next one's first norm, where memory is read
anyway. Letters: b branches, c channels, f latent frames, h and w latent rows and columns, d width, p values of a patch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.engines.wan.transformer.attention import Attention
from kinema.engines.wan.transformer.block_operations import Operations
from kinema.engines.wan.transformer.embeddings import Modulation, Rotation, Text
from kinema.engines.wan.transformer.fp8 import Fp8Linear
from kinema.engines.wan.transformer.network import Block, Network

# Up to so many tokens a branch leaves parts of a GPU idle, so both go through together.
_MAX_TOKENS_TOGETHER = 16_384


@dataclass(frozen=True)
class Shared:
    """Where the branches part: hidden states and the first cross-attention's queries, (1, tokens, d) each."""

    hidden: Tensor
    query: Tensor


class Forward:
    """One network with its operations and its self-attention, which is all that sees other tokens."""

    def __init__(self, network: Network, operations: Operations, attention: Attention) -> None:
        self._network = network
        self._operations = operations
        self._attention = attention

    @property
    def attention(self) -> Attention:
        """What it attends with."""
        return self._attention

    def velocities(self, latents: Tensor, modulation: Modulation, rotation: Rotation, text: Text) -> Tensor:
        """(b, c, f, h, w) of ``latents`` (1, c, f, h, w), one for each prompt of ``text``."""
        shared = self.begin(self.embed(latents), modulation, rotation)
        num_branches = len(text.counts)
        # Of all tokens, also where this forward has only some of them: whoever has the others must do the same.
        if math.prod(grid_of(self._network, latents.shape)) <= _MAX_TOKENS_TOGETHER:
            tokens = self.finish(shared, modulation, rotation, text)
        else:
            branches = [text.branch(index) for index in range(num_branches)]
            tokens = torch.cat([self.finish(shared, modulation, rotation, branch) for branch in branches])
        return self.unpatch(tokens, latents)

    def embed(self, latents: Tensor) -> Tensor:
        """Tokens (1, tokens, d), frame by frame, row by row."""
        (frames, rows, columns), (time, height, width) = grid_of(self._network, latents.shape), self._network.patch_size
        cut = latents.view(*latents.shape[:2], frames, time, rows, height, columns, width)
        # b c f pf h ph w pw -> b (f h w) (c pf ph pw), the order of the weights of a convolution
        return self._network.patch(cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3))

    def begin(self, tokens: Tensor, modulation: Modulation, rotation: Rotation) -> Shared:
        """Overwrites ``tokens``."""
        first = modulation.blocks[0]
        normed = self._operations.norm(tokens, first[0], first[1], modulation.num_clean)
        return Shared(tokens, self._attend(0, tokens, normed, modulation, rotation))

    def finish(self, shared: Shared, modulation: Modulation, rotation: Rotation, text: Text) -> Tensor:
        """(b, tokens, p) velocities of the patches; leaves ``shared`` as it is."""
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
            branch = self._feed_forward(block, normed)
        shift, scale = modulation.head
        gate = modulation.blocks[-1, 5]
        return self._network.head(operations.add_norm(hidden, branch, gate, shift, scale, num_clean))

    def unpatch(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """(b, c, f, h, w), in the size of ``latents``, of (b, tokens, p)."""
        frames, rows, columns = grid_of(self._network, latents.shape)
        cut = tokens.view(-1, frames, rows, columns, *self._network.patch_size, self._network.out_channels)
        # b f h w pf ph pw c -> b c (f pf) (h ph) (w pw)
        return cut.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _attend(self, index: int, hidden: Tensor, normed: Tensor, modulation: Modulation, rotation: Rotation) -> Tensor:
        """Self-attention, added to ``hidden``; returns the queries to the text."""
        operations, block = self._operations, self._network.blocks[index]
        query, key, value = operations.rotate(block.qkv(normed), block.norms, rotation)
        seen = block.out(self._attention(query, key, value).flatten(2))
        gate = modulation.blocks[index, 2]
        normed = operations.add_norm_affine(hidden, seen, gate, block.cross_norm, modulation.num_clean)
        return operations.norm_query(block.cross_q(normed), block.cross_norm_q)

    def _feed_forward(self, block: Block, normed: Tensor) -> Tensor:
        first, second = block.ffn_in, block.ffn_out
        if isinstance(first, Fp8Linear) or isinstance(second, Fp8Linear):
            assert isinstance(second, Fp8Linear), "a block's large layers are all of one kind"
            return second.after_gelu(first(normed))
        return second(self._operations.gelu_linear(normed, first))


def grid_of(network: Network, shape: torch.Size | tuple[int, ...]) -> tuple[int, int, int]:
    """How many tokens latents of the shape (.., f, h, w) have along each axis."""
    frames, rows, columns = (size // step for size, step in zip(shape[-3:], network.patch_size, strict=True))
    return frames, rows, columns
