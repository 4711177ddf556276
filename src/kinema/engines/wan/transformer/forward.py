"""From noisy latents to velocities: the transformer of Wan (arXiv 2503.20314) over its tokens.

Both branches of the guidance begin with the same tokens, and their texts come in at the first block's cross-attention:
what is before that is computed once. A model that attends to pictures does so beside the text, with the same queries,
and adds the results. Then both go through each block, so that its weights are needed once in a step. A block's last
addition is done with the next one's first norm, which reads the same memory. Letters: b branches, i channels read, c
channels predicted, f latent frames, h and w latent rows and columns, d width, p values of a patch.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kinema.engines.wan.transformer.attention import Attention
from kinema.engines.wan.transformer.block_operations import BlockOperations
from kinema.engines.wan.transformer.embeddings import Modulation, Rotation, Text
from kinema.engines.wan.transformer.network import Block, Network

# With so many tokens or fewer a branch leaves parts of a GPU idle, so both are computed together.
MAX_TOKENS_TOGETHER = 16_384


@dataclass
class _Branch:
    """The tokens of one prompt, or of both together, between two parts of a block: ``hidden`` (b, tokens, d) without
    ``pending``, which the next part adds.
    """

    text: Text
    hidden: Tensor
    pending: Tensor | None = None


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

    def over(self, network: Network) -> Self:
        """The same over another network of the same shape."""
        other = copy(self)
        other._network = network
        return other

    def velocities(self, latents: Tensor, modulation: Modulation, rotation: Rotation, text: Text) -> Tensor:
        """The velocities (b, c, f, h, w) of ``latents`` (1, i, f, h, w), one for each prompt of ``text``."""
        # All tokens count, also where this forward has only some of them: the ranks with the others must do the same.
        is_together = math.prod(grid_of(self._network, latents.shape)) <= MAX_TOKENS_TOGETHER
        texts = [text] if is_together else [text.branch(index) for index in range(len(text.counts))]
        tokens = self.compute(self.embed(latents), modulation, rotation, texts)
        return self.unpatch(tokens, latents)

    def compute(self, tokens: Tensor, modulation: Modulation, rotation: Rotation, texts: list[Text]) -> Tensor:
        """The velocities (b, tokens, p) of the patches ``tokens`` (1, tokens, d), which are overwritten, with the
        prompts of ``texts``. All of them go through a block before the next one is asked for.
        """
        branches: list[_Branch] = []
        for index, block in enumerate(self._network.blocks):
            if index == 0:
                query = self.begin(block, tokens, modulation, rotation)
                for text in texts:
                    size = len(text.counts)
                    branches.append(_Branch(text, tokens.repeat(size, 1, 1)))
                    self._attend_text(index, block, branches[-1], query.expand(size, -1, -1), modulation)
                del query, tokens
                continue
            for branch in branches:
                query = self._attend_self(index, block, branch, modulation, rotation)
                self._attend_text(index, block, branch, query, modulation)
        return torch.cat([self._end(branch, modulation) for branch in branches])

    def embed(self, latents: Tensor) -> Tensor:
        """The tokens (1, tokens, d) of latents, frame by frame, row by row."""
        (frames, rows, columns), (time, height, width) = grid_of(self._network, latents.shape), self._network.patch_size
        cut = latents.view(*latents.shape[:2], frames, time, rows, height, columns, width)
        # b c f pf h ph w pw -> b (f h w) (c pf ph pw), the order of the weights of a convolution
        return self._network.patch(cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3))

    def begin(self, block: Block, tokens: Tensor, modulation: Modulation, rotation: Rotation) -> Tensor:
        """The first block up to its cross-attention, which all branches share: adds self-attention to ``tokens``, and
        returns the queries (1, tokens, d) to the text."""
        first = modulation.blocks[0]
        normed = self._operations.norm(tokens, first[0], first[1], modulation.num_clean)
        return self._attend(0, block, tokens, normed, modulation, rotation)

    def unpatch(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """``tokens`` (b, tokens, p) as velocities (b, c, f, h, w) in the size of ``latents``."""
        frames, rows, columns = grid_of(self._network, latents.shape)
        cut = tokens.view(-1, frames, rows, columns, *self._network.patch_size, self._network.out_channels)
        # b f h w pf ph pw c -> b c (f pf) (h ph) (w pw)
        return cut.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _attend_self(
        self, index: int, block: Block, branch: _Branch, modulation: Modulation, rotation: Rotation
    ) -> Tensor:
        """A block up to its cross-attention, after the addition that the one before left; the queries to the text."""
        tables, gate = modulation.blocks[index], modulation.blocks[index - 1, 5]
        normed = self._add(branch, gate, tables[0], tables[1], modulation.num_clean)
        return self._attend(index, block, branch.hidden, normed, modulation, rotation)

    def _attend_text(self, index: int, block: Block, branch: _Branch, query: Tensor, modulation: Modulation) -> None:
        """The rest of the block, without its last addition."""
        operations, tables, text = self._operations, modulation.blocks[index], branch.text
        seen = operations.attend_text(query, text.keys_values[index], text)
        if (images := text.images) is not None:
            seen += operations.attend_text(query, images.keys_values[index], images)
        branch.pending = block.cross_out(seen)
        del seen  # its memory is free before the feed-forward
        normed = self._add(branch, None, tables[3], tables[4], modulation.num_clean)
        branch.pending = block.feed_forward(normed, operations.gelu_linear)

    def _end(self, branch: _Branch, modulation: Modulation) -> Tensor:
        shift, scale = modulation.head
        return self._network.head(self._add(branch, modulation.blocks[-1, 5], shift, scale, modulation.num_clean))

    def _add(self, branch: _Branch, gate: Tensor | None, shift: Tensor, scale: Tensor, num_clean: int) -> Tensor:
        """Add what is pending, times its gate; return the norm of the sum."""
        assert branch.pending is not None, "every part of a block leaves something to add"
        normed = self._operations.add_norm(branch.hidden, branch.pending, gate, shift, scale, num_clean)
        branch.pending = None  # its memory is free before the next product
        return normed

    def _attend(
        self, index: int, block: Block, hidden: Tensor, normed: Tensor, modulation: Modulation, rotation: Rotation
    ) -> Tensor:
        """Add self-attention to ``hidden``; return the queries to the text."""
        operations = self._operations
        query, key, value = operations.rotate(block.qkv(normed), block.norms, rotation)
        seen = block.out(self._attention(query, key, value).flatten(2))
        gate = modulation.blocks[index, 2]
        normed = operations.add_norm_affine(hidden, seen, gate, block.cross_norm, modulation.num_clean)
        return operations.norm_query(block.cross_q(normed), block.cross_norm_q)


def grid_of(network: Network, shape: torch.Size | tuple[int, ...]) -> tuple[int, int, int]:
    """How many tokens latents of the shape (.., f, h, w) have along each axis."""
    frames, rows, columns = (size // step for size, step in zip(shape[-3:], network.patch_size, strict=True))
    return frames, rows, columns
