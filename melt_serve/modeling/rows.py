"""What MELT keeps of the tokens it has seen: final rows, and the open chunk's rows per loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from melt_serve.config import MeltConfig


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
        """Which rows the tokens may look at before their last loop.

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


def cut(real: Tensor, lengths: Tensor, config: MeltConfig, prompt_lengths: Tensor | None = None) -> Iterator[Chunk]:
    """Cut new tokens into chunks on each sequence's own grid (README.md, section 3).

    Args:
        real: [B, S], true for tokens, false for padding, which does not count for the grid.
        lengths: [B], how many tokens of each sequence came in earlier calls.
        prompt_lengths: [B], `token` mode only: from this position on, every token is a chunk of its
            own, as in decoding. By default a call's tokens are prompt, and a single token is
            generated: a chunk of its own.

    Raises:
        ValueError: padding inside a sequence; or, in `token` mode, a prompt that goes on inside a chunk
            whose rows are final already.
    """
    if ((real[:, 1:] & ~real[:, :-1]).sum(-1) + real[:, 0] > 1).any():
        raise ValueError("attention_mask has a hole: padding may stand left or right of a sequence, not inside it")
    size = config.chunk_size
    positions = torch.where(real, lengths[:, None] + real.cumsum(-1) - 1, -1)
    ordinal = positions // size
    if config.decode_mode == "token":
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
    first = ordinal.masked_fill(~real, torch.iinfo(ordinal.dtype).max).amin(-1, keepdim=True)
    ordinal = torch.where(real, ordinal - first, -1)
    for index in range(int(ordinal.max()) + 1):
        members = ordinal == index
        counts = members.sum(-1, keepdim=True)
        within = torch.arange(int(counts.max()), device=real.device)[None]
        columns = (members.int().argmax(-1, keepdim=True) + within).clamp(max=real.shape[1] - 1)
        chunk_positions = torch.where(within < counts, positions.gather(1, columns), -1)
        start = chunk_positions[:, :1]
        yield Chunk(columns, chunk_positions, start if config.decode_mode == "token" else start // size * size, members)


def cut_packs(real: Tensor, document_starts: Tensor, size: int) -> Iterator[Chunk]:
    """Cut packs of documents into chunks: as many, and as wide, whatever is in the packs.

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


class MeltRows(Cache):
    """A Hugging Face cache of one final row a (layer, token), its size independent of the loops.

    In `chunk` mode it holds, beside them, the open chunk's rows of loops 1..T-1: at most C tokens a
    sequence. Rows are columns labelled with their position, so sequences of a batch may differ in
    length. `layers[i]` are the final rows of layer i, `layers[t * N + i]` the open ones of loop t.
    """

    def __init__(self, config: MeltConfig, batch_size: int, device: torch.device | str = "cpu"):
        super().__init__(layers=[DynamicLayer() for _ in range(config.num_hidden_layers)])
        self.config = config
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.final_positions = self.lengths.new_empty(batch_size, 0)
        self.open_positions = self.lengths.new_empty(batch_size, 0)
        self.loops: int | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns held, padding of ragged batches not counted: the longest sequence."""
        return int(self.lengths.max())

    def begin(self, chunk: Chunk, loops: int) -> tuple[Tensor, Tensor]:
        """Make room for a chunk's rows.

        Returns:
            Who may look where: [B, Q, keys before the last loop], [B, Q, keys at the last loop].

        Raises:
            ValueError: a chunk is open whose rows were made with another number of loops.
        """
        if self.open_positions.shape[1] and loops != self.loops:
            raise ValueError(f"the open chunk's rows were made with {self.loops} loops; it cannot go on with {loops}")
        self.loops = loops
        self.forget(chunk.positions[:, :1] == 0)
        self.open_positions = torch.cat((self.open_positions, chunk.positions), dim=-1)
        before_last = chunk.visible(self.final_positions, self.open_positions)
        self.final_positions = torch.cat((self.final_positions, chunk.positions), dim=-1)
        query, final = chunk.positions[:, :, None], self.final_positions[:, None]
        at_last = ((final >= 0) & (final <= query)) | (query < 0)
        return before_last, at_last

    def forget(self, begins: Tensor) -> Tensor:
        """Where a pack's next document begins, [B, 1], drop the rows of those before it.

        Returns:
            [W], which columns of final rows stay: those that any sequence still needs.
        """
        self.lengths = self.lengths.masked_fill(begins[:, 0], 0)
        self.open_positions = self.open_positions.masked_fill(begins, -1)
        self.final_positions = self.final_positions.masked_fill(begins, -1)
        needed = (self.final_positions >= 0).any(0)
        if not needed.all():
            self.final_positions = self.final_positions[:, needed]
            self.keep_columns(self.layers[: self.config.num_hidden_layers], needed)
        return needed

    def write(self, layer: int, loop: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write a chunk's rows of one loop, counted from 1; give the rows it may look at.

        Args:
            k, v: [B, KV heads, Q, D].

        Returns:
            K, V: [B, KV heads, keys, D], keys as `begin` said: final rows and the chunk's own.
        """
        final = self.layers[layer]
        if loop == self.loops:
            return final.update(k, v)
        if self.config.decode_mode == "chunk":
            index = loop * self.config.num_hidden_layers + layer
            while len(self.layers) <= index:
                self.layers.append(DynamicLayer())
            k, v = self.layers[index].update(k, v)
        if not final.is_initialized:
            return k, v
        return torch.cat((final.keys, k), dim=-2), torch.cat((final.values, v), dim=-2)

    def finish(self, chunk: Chunk) -> None:
        """Count the chunk's tokens and drop the rows per loop that no open chunk needs any more."""
        self.lengths = self.lengths + chunk.members.sum(-1)
        if self.config.decode_mode == "token":
            self.open_positions = self.open_positions[:, :0]
            return
        open_start = self.lengths // self.config.chunk_size * self.config.chunk_size
        needed = (self.open_positions >= open_start[:, None]).any(0)
        self.open_positions = self.open_positions[:, needed]
        if not needed.any():
            del self.layers[self.config.num_hidden_layers :]  # the next chunk may have other loops
        elif not needed.all():
            self.keep_columns(self.layers[self.config.num_hidden_layers :], needed)

    def keep_columns(self, layers: Iterable[DynamicLayer], needed: Tensor) -> None:
        """Drop all other columns of these rows; needed is [columns]."""
        for rows in layers:
            rows.keys, rows.values = rows.keys[:, :, needed], rows.values[:, :, needed]

    def final_rows(self, layer: int, sequence: int = 0) -> tuple[Tensor, Tensor]:
        """K and V of one layer and sequence, in order of position: two of [KV heads, tokens, D]."""
        columns = (self.final_positions[sequence] >= 0).nonzero().squeeze(-1)
        rows = self.layers[layer]
        return rows.keys[sequence, :, columns], rows.values[sequence, :, columns]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search: sequence i goes on from what sequence beam_idx[i] was."""
        super().reorder_cache(beam_idx)
        self._reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these sequences."""
        super().batch_select_indices(indices)
        self._reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence, next to itself."""
        super().batch_repeat_interleave(repeats)
        self._reorder(torch.arange(len(self.lengths), device=self.lengths.device).repeat_interleave(repeats))

    def _reorder(self, indices: Tensor) -> None:
        self.lengths = self.lengths[indices]
        self.final_positions = self.final_positions[indices]
        self.open_positions = self.open_positions[indices]

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a closed chunk's rows per loop are gone, so MELT cannot step back.

        Raises:
            ValueError: always (assisted generation is what asks for it).
        """
        raise ValueError("MELT rows cannot be taken back, so assisted generation is not supported")
