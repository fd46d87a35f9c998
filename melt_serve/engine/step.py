"""The plan of a step: which tokens run in each loop, and where their rows are."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from melt_serve.engine.attention import FinalRows, OpenRows
from melt_serve.engine.depth import Depth
from melt_serve.engine.tables import LoopTables


class StepRows:
    """The tokens of a step that still run.

    Attributes:
        deepest: the most loops that a request of the step may run.
        tokens: [A], the tokens that still run, as indices into the step's S.
        requests: [A], the request of each, as an index into the step's R.
        positions: [A], the position of each in its own sequence.
        runs: [runs], the request of each run of adjacent tokens, once tokens have left; None before.
        tables: where the rows of each loop are.
    """

    def __init__(
        self, final: Sequence[FinalRows], open_rows: OpenRows | None, positions: Tensor, depths: Sequence[Depth]
    ):
        """Begin a step, in which all tokens run.

        Args:
            final: the final rows of all layers.
            open_rows: those of one layer; None in `token` mode.
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
        padding = [1] * (self.common.num_reqs - len(depths))
        loops = torch.tensor([depth.loops for depth in depths] + padding, device=positions.device)
        open_record = None if open_rows is None else open_rows.step
        self.tables = LoopTables(record, open_record, loops, self.deepest, self.requests, positions)

    @contextmanager
    def select_loop(self, loop: int) -> Iterator[None]:
        """Give attention layers that are called inside this loop's tables, for the tokens that still run."""
        if self.runs is None and not self.tables.open_loops:
            yield  # as vLLM has set it up
            return
        blocks, slots = self.tables.blocks(loop), self.tables.slots(loop)
        metadata = copy.copy(self.metadata)
        metadata.block_table = blocks if self.runs is None else blocks[self.runs]
        metadata.slot_mapping = slots if self.runs is None else slots[self.tokens]
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
                block_table_tensor=self.tables.final_blocks[self.runs],
                slot_mapping=self.tables.final_slots[self.tokens],
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
        written = self.tables.slots(loop)[tokens]
        later = torch.stack([self.tables.slots(other)[tokens] for other in range(loop + 1, self.deepest + 1)])
        missing = later != written
        return later[missing], missing.nonzero()[:, 1]
