"""Where a sequence is cut into chunks, and which rows a chunk's tokens may look at (README.md, section 3)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from melt_serve.config import DecodeMode, chunk_start


@dataclass(frozen=True)
class Chunk:
    """The tokens that run their loops together: at most C of every sequence in the batch.

    Attributes:
        columns: [B, Q], where each token stands in the caller's input.
        positions: [B, Q], its place in its own sequence; -1 where a sequence has fewer than Q tokens here.
        start: [B, 1], the position where the chunk begins: rows below it are seen in their final form.
        members: [B, S], true for the caller's tokens that are in this chunk.
    """

    columns: Tensor
    positions: Tensor
    start: Tensor
    members: Tensor

    def visible(self, final_positions: Tensor, open_positions: Tensor) -> Tensor:
        """Mark the rows that the tokens may look at before their last loop.

        Args:
            final_positions: [B, W], the positions of the final rows; -1 for no row.
            open_positions: [B, O], those of the chunk's own rows of the same loop.

        Returns:
            [B, Q, W + O]: final rows of earlier chunks, and the chunk's own rows causally.
        """
        query, start = self.positions[:, :, None], self.start[:, :, None]
        final, own = final_positions[:, None], open_positions[:, None]
        earlier_chunks = (final >= 0) & (final < start)
        own_chunk = (own >= start) & (own <= query)
        padding = query < 0  # padding sees all: its softmax must not be empty
        return torch.cat(((earlier_chunks | padding), (own_chunk | padding)), dim=-1)

    def visible_again(self, final_positions: Tensor, generated: Tensor) -> Tensor:
        """Mark the rows that the tokens may look at in the second of two passes, at any loop (README.md, section 3).

        Args:
            final_positions: [B, W + Q], the positions of the final rows of earlier chunks, and of the first pass.
            generated: [B, Q], the tokens that look at final rows of their own chunk.

        Returns:
            [B, Q, W + 2 Q]: those, and the chunk's own rows.
        """
        query, start, generated = self.positions[:, :, None], self.start[:, :, None], generated[:, :, None]
        final, own = final_positions[:, None], self.positions[:, None]
        final_rows = (final >= 0) & (final < torch.where(generated, query, start))
        own_rows = (own <= query) & (own >= torch.where(generated, query, start))
        padding = query < 0
        return torch.cat((final_rows | padding, own_rows | padding), dim=-1)


def cut(
    real: Tensor, lengths: Tensor, size: int, mode: DecodeMode, prompt_lengths: Tensor | None = None
) -> Iterator[Chunk]:
    """Cut new tokens into chunks on each sequence's own grid (README.md, section 3).

    Args:
        real: [B, S], true for tokens, false for padding, which does not count for the grid.
        lengths: [B], how many tokens of each sequence came in earlier calls.
        size: C.
        prompt_lengths: [B], `token` mode only: from this position on, every token is a chunk of its
            own, as in decoding. By default a call's tokens are prompt, and a single token is
            generated: a chunk of its own.

    Raises:
        ValueError: padding inside a sequence; or, in `token` mode, a prompt that goes on inside a chunk
            whose rows are final already.
    """
    if ((real[:, 1:] & ~real[:, :-1]).sum(-1) + real[:, 0] > 1).any():
        raise ValueError("attention_mask has a hole: padding may stand left or right of a sequence, not inside it")
    positions = torch.where(real, lengths[:, None] + real.cumsum(-1) - 1, -1)
    ordinal = positions // size
    if mode == "token":
        if prompt_lengths is not None:
            generated = positions - prompt_lengths[:, None]
            prompt_chunks = -(-prompt_lengths[:, None] // size)
            ordinal = torch.where(generated < 0, ordinal, prompt_chunks + generated)
            inside = (lengths % size != 0) & (lengths < prompt_lengths) & real.any(-1)
        else:
            inside = (lengths % size != 0) & (real.sum(-1) > 1)
        if inside.any():
            raise ValueError(
                f"in token mode a prompt's next piece must begin on a multiple of chunk_size={size}, "
                f"not at position {int(lengths[inside][0])}: the rows before it are final"
            )
    lowest = ordinal.masked_fill(~real, torch.iinfo(ordinal.dtype).max).amin(-1, keepdim=True)
    ordinal = torch.where(real, ordinal - lowest, -1)
    for index in range(int(ordinal.max()) + 1):
        members = ordinal == index
        counts = members.sum(-1, keepdim=True)
        within = torch.arange(int(counts.max()), device=real.device)[None]
        columns = (members.int().argmax(-1, keepdim=True) + within).clamp(max=real.shape[1] - 1)
        chunk_positions = torch.where(within < counts, positions.gather(1, columns), -1)
        first = chunk_positions[:, :1]
        start = first if mode == "token" else chunk_start(first, size)
        yield Chunk(columns, chunk_positions, start, members)


def cut_packs(real: Tensor, document_starts: Tensor, size: int) -> Iterator[Chunk]:
    """Cut packs of documents into chunks, whose number and widths do not depend on the documents.

    Args:
        real: [B, S], true for tokens; padding may stand after every document.
        document_starts: [B, S], the column where each token's document begins.
        size: C.

    Raises:
        ValueError: a document begins off the grid, or has a hole.
    """
    columns = torch.arange(real.shape[1], device=real.device).expand_as(real)
    begins = columns == document_starts
    if (astray := document_starts[real & begins & (columns % size != 0)]).numel():
        raise ValueError(f"a document begins at column {int(astray[0])} of a pack, no multiple of chunk_size={size}")
    follows = F.pad(real[:, :-1] & (document_starts[:, 1:] == document_starts[:, :-1]), (1, 0))
    if (real & ~begins & ~follows).any():
        raise ValueError("a document of a pack has a hole: its tokens must follow each other from its start on")
    positions = torch.where(real, columns - document_starts, -1)
    for chunk_columns in columns.split(size, dim=-1):
        chunk_positions = positions.gather(1, chunk_columns)
        members = real & (columns // size == chunk_columns[:, :1] // size)
        yield Chunk(chunk_columns, chunk_positions, chunk_positions[:, :1], members)
