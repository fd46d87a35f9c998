"""What MELT keeps of the tokens it has seen: final rows, and the open chunk's rows per loop."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from melt_serve.config import MeltConfig, chunk_start
from melt_serve.modeling.chunks import Chunk
from melt_serve.modeling.depth import TokenDepths
from melt_serve.modeling.looplm import RotaryTables, SelfAttention


class MeltRows(Cache):
    """A Hugging Face cache of one final row a (layer, token), its size independent of the loops.

    In `chunk` mode it holds, beside them, the open chunk's rows of loops 1..T-1: at most C tokens a
    sequence. Rows are columns labelled with their position, so sequences of a batch may differ in
    length. `layers[i]` are the final rows of layer i, `layers[t * N + i]` the open ones of loop t.
    """

    def __init__(self, config: MeltConfig, batch_size: int, device: torch.device | str = "cpu"):
        super().__init__(layers=[DynamicLayer() for _ in range(config.num_hidden_layers)])
        self.config = config
        self.chunk_size = config.chunk_size
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.final_positions = self.lengths.new_empty(batch_size, 0)
        self.open_positions = self.lengths.new_empty(batch_size, 0)
        self.loops: int | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens of the longest sequence; padding of ragged batches does not count."""
        return int(self.lengths.max())

    def begin(self, chunk: Chunk, loops: int) -> tuple[Tensor, Tensor] | None:
        """Make room for a chunk's rows; return which of all rows its tokens may look at, see `visible`.

        Raises:
            ValueError: a chunk is open whose rows were made with another number of loops.
        """
        if self.open_positions.shape[1] and loops != self.loops:
            raise ValueError(f"the open chunk's rows were made with {self.loops} loops; it cannot go on with {loops}")
        self.loops = loops
        self.forget(chunk.positions[:, :1] == 0)
        visible = self.visible(chunk)
        self.open_positions = torch.cat((self.open_positions, chunk.positions), dim=-1)
        self.final_positions = torch.cat((self.final_positions, chunk.positions), dim=-1)
        return visible

    def visible(self, chunk: Chunk) -> tuple[Tensor, Tensor] | None:
        """Mark the rows that the tokens of a new chunk may look at.

        Returns:
            [B, Q, keys before the last loop], [B, Q, keys at the last loop]; None where at every loop a token sees all
            rows there are, and its chunk's own up to itself.
        """
        open_positions = torch.cat((self.open_positions, chunk.positions), dim=-1)
        before_last = chunk.visible(self.final_positions, open_positions)
        query, final = chunk.positions[:, :, None], torch.cat((self.final_positions, chunk.positions), dim=-1)[:, None]
        at_last = ((final >= 0) & (final <= query)) | (query < 0)
        return before_last, at_last

    def begin_again(self, chunk: Chunk, generated: Tensor) -> Tensor:
        """Make room for the rows of a chunk's second pass, beside those of its first.

        Args:
            generated: [B, Q], the tokens that see the first pass's final rows.

        Returns:
            Which rows a token may look at, at any loop: [B, Q, keys].
        """
        return chunk.visible_again(self.final_positions, generated)

    def forget_first_pass(self, chunk: Chunk) -> None:
        """Drop the rows of a chunk's first pass: those of its second come after them, and stay."""
        width = chunk.positions.shape[1]
        needed = torch.ones(self.final_positions.shape[1] + width, dtype=torch.bool, device=self.lengths.device)
        needed[-2 * width : -width] = False
        self.keep_columns(self.whole_rows(), needed)

    def whole_rows(self) -> list[DynamicLayer]:
        """Return, for each layer, the rows with a column for every final position."""
        return self.layers[: self.config.num_hidden_layers]

    def forget(self, begins: Tensor) -> None:
        """Drop the rows of a pack's earlier documents where the next one begins, [B, 1]."""
        self.lengths = self.lengths.masked_fill(begins[:, 0], 0)
        self.open_positions = self.open_positions.masked_fill(begins, -1)
        self.final_positions = self.final_positions.masked_fill(begins, -1)
        needed = (self.final_positions >= 0).any(0)
        if not needed.all():
            self.final_positions = self.final_positions[:, needed]
            self.keep_columns(self.whole_rows(), needed)

    def begin_loop(self, chunk: Chunk, depths: TokenDepths) -> None:
        """Do nothing before a loop. Training counts here who runs it."""

    def write(
        self, layer: int, loop: int, attention: SelfAttention, n: Tensor, h: Tensor, tables: RotaryTables
    ) -> tuple[Tensor, Tensor]:
        """Write a chunk's rows of one loop, counted from 1, and return all rows that it may look at.

        Args:
            attention: projects the rows.
            n: [B, Q, d], which only training's rows need: they mix in those of a LoopLM.
            h: [B, Q, d], what the rows are projected from.

        Returns:
            K, V: [B, KV heads, keys, D], keys as `begin` said: final rows and the chunk's own.
        """
        k, v = attention.rows(h, tables)
        final = self.layers[layer]
        if loop == self.loops:
            return final.update(k, v)
        if self.config.decode_mode == "chunk":
            index = loop * self.config.num_hidden_layers + layer
            while len(self.layers) <= index:
                self.layers.append(DynamicLayer())
            k, v = self.layers[index].update(k, v)
        return self.beside(final, k, v) if final.is_initialized else (k, v)

    def beside(self, final: DynamicLayer, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's final rows, and a chunk's own of another loop beside them."""
        return torch.cat((final.keys, k), dim=-2), torch.cat((final.values, v), dim=-2)

    def observe(self, layer: int, loop: int, chunk: Chunk, o: Tensor) -> None:
        """Do nothing with an attention output o: [B, Q, d]. Training compares it with the teacher's."""

    def finish(self, chunk: Chunk) -> None:
        """Count the chunk's tokens and drop the rows per loop that no open chunk needs any more."""
        self.lengths = self.lengths + chunk.members.sum(-1)
        if self.config.decode_mode == "token":
            self.open_positions = self.open_positions[:, :0]
            return
        open_start = chunk_start(self.lengths, self.chunk_size)
        needed = (self.open_positions >= open_start[:, None]).any(0)
        self.open_positions = self.open_positions[:, needed]
        if not needed.any():
            del self.layers[self.config.num_hidden_layers :]  # the next chunk may have other loops
        elif not needed.all():
            self.keep_columns(self.layers[self.config.num_hidden_layers :], needed)

    def keep_columns(self, layers: Iterable[DynamicLayer], needed: Tensor) -> None:
        """Drop the columns of these rows that are not needed; needed is [columns]."""
        for rows in layers:
            rows.keys, rows.values = rows.keys[:, :, needed], rows.values[:, :, needed]

    def final_rows(self, layer: int, sequence: int = 0) -> tuple[Tensor, Tensor]:
        """Return K and V of one layer and sequence, in order of position: two of [KV heads, tokens, D]."""
        columns = (self.final_positions[sequence] >= 0).nonzero().squeeze(-1)
        rows = self.layers[layer]
        return rows.keys[sequence, :, columns], rows.values[sequence, :, columns]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the sequences for a beam search: sequence i continues what sequence beam_idx[i] was."""
        super().reorder_cache(beam_idx)
        self._reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the sequences with these indices."""
        super().batch_select_indices(indices)
        self._reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence, its copies next to it."""
        super().batch_repeat_interleave(repeats)
        self._reorder(torch.arange(len(self.lengths), device=self.lengths.device).repeat_interleave(repeats))

    def _reorder(self, indices: Tensor) -> None:
        self.lengths = self.lengths[indices]
        self.final_positions = self.final_positions[indices]
        self.open_positions = self.open_positions[indices]

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to drop tokens: a closed chunk's rows per loop are gone, so MELT cannot step back.

        Raises:
            ValueError: always (assisted generation is what asks for it).
        """
        raise ValueError("MELT rows cannot be taken back, so assisted generation is not supported")
