"""The student in training: a MELT whose rows may still be mixed with a LoopLM's, held against a teacher's outputs.

Source: arXiv 2605.07721, the two phases; README.md. Letters as in `melt_serve.modeling`.
"""

from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from melt_serve.kernels.dispatch import takes_triton
from melt_serve.kernels.gate import gate_blend
from melt_serve.modeling import MeltForCausalLM, MeltRows
from melt_serve.modeling.depth import ChunkDepths
from melt_serve.modeling.gate import KVGate
from melt_serve.modeling.looplm import rotary_tables
from melt_serve.modeling.melt import MeltAttention
from melt_serve.modeling.rows import Chunk
from melt_serve.train.data.batch import Batch
from melt_serve.train.distil.rows import TrainingRows
from melt_serve.train.distil.teacher import Answers


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

    def run_batch(
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
            self.config, batch, alpha, teacher_attention, thresholds, detach_rows, chunked=self.checkpoint_chunks
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
