"""The student in training: a MELT whose rows may still be mixed with a LoopLM's, compared with a teacher's outputs.

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
from melt_serve.modeling.chunks import Chunk
from melt_serve.modeling.depth import TokenDepths
from melt_serve.modeling.gate import KVGate
from melt_serve.modeling.melt import MeltAttention
from melt_serve.train.data.batch import Batch
from melt_serve.train.distil.rows import TrainingRows
from melt_serve.train.distil.teacher import Answers
from melt_serve.train.stages import DecodeAwareBy, Distance


class FusedGate(KVGate):
    """The KV gate with one kernel between its matmuls, where `MELT_KERNELS` lets Triton run: by default on a GPU."""

    def forward(self, n: Tensor, h: Tensor | None, loop: int) -> Tensor:
        """Update the latent state as `KVGate.forward` does."""
        if h is None or not self.learned or not takes_triton("gate_blend", n.device):
            return super().forward(n, h, loop)
        from_input = F.linear(self.input_down(n), self.input_proj.weight)
        return gate_blend(from_input, self.state_proj(self.state_down(h)), self.bias(loop), h, n)


class FusedAttention(MeltAttention):
    """A MELT's attention with the fused gate."""

    gate = FusedGate


class Student(MeltForCausalLM):
    """A MELT that runs batches with `TrainingRows`; same weights, same keys.

    Its gate runs as a fused kernel on a GPU, in `generate` too.

    Attributes:
        checkpoint_chunks: keep only a chunk's inputs and outputs, and run it again in the backward pass.
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
        distance: Distance = "relative",
        decode_aware: DecodeAwareBy | None = None,
        thresholds: Tensor | None = None,
        detach_rows: bool = False,
        chunk_size: int | None = None,
    ) -> Answers:
        """Run a batch chunk by chunk.

        Args:
            tokens: [B, S], true where an answer is wanted.
            loops: T.
            alpha: 1 is MELT; below, rows are alpha * KV_MELT + (1 - alpha) * KV_LoopLM, with the LoopLM's
                rows of every loop kept for the past.
            teacher_attention: see `Answers.attention`; to measure the distance from.
            distance: see `squared_distance`.
            decode_aware: run what is from the first learnt token on as `token` mode decodes it, exactly, token by token
                and not in packs; or nearly, in two passes.
            thresholds: [B, S], each token's exit threshold; by default none leaves early.
            detach_rows: let no gradient flow from a chunk into the rows of earlier ones.
            chunk_size: C, by default the config's.

        Returns:
            Its states at the tokens wanted, the distance, and with thresholds the loops run.

        Raises:
            ValueError: packs do not run token by token.
        """
        if decode_aware == "tokens" and batch.prompt_lengths is None:
            raise ValueError("replies run token by token (decode_aware='tokens') need one chat a row, not packs")
        rows = TrainingRows(
            self.config,
            batch,
            alpha,
            teacher_attention,
            distance,
            thresholds,
            detach_rows,
            chunked=self.checkpoint_chunks,
            chunk_size=chunk_size,
        )
        output = self(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            past_key_values=rows,
            document_starts=batch.document_starts,
            prompt_lengths=batch.prompt_lengths if decode_aware == "tokens" else None,
            generated=batch.generated if decode_aware == "passes" else None,
            loops=loops,
            exit_threshold=1.0,  # in training only drawn thresholds count, not the config's
            output_states=True,
        )
        states, head = output.loop_states[:, tokens], self.lm_head.weight
        return Answers(states, head, distance=rows.distance, loops_run=rows.loops_run)

    def run_chunk(
        self,
        x: Tensor,
        chunk: Chunk,
        rows: MeltRows,
        loops: int,
        depths: TokenDepths,
        generated: Tensor | None = None,
    ) -> list[Tensor]:
        """Run T loops over one chunk; of a training batch, at drawn depths and checkpointed where that is asked for."""
        run_once = super().run_chunk
        if not isinstance(rows, TrainingRows):
            return run_once(x, chunk, rows, loops, depths, generated)
        if rows.thresholds is not None:
            depths = DrawnDepths(chunk, loops, rows.thresholds.gather(1, chunk.columns))
        if not self.checkpoint_chunks:
            return run_once(x, chunk, rows, loops, depths, generated)
        before = rows.copied()  # a second run must find what the first one found, and write nothing

        def run(x: Tensor) -> tuple[list[Tensor], TrainingRows]:
            after = before.copied()
            return run_once(x, chunk, after, loops, copy(depths), generated), after

        states, after = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)
        rows.__dict__.update(after.__dict__)
        return states


class DrawnDepths(TokenDepths):
    """A chunk in training: every token leaves at a threshold of its own, as it would when served.

    Whether a token runs a loop is a step function of the exit gate; the gradient passes it as if it were the
    probability that the token still runs, thresholds being uniform (the straight-through estimator of Bengio et al.,
    arXiv 1308.3432).
    """

    def __init__(self, chunk: Chunk, loops: int, thresholds: Tensor):
        """Let every token of the chunk run loop 1; thresholds are [B, Q]."""
        sequences = len(chunk.positions)
        super().__init__(
            chunk.positions >= 0, torch.full((sequences,), loops, device=thresholds.device), thresholds[:, 0]
        )
        self.thresholds = thresholds

    def keep(self, new: Tensor, old: Tensor | None) -> Tensor:
        """Take `new` for tokens that run this loop, else `old`, as when served, with a gradient to the exit gate."""
        if old is None:
            return new
        runs = self.active.to(new.dtype) + self.remaining - self.remaining.detach()
        return torch.lerp(old, new, runs[:, :, None])
