"""The student in training: a MELT whose rows may still be mixed with a LoopLM's, held against a teacher's outputs.

Source: arXiv 2605.07721, the two phases; README.md. Letters as in `melt_serve.modeling`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicLayer

from melt_serve.config import MeltConfig
from melt_serve.kernels.gate import gate_blend
from melt_serve.kernels.switch import takes_triton
from melt_serve.modeling import MeltForCausalLM, MeltRows, OuroForCausalLM
from melt_serve.modeling.depth import ChunkDepths
from melt_serve.modeling.gate import KVGate
from melt_serve.modeling.looplm import rotary_tables
from melt_serve.modeling.melt import MeltAttention
from melt_serve.modeling.rows import Chunk
from melt_serve.train.data import Batch
from melt_serve.train.losses import squared_distance


@dataclass(frozen=True)
class Answers:
    """What a looped model says about a batch.

    Attributes:
        states: [T, tokens, d], after every loop, of the tokens asked for.
        head: [V, d], the vocabulary head's weight.
        attention: teacher only: o of every loop and layer, T times N of [B, S, d].
        distance: student only: the sum over loops, layers and tokens of || o_MELT - o_LoopLM ||^2.
        loops_run: the loops that a student's tokens, where they leave, are expected to run, summed over tokens.
    """

    states: Tensor
    head: Tensor
    attention: list[Tensor] | None = None
    distance: Tensor | None = None
    loops_run: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """[T, tokens, V], all at once."""
        return F.linear(self.states, self.head)


class DrawnDepths(ChunkDepths):
    """A chunk in training: every token leaves at a threshold of its own, as it would when served.

    Whether a token runs a loop is a step function of the exit gate; the gradient passes it as if it were the
    probability that the token still runs, thresholds being uniform (the straight-through estimator of Bengio et al.,
    arXiv 1308.3432).
    """

    def __init__(self, chunk: Chunk, loops: int, thresholds: Tensor):
        """Before loop 1; thresholds are [B, Q]."""
        sequences = len(chunk.positions)
        super().__init__(chunk, torch.full((sequences,), loops, device=thresholds.device), thresholds[:, 0])
        self.thresholds = thresholds

    def keep(self, new: Tensor, old: Tensor | None) -> Tensor:
        """As the served model keeps, with a gradient to the exit gate."""
        if old is None:
            return new
        runs = self.active.to(new.dtype) + self.remaining - self.remaining.detach()
        return torch.lerp(old, new, runs[:, :, None])


class FusedGate(KVGate):
    """The KV gate with one kernel between its matmuls, where `MELT_KERNELS` lets Triton run: by default on a GPU."""

    def forward(self, n: Tensor, h: Tensor | None, loop: int) -> Tensor:
        """As the reference's."""
        if h is None or not self.learned or not takes_triton("gate_blend", n.device):
            return super().forward(n, h, loop)
        from_input = F.linear(self.input_down(n), self.input_proj.weight)
        return gate_blend(from_input, self.state_proj(self.state_down(h)), self.input_proj.bias, h, n)


class FusedAttention(MeltAttention):
    """A MELT's attention with the fused gate."""

    gate = FusedGate


