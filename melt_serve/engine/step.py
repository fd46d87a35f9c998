"""The plan of a step: its tokens and their tables, from loop to loop."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.v1.attention.backend import (
    CommonAttentionMetadata,
)

from melt_serve.engine.attention import FinalRows, OpenRows
from melt_serve.engine.depth import Depth


@dataclass(frozen=True)
class Tables:
    """Where a loop's rows are: blocks [R, blocks] of each request, and slots [S] that the step's tokens write."""

    blocks: Tensor
    slots: Tensor


class StepRows:
    """A step's tokens and their tables, from loop to loop.

    Attributes:
        deepest: the loops of the request that may run most.
        tokens: [A], those that still run, as places among the step's own S.
        requests: [A], each one's request, as a row of the step's R.
        positions: [A], in its own sequence.
    """

    def __init__(
        self, final: Sequence[FinalRows], open_rows: Sequence[OpenRows], positions: Tensor, depths: Sequence[Depth]
    ):
        """At the beginning of a step, when all tokens run.

        Args:
            final: the final rows of all layers.
            open_rows: one layer's open rows, of loop 1, 2, ...
            positions: [S].
            depths: R.
        """
        record = final[0].step
        self.names = [layer.layer_name for layer in final]
        self.builder, self.common = record.builder, record.common
        self.deepest = max(depth.loops for depth in depths)
        self.tokens = torch.arange(len(positions), device=positions.device)
        ends = self.common.query_start_loc[1 : len(depths) + 1]
        self.requests = torch.searchsorted(ends, self.tokens.to(ends.dtype), right=True).clamp(max=len(depths) - 1)
        self.positions = positions
        self.metadata = get_forward_context().attn_metadata[self.names[0]]
        self.runs: Tensor | None = None
        self.final = Tables(self.common.block_table_tensor, self.common.slot_mapping)
        self.open = [self._laid_over(layer) for layer in open_rows[: self.deepest - 1]]

    def tables(self, loop: int) -> Tables:
        """Where the rows of this loop are."""
        return self.open[loop - 1] if loop <= len(self.open) else self.final

    @contextmanager
    def at(self, loop: int) -> Iterator[None]:
        """What attention layers called inside see: this loop's tables, and the tokens that still run."""
        if self.runs is None and not self.open:
            yield  # as vLLM has set it up
            return
        tables = self.tables(loop)
        metadata = copy.copy(self.metadata)
        metadata.block_table = tables.blocks if self.runs is None else tables.blocks[self.runs]
        metadata.slot_mapping = tables.slots if self.runs is None else tables.slots[self.tokens]
        context = get_forward_context()
        changed = replace(
            context,
            attn_metadata={**context.attn_metadata, **dict.fromkeys(self.names, metadata)},
            slot_mapping={**context.slot_mapping, **dict.fromkeys(self.names, metadata.slot_mapping)},
        )
        with override_forward_context(changed):
            yield

    def keep(self, staying: Tensor) -> None:
        """Go on with these tokens only: [A], true for each that runs another loop, at least one.

        Tokens of one request that stand next to each other are one sequence to the kernel. Where one between
        them has left, they are two, over the same blocks: each ends at its own last token, so attention is causal.
        """
        self.tokens, self.requests = self.tokens[staying], self.requests[staying]
        self.positions = self.positions[staying]
        begins = torch.ones_like(self.tokens, dtype=torch.bool)
        begins[1:] = (self.requests.diff() != 0) | (self.positions.diff() != 1)
        starts = begins.nonzero().squeeze(1)
        bounds = torch.cat((starts, starts.new_tensor([len(self.tokens)]))).to(self.common.query_start_loc.dtype)
        ends = self.positions[bounds[1:].long() - 1] + 1
        self.runs = self.requests[starts]
        bounds_cpu, ends_cpu = bounds.cpu(), ends.to(self.common.seq_lens.dtype).cpu()
        self.metadata = self.builder.build_part(
            CommonAttentionMetadata(
                query_start_loc=bounds,
                query_start_loc_cpu=bounds_cpu,
                seq_lens=ends.to(self.common.seq_lens.dtype),
                seq_lens_cpu_upper_bound=ends_cpu,
                num_reqs=len(starts),
                num_actual_tokens=len(self.tokens),
                max_query_len=int(bounds_cpu.diff().max()),
                max_seq_len=int(ends_cpu.max()),
                block_table_tensor=self.final.blocks[self.runs],
                slot_mapping=self.final.slots[self.tokens],
                causal=True,
                positions=self.positions,
            )
        )

    def slots_after(self, loop: int, leaving: Tensor) -> tuple[Tensor, Tensor]:
        """Where else the rows of tokens that leave after this loop belong: to the loops they do not run.

        Args:
            leaving: [A], true for those tokens.

        Returns:
            slots: [W], and rows: [W], whose row of this loop goes there, as places among the tokens that leave.
        """
        tokens = self.tokens[leaving]
        written = self.tables(loop).slots[tokens]
        later = torch.stack([self.tables(other).slots[tokens] for other in range(loop + 1, self.deepest + 1)])
        missing = later != written
        return later[missing], missing.nonzero()[:, 1]

    def _laid_over(self, rows: OpenRows) -> Tables:
        own, spec = rows.step.common, rows.step.builder.kv_cache_spec
        null_slots = spec.block_size
        blocks = lay_over(
            own.block_table_tensor, self.final.blocks, own.seq_lens, spec.chunk_size, spec.block_size, null_slots
        )
        return Tables(blocks, torch.where(own.slot_mapping < null_slots, self.final.slots, own.slot_mapping))


def lay_over(own: Tensor, final: Tensor, seq_lens: Tensor, chunk_size: int, block_size: int, null_slots: int) -> Tensor:
    """The block table of a loop before the last: final blocks, but the open chunk's own where it has them.

    Args:
        own: [R, blocks], blocks of this loop; the null block where there is none, as in requests that never
            come here or whose last loop this is; anything in closed chunks.
        final: [R, blocks], blocks of final rows.
        seq_lens: [R], tokens of each request up to the end of this step, which lies in the open chunk.
        chunk_size: C, a multiple of `block_size`, the tokens in one entry of the tables.
        null_slots: slots below this are in the null block.
    """
    open_block = (seq_lens - 1) // chunk_size * (chunk_size // block_size)
    columns = torch.arange(own.shape[1], device=own.device)
    kept = (columns >= open_block[:, None]) & (own * block_size >= null_slots)
    return torch.where(kept, own, final)
