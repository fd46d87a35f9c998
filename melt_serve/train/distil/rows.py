"""KV rows in training: a MELT's, mixed with the LoopLM's, with gradients through all of them."""

from collections.abc import Iterable
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from melt_serve.config import MeltConfig
from melt_serve.modeling import MeltRows
from melt_serve.modeling.depth import ChunkDepths
from melt_serve.modeling.rows import Chunk
from melt_serve.train.data.batch import Batch
from melt_serve.train.distil.losses import squared_distance


class TrainingRows(MeltRows):
    """MELT's rows; with alpha below 1 also the LoopLM's of every loop, as only phase 1 needs them."""

    def __init__(
        self,
        config: MeltConfig,
        batch: Batch,
        alpha: float,
        teacher_attention: list[Tensor] | None,
        thresholds: Tensor | None,
        detached: bool,
        chunked: bool,
    ):
        """Before the first chunk.

        Args:
            detached: a chunk's rows take no gradient from later ones.
            chunked: many copies of the rows share their memory.
        """
        device = batch.input_ids.device
        super().__init__(config, len(batch.input_ids), device)
        self.alpha = alpha
        self.looplm: dict[tuple[int, int], DynamicLayer | ChunkedRows] = {}
        self.kind = ChunkedRows if chunked else DynamicLayer
        self.layers: list[DynamicLayer | ChunkedRows] = [self.kind() for _ in range(config.num_hidden_layers)]
        self.teacher_attention = teacher_attention
        self.thresholds = thresholds
        self.detached = detached
        self.distance = torch.zeros((), device=device)
        self.loops_run = torch.zeros((), device=device)

    def write_both(
        self, layer: int, loop: int, melt: tuple[Tensor, Tensor], looplm: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """As `write`, but gives alpha * KV_MELT + (1 - alpha) * KV_LoopLM, for the past and the chunk alike.

        Args:
            melt, looplm: K and V of the chunk by either model, [B, KV heads, Q, D] each.
        """
        past = self.looplm.setdefault((layer, loop), self.kind())
        k, v = self.write(layer, loop, *melt)
        k_looplm, v_looplm = past.update(*looplm)
        return torch.lerp(k_looplm, k, self.alpha), torch.lerp(v_looplm, v, self.alpha)

    def forget(self, begins: Tensor) -> Tensor:
        """As for MELT's rows, the LoopLM's too."""
        needed = super().forget(begins)
        if not needed.all():
            self.keep_columns(self.looplm.values(), needed)
        return needed

    def keep_columns(self, layers: Iterable[Any], needed: Tensor) -> None:
        """As for MELT's rows, also where they are in pieces."""
        for rows in layers:
            if isinstance(rows, ChunkedRows):
                rows.keep(needed)
            else:
                super().keep_columns([rows], needed)

    def finish(self, chunk: Chunk) -> None:
        """Also drop what is left open in `chunk` mode: a batch is one call, and nothing goes on with it."""
        super().finish(chunk)
        self.open_positions = self.open_positions[:, :0]
        del self.layers[self.config.num_hidden_layers :]
        if self.detached:
            for rows in (*self.layers, *self.looplm.values()):
                if isinstance(rows, ChunkedRows):
                    rows.pieces = tuple((keys.detach(), values.detach()) for keys, values in rows.pieces)
                else:
                    rows.keys, rows.values = rows.keys.detach(), rows.values.detach()

    def copied(self) -> "TrainingRows":
        """These rows, to be written to without a change to these."""
        other = copy(self)
        other.layers = [copy(rows) for rows in self.layers]
        other.looplm = {key: copy(rows) for key, rows in self.looplm.items()}
        return other

    def count(self, chunk: Chunk, depths: ChunkDepths) -> None:
        """Add the loop that is about to run, weighed by each token's probability to run it."""
        self.loops_run = self.loops_run + depths.remaining[chunk.positions >= 0].sum()

    def compare(self, layer: int, loop: int, chunk: Chunk, o: Tensor) -> None:
        """Add this chunk's distance to the teacher's attention output; o is [B, Q, d]."""
        if self.teacher_attention is None:
            return
        o_teacher = self.teacher_attention[(loop - 1) * self.config.num_hidden_layers + layer]
        o_teacher = o_teacher.gather(1, chunk.columns[:, :, None].expand_as(o))
        self.distance = self.distance + squared_distance(o_teacher, o, chunk.positions >= 0)


class ChunkedRows:
    """Rows of one layer as the chunks wrote them, joined anew by everyone who reads: copies share all memory."""

    def __init__(self) -> None:
        self.pieces: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def is_initialized(self) -> bool:
        """Whether there are rows."""
        return bool(self.pieces)

    @property
    def keys(self) -> Tensor:
        """[B, KV heads, tokens, D]."""
        return torch.cat([keys for keys, _ in self.pieces], dim=-2)

    @property
    def values(self) -> Tensor:
        """[B, KV heads, tokens, D]."""
        return torch.cat([values for _, values in self.pieces], dim=-2)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add a chunk's rows; give all."""
        self.pieces = (*self.pieces, (keys, values))
        return self.keys, self.values

    def keep(self, needed: Tensor) -> None:
        """Drop all other columns; needed is [tokens]."""
        parts = needed.split([keys.shape[-2] for keys, _ in self.pieces])
        self.pieces = tuple(
            piece if part.all() else (piece[0][:, :, part], piece[1][:, :, part])
            for piece, part in zip(self.pieces, parts, strict=True)
            if part.any()
        )
