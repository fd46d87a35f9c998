"""The student in training: a MELT whose rows may still be mixed with a LoopLM's, held against a teacher's outputs.

Source: arXiv 2605.07721, the two phases; README.md. Letters as in `melt_serve.modeling`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
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
        logits: [T, tokens, V], at every loop, for the tokens asked for.
        attention: teacher only: o of every loop and layer, T times N of [B, S, d].
        distance: student only: the sum over loops, layers and tokens of || o_MELT - o_LoopLM ||^2.
        loops_run: the loops that a student's tokens, where they leave, are expected to run, summed over tokens.
    """

    logits: Tensor
    attention: list[Tensor] | None = None
    distance: Tensor | None = None
    loops_run: Tensor | None = None


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
        from_input = F.linear(n, self.input_proj.weight)
        return gate_blend(from_input, self.state_proj(h), self.input_proj.bias, h, n)


class FusedAttention(MeltAttention):
    """A MELT's attention with the fused gate."""

    gate = FusedGate


class Student(MeltForCausalLM):
    """A MELT whose `run_chunk` can also mix rows and compare attention outputs; same weights, same keys.

    Its gate runs as a fused kernel on a GPU, in `generate` too.
    """

    attention = FusedAttention

    def study(
        self,
        batch: Batch,
        tokens: Tensor,
        loops: int,
        alpha: float = 1.0,
        teacher_attention: list[Tensor] | None = None,
        decode_aware: bool = False,
        thresholds: Tensor | None = None,
    ) -> Answers:
        """Run a batch chunk by chunk.

        Args:
            tokens: [B, S], true where an answer is wanted.
            loops: T.
            alpha: 1 is MELT; below, rows are alpha * KV_MELT + (1 - alpha) * KV_LoopLM, with the LoopLM's
                rows of every loop kept for the past.
            teacher_attention: see `Answers.attention`; to measure the distance from.
            decode_aware: run the reply token by token, as `token` mode decodes it.
            thresholds: [B, S], each token's exit threshold; by default none leaves early.
        """
        rows = TrainingRows(self.config, batch, alpha, teacher_attention, thresholds)
        output = self(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            past_key_values=rows,
            prompt_lengths=batch.prompt_lengths if decode_aware else None,
            loops=loops,
            output_loops=True,
        )
        loops_run = None if thresholds is None else rows.loops_run
        return Answers(output.loop_logits[:, tokens], distance=rows.distance, loops_run=loops_run)

    def run_chunk(self, x: Tensor, chunk: Chunk, rows: MeltRows, loops: int, depths: ChunkDepths) -> list[Tensor]:
        """The reference's loops, with the rows of both kinds and the attention outputs passed to `rows`."""
        if not isinstance(rows, TrainingRows):
            return super().run_chunk(x, chunk, rows, loops, depths)
        if rows.thresholds is not None:
            depths = DrawnDepths(chunk, loops, rows.thresholds.gather(1, chunk.columns))
        tables = rotary_tables(self.config, chunk.positions, x.dtype)
        before_last, at_last = rows.begin(chunk, loops)
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


class TrainingRows(MeltRows):
    """MELT's rows; with alpha below 1 also the LoopLM's of every loop, as only phase 1 needs them."""

    def __init__(
        self,
        config: MeltConfig,
        batch: Batch,
        alpha: float,
        teacher_attention: list[Tensor] | None,
        thresholds: Tensor | None,
    ):
        device = batch.input_ids.device
        super().__init__(config, len(batch.input_ids), device)
        self.alpha = alpha
        self.looplm: dict[tuple[int, int], DynamicLayer] = {}
        self.teacher_attention = teacher_attention
        self.thresholds = thresholds
        self.distance = torch.zeros((), device=device)
        self.loops_run = torch.zeros((), device=device)

    def write_both(
        self, layer: int, loop: int, melt: tuple[Tensor, Tensor], looplm: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """As `write`, but gives alpha * KV_MELT + (1 - alpha) * KV_LoopLM, for the past and the chunk alike.

        Args:
            melt, looplm: K and V of the chunk by either model, [B, KV heads, Q, D] each.
        """
        past = self.looplm.setdefault((layer, loop), DynamicLayer())
        k, v = self.write(layer, loop, *melt)
        k_looplm, v_looplm = past.update(*looplm)
        return torch.lerp(k_looplm, k, self.alpha), torch.lerp(v_looplm, v, self.alpha)

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


@torch.no_grad()
def ask_teacher(teacher: OuroForCausalLM, batch: Batch, tokens: Tensor, loops: int, attention: bool) -> Answers:
    """The frozen LoopLM's answers to a batch, and its attention outputs where they are asked for."""
    with attention_outputs(teacher) as outputs:
        answered = teacher(batch.input_ids, attention_mask=batch.attention_mask, loops=loops, output_loops=True)
    return Answers(answered.loop_logits[:, tokens], attention=outputs if attention else None)


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
