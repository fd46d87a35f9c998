"""KV rows in training: a MELT's, mixed with the LoopLM's, with gradients through all of them."""

from collections.abc import Iterable
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from melt_serve.config import MeltConfig
from melt_serve.modeling import MeltRows
from melt_serve.modeling.chunks import Chunk
from melt_serve.modeling.depth import TokenDepths
from melt_serve.modeling.looplm import RotaryTables, SelfAttention
from melt_serve.train.data.batch import Batch
from melt_serve.train.distil.losses import squared_distance
from melt_serve.train.stages import Distance


class TrainingRows(MeltRows):
    """A MELT's rows; with alpha below 1 also the LoopLM's of every loop, which only phase 1 needs.

    Attributes:
        distance: the sum over loops, layers and tokens of `squared_distance`; 0 without a teacher.
        loops_run: the loops that the tokens are expected to run, summed over tokens; None where none leaves early.
    """

    def __init__(
        self,
        config: MeltConfig,
        batch: Batch,
        alpha: float,
        teacher_attention: list[Tensor] | None,
        distance: Distance,
        thresholds: Tensor | None,
        detached: bool,
        chunked: bool,
        chunk_size: int | None,
    ):
        """Hold no rows yet.

        Args:
            alpha: the MELT's share in the rows that are seen.
            teacher_attention: see `Answers.attention`; None measures no distance.
            distance: see `squared_distance`.
            thresholds: [B, S], each token's exit threshold; None lets none leave early.
            detached: let no gradient flow from later chunks into a chunk's rows.
            chunked: let many copies of the rows share their memory.
            chunk_size: C, by default the config's.
        """
        device = batch.input_ids.device
        super().__init__(config, len(batch.input_ids), device)
        self.chunk_size = chunk_size or config.chunk_size
        self.alpha = alpha
        self.looplm: dict[tuple[int, int], DynamicLayer | ChunkedRows] = {}
        self.kind = ChunkedRows if chunked else DynamicLayer
        self.layers: list[DynamicLayer | ChunkedRows] = [self.kind() for _ in range(config.num_hidden_layers)]
        self.teacher_attention = teacher_attention
        self.distance_kind = distance
        self.thresholds = thresholds
        self.detached = detached
        self.distance = torch.zeros((), device=device)
        self.loops_run = None if thresholds is None else torch.zeros((), device=device)

    def begin(self, chunk: Chunk, loops: int) -> tuple[Tensor, Tensor] | None:
        """Make room for a chunk's rows, and remember what was counted before it."""
        self.counted = self.distance, self.loops_run
        return super().begin(chunk, loops)

    def visible(self, chunk: Chunk) -> tuple[Tensor, Tensor] | None:
        """Mark the rows that a chunk's tokens may look at; nothing where a flash kernel needs no mask.

        A sequence that ended before this chunk has rows that nobody looks at, and padding may look at any.
        """
        seen = (self.final_positions >= 0) & (self.final_positions < chunk.start)
        return None if (seen | (chunk.start < 0)).all() else super().visible(chunk)

    def begin_again(self, chunk: Chunk, generated: Tensor) -> Tensor:
        """Make room for the rows of a chunk's second pass, and count that one alone."""
        self.distance, self.loops_run = self.counted
        return super().begin_again(chunk, generated)

    def begin_loop(self, chunk: Chunk, depths: TokenDepths) -> None:
        """Count the loop that is about to run, weighed by each token's probability to run it."""
        if self.loops_run is not None:
            self.loops_run = self.loops_run + depths.remaining[chunk.positions >= 0].sum()

    def write(
        self, layer: int, loop: int, attention: SelfAttention, n: Tensor, h: Tensor, tables: RotaryTables
    ) -> tuple[Tensor, Tensor]:
        """Write a chunk's rows, and return alpha * KV_MELT + (1 - alpha) * KV_LoopLM, of the past and of the chunk."""
        k, v = super().write(layer, loop, attention, n, h, tables)
        if self.alpha == 1:
            return k, v
        past = self.looplm.setdefault((layer, loop), self.kind())
        k_looplm, v_looplm = past.update(*attention.rows(n, tables))
        return torch.lerp(k_looplm, k, self.alpha), torch.lerp(v_looplm, v, self.alpha)

    def beside(self, final: Any, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return final rows, which may be in pieces, and a chunk's own of another loop beside them."""
        return final.joined(torch.stack((k, v))) if isinstance(final, ChunkedRows) else super().beside(final, k, v)

    def observe(self, layer: int, loop: int, chunk: Chunk, o: Tensor) -> None:
        """Add the distance of o, [B, Q, d], to the teacher's attention output."""
        if self.teacher_attention is None:
            return
        o_teacher = self.teacher_attention[(loop - 1) * self.config.num_hidden_layers + layer]
        o_teacher = o_teacher.gather(1, chunk.columns[:, :, None].expand_as(o))
        self.distance = self.distance + squared_distance(o_teacher, o, chunk.positions >= 0, self.distance_kind)

    def whole_rows(self) -> list[Any]:
        """Return the rows with a column for every final position: the MELT's, and the LoopLM's of every loop."""
        return [*super().whole_rows(), *self.looplm.values()]

    def keep_columns(self, layers: Iterable[Any], needed: Tensor) -> None:
        """Drop the columns of these rows that are not needed, also where they are in pieces; needed is [columns]."""
        for rows in layers:
            if isinstance(rows, ChunkedRows):
                rows.keep(needed)
            else:
                super().keep_columns([rows], needed)

    def finish(self, chunk: Chunk) -> None:
        """Count the chunk's tokens, and drop all open rows: a batch is one call, and nothing goes on with it."""
        super().finish(chunk)
        self.open_positions = self.open_positions[:, :0]
        del self.layers[self.config.num_hidden_layers :]
        if self.detached:
            for rows in (*self.layers, *self.looplm.values()):
                if isinstance(rows, ChunkedRows):
                    rows.pieces = tuple(piece.detach() for piece in rows.pieces)
                else:
                    rows.keys, rows.values = rows.keys.detach(), rows.values.detach()

    def copied(self) -> "TrainingRows":
        """Copy these rows, so that writes to the copy do not change them; memory is shared."""
        other = copy(self)
        other.layers = [copy(rows) for rows in self.layers]
        other.looplm = {key: copy(rows) for key, rows in self.looplm.items()}
        return other


class ChunkedRows:
    """Rows of one layer as the chunks wrote them, joined anew at each read, so that copies share all memory.

    Attributes:
        pieces: K and V of a chunk, together [2, B, KV heads, tokens, D]: half as many gradients to add up.
    """

    def __init__(self) -> None:
        self.pieces: tuple[Tensor, ...] = ()

    @property
    def is_initialized(self) -> bool:
        """Whether any chunk has written rows."""
        return bool(self.pieces)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add a chunk's rows and return K and V of all chunks, [B, KV heads, tokens, D] each."""
        self.pieces = (*self.pieces, torch.stack((keys, values)))
        return self.joined()

    def joined(self, *more: Tensor) -> tuple[Tensor, Tensor]:
        """Return K and V of all chunks, and of more pieces that are not added."""
        keys, values = torch.cat((*self.pieces, *more), dim=-2).unbind()
        return keys, values

    def keep(self, needed: Tensor) -> None:
        """Drop the columns that are not needed; needed is [tokens]."""
        parts = needed.split([piece.shape[-2] for piece in self.pieces])
        self.pieces = tuple(
            piece if part.all() else piece[..., part, :]
            for piece, part in zip(self.pieces, parts, strict=True)
            if part.any()
        )
