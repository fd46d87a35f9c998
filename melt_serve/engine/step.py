"""The plan of a step: which tokens run in each loop, and where their rows are."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from melt_serve.config import chunk_start
from melt_serve.engine.attention import FinalRows, OpenRows
from melt_serve.engine.depth import Depth


@dataclass(frozen=True)
class Tables:
    """Where a loop's rows are.

    Attributes:
        blocks: [R, blocks], the block table of each request.
        slots: [S], the slots that the step's tokens write.
    """

    blocks: Tensor
    slots: Tensor


class StepRows:
    """The tokens of a step that still run, and the tables of each loop.

    Attributes:
        deepest: the most loops that a request of the step may run.
        tokens: [A], the tokens that still run, as indices into the step's S.
        requests: [A], the request of each, as an index into the step's R.
        positions: [A], the position of each in its own sequence.
        runs: [runs], the request of each run of adjacent tokens, once tokens have left; None before.
    """

    def __init__(
        self, final: Sequence[FinalRows], open_rows: Sequence[OpenRows], positions: Tensor, depths: Sequence[Depth]
    ):
        """Begin a step, in which all tokens run.

        Args:
            final: the final rows of all layers.
            open_rows: one layer's open rows of loop 1, 2, ...; none in `token` mode.
            positions: [S].
            depths: one of each of the R requests.
        """
        record = final[0].step
        self.names = [layer.layer_name for layer in final]
        self.builder = record.builder
        self.common = record.common
        self.deepest = max(depth.loops for depth in depths)
        self.tokens = torch.arange(len(positions), device=positions.device)
        ends = self.common.query_start_loc[1 : len(depths) + 1]
        self.requests = torch.searchsorted(ends, self.tokens.to(ends.dtype), right=True).clamp(max=len(depths) - 1)
        self.positions = positions
        self.metadata = get_forward_context().attn_metadata[self.names[0]]
        self.runs: Tensor | None = None
        self.final = Tables(self.common.block_table_tensor, self.common.slot_mapping)
        self.open = [self._overlay(layer) for layer in open_rows[: self.deepest - 1]]

    def tables(self, loop: int) -> Tables:
        """Return where the rows of this loop are."""
        return self.open[loop - 1] if loop <= len(self.open) else self.final

    @contextmanager
    def select_loop(self, loop: int) -> Iterator[None]:
        """Give attention layers that are called inside this loop's tables, for the tokens that still run."""
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

    def compact(self, staying: Tensor) -> None:
        """Drop the tokens that have left the step.

        Tokens of one request that stand next to each other are one sequence to the kernel. Where one between
        them has left, they are two, over the same blocks: each ends at its own last token, so attention is causal.

        Args:
            staying: [A], true for each token that runs another loop, at least one.
        """
        self.tokens = self.tokens[staying]
        self.requests = self.requests[staying]
        self.positions = self.positions[staying]
        begins = torch.ones_like(self.tokens, dtype=torch.bool)
        begins[1:] = (self.requests.diff() != 0) | (self.positions.diff() != 1)
        starts = begins.nonzero().squeeze(1)
        bounds = torch.cat((starts, starts.new_tensor([len(self.tokens)]))).to(self.common.query_start_loc.dtype)
        ends = (self.positions[bounds[1:].long() - 1] + 1).to(self.common.seq_lens.dtype)
        self.runs = self.requests[starts]
        bounds_cpu, ends_cpu = bounds.cpu(), ends.cpu()
        self.metadata = self.builder.rebuild(
            CommonAttentionMetadata(
                query_start_loc=bounds,
                query_start_loc_cpu=bounds_cpu,
                seq_lens=ends,
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
        """Return the slots in later loops' tables of tokens that leave after this loop, where they are other slots.

        Args:
            leaving: [A], true for the L tokens that leave.

        Returns:
            slots: [W], to be written; tokens: [W], whose row goes there, as indices into the L.
        """
        tokens = self.tokens[leaving]
        written = self.tables(loop).slots[tokens]
        later = torch.stack([self.tables(other).slots[tokens] for other in range(loop + 1, self.deepest + 1)])
        missing = later != written
        return later[missing], missing.nonzero()[:, 1]

    def _overlay(self, rows: OpenRows) -> Tables:
        own, spec = rows.step.common, rows.step.builder.kv_cache_spec
        null_slots = rows.step.builder.null_slots
        blocks = overlay_blocks(
            own.block_table_tensor, self.final.blocks, own.seq_lens, spec.chunk_size, spec.block_size, null_slots
        )
        return Tables(blocks, torch.where(own.slot_mapping < null_slots, self.final.slots, own.slot_mapping))


def overlay_blocks(
    own: Tensor, final: Tensor, seq_lens: Tensor, chunk_size: int, block_size: int, null_slots: int
) -> Tensor:
    """Return the block table of a loop before the last: final blocks, and the open chunk's own where it has them.

    Args:
        own: [R, blocks], blocks of this loop; the null block where there is none, as in requests whose last
            loop is this one or an earlier one; anything in closed chunks.
        final: [R, blocks], blocks of final rows.
        seq_lens: [R], tokens of each request up to the end of this step, which lies in the open chunk.
        chunk_size: C, a multiple of `block_size`, the tokens in one entry of the tables.
        null_slots: slots below this are in the null block.
    """
    open_block = chunk_start(seq_lens - 1, chunk_size) // block_size
    columns = torch.arange(own.shape[1], device=own.device)
    kept = (columns >= open_block[:, None]) & (own * block_size >= null_slots)
    return torch.where(kept, own, final)