class Student(MeltForCausalLM):
    """A MELT whose `run_chunk` can also mix rows and compare attention outputs; same weights, same keys.

    Its gate runs as a fused kernel on a GPU, in `generate` too.

    Attributes:
        checkpoint_chunks: keep only what a chunk takes and gives, and run it again in the backward pass.
    """

    attention = FusedAttention
    checkpoint_chunks = False

    def study(
        self,
        batch: Batch,
        tokens: Tensor,
        loops: int,
        alpha: float = 1.0,
        teacher_attention: list[Tensor] | None = None,
        decode_aware: bool = False,
        thresholds: Tensor | None = None,
        detach_rows: bool = False,
    ) -> Answers:
        """Run a batch chunk by chunk.

        Args:
            tokens: [B, S], true where an answer is wanted.
            loops: T.
            alpha: 1 is MELT; below, rows are alpha * KV_MELT + (1 - alpha) * KV_LoopLM, with the LoopLM's
                rows of every loop kept for the past.
            teacher_attention: see `Answers.attention`; to measure the distance from.
            decode_aware: run the reply token by token, as `token` mode decodes it; not in packs.
            thresholds: [B, S], each token's exit threshold; by default none leaves early.
            detach_rows: let no gradient flow from a chunk into the rows of earlier ones.

        Raises:
            ValueError: packs run on the grid only, so they cannot be `decode_aware`.
        """
        if decode_aware and batch.prompt_lengths is None:
            raise ValueError("replies run token by token (decode_aware) need one chat a row, not packs")
        rows = TrainingRows(
            self.config, batch, alpha, teacher_attention, thresholds, detach_rows, in_pieces=self.checkpoint_chunks
        )
        output = self(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            past_key_values=rows,
            document_starts=batch.document_starts,
            prompt_lengths=batch.prompt_lengths if decode_aware else None,
            loops=loops,
            output_states=True,
        )
        loops_run = None if thresholds is None else rows.loops_run
        states, head = output.loop_states[:, tokens], self.lm_head.weight
        return Answers(states, head, distance=rows.distance, loops_run=loops_run)

    def run_chunk(self, x: Tensor, chunk: Chunk, rows: MeltRows, loops: int, depths: ChunkDepths) -> list[Tensor]:
        """The reference's loops, with the rows of both kinds and the attention outputs passed to `rows`."""
        if not isinstance(rows, TrainingRows):
            return super().run_chunk(x, chunk, rows, loops, depths)
        if rows.thresholds is not None:
            depths = DrawnDepths(chunk, loops, rows.thresholds.gather(1, chunk.columns))
        if not self.checkpoint_chunks:
            return self.run_loops(x, chunk, rows, loops, depths)
        before, fresh = rows.copied(), depths  # a second run must find what the first one found, and write nothing

        def run(x: Tensor) -> tuple[list[Tensor], TrainingRows]:
            after = before.copied()
            return self.run_loops(x, chunk, after, loops, copy(fresh)), after

        states, after = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
        rows.__dict__.update(after.__dict__)
        return states

    def run_loops(self, x: Tensor, chunk: Chunk, rows: "TrainingRows", loops: int, depths: ChunkDepths) -> list[Tensor]:
        """T loops over one chunk, as in `MeltForCausalLM.run_chunk`."""
        tables = rotary_tables(self.config, chunk.positions, x.dtype)
        before_last, at_last = (added_to_scores(visible, x.dtype) for visible in rows.begin(chunk, loops))
        h: list[Tensor | None] = [None] * len(self.model.layers)
        states = []
        for loop in range(1, loops + 1):
            rows.count(chunk, depths)
            before = x
            for i, layer in enumerate(self.model.layers):
                attention = layer.self_attn
                n = layer.input_layernorm(x)
                h[i] = depths.keep(attention.kv_gate(n, h[i], loop), h[i])
                k, v = attention.rows(h[i], tables)
                if rows.alpha < 1:
                    k, v = rows.write_both(i, loop, (k, v), attention.rows(n, tables))
                else:
                    k, v = rows.write(i, loop, k, v)
                o = attention.attend(attention.query(n, tables), k, v, at_last if loop == loops else before_last)
                rows.compare(i, loop, chunk, o)
                x = layer.finish(x, o)
            x = depths.keep(self.model.norm(x), before)
            states.append(x)
            depths.after(loop, self.exit_probabilities(x))
        rows.finish(chunk)
        return states


def added_to_scores(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as attention keeps it for the backward pass: made once, all layers and loops keep the same one."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


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
        in_pieces: bool,
    ):
        """Before the first chunk.

        Args:
            detached: a chunk's rows take no gradient from later ones.
            in_pieces: many copies of the rows share their memory.
        """
        device = batch.input_ids.device
        super().__init__(config, len(batch.input_ids), device)
        self.alpha = alpha
        self.looplm: dict[tuple[int, int], DynamicLayer | Pieces] = {}
        self.kind = Pieces if in_pieces else DynamicLayer
        self.layers: list[DynamicLayer | Pieces] = [self.kind() for _ in range(config.num_hidden_layers)]
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
            if isinstance(rows, Pieces):
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
                if isinstance(rows, Pieces):
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


class Pieces:
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


@torch.no_grad()
def ask_teacher(teacher: OuroForCausalLM, batch: Batch, tokens: Tensor, loops: int, attention: bool) -> Answers:
    """The frozen LoopLM's answers to a batch, and its attention outputs where they are asked for."""
    with attention_outputs(teacher) as outputs:
        answered = teacher(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            document_starts=batch.document_starts,
            loops=loops,
            output_states=True,
        )
    states, head = answered.loop_states[:, tokens], teacher.lm_head.weight
    return Answers(states, head, attention=outputs if attention else None)


@contextmanager
def attention_outputs(model: OuroForCausalLM) -> Iterator[list[Tensor]]:
    """Collect o = W_O attn(...) of every loop and layer, in the order they are computed."""
    outputs: list[Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_hook(lambda module, arguments, o: outputs.append(o))
        for layer in model.model.layers
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
