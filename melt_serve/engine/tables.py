"""Where the rows of each loop of a step are: block tables and slots, made of device tensors without waiting for them.

In `token` mode every loop writes the same slots again, those of the final rows. In `chunk` mode the loops before a
request's last have rows of their own while their chunk is open (`OpenRowsManager` in cache.py): such a loop's block
table is the final one with the columns of the open chunk replaced. A LoopLM's loops have rows of their own for all
tokens (`LoopRowsManager` in looplm_cache.py).
"""

import torch
from torch import Tensor
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from melt_serve.config import chunk_start
from melt_serve.engine.attention import StepRecord


class LoopTables:
    """The block tables and slots of a step's loops, for its R requests and S tokens.

    Attributes:
        own_loops: loops 1 to this one have tables of their own; later ones have those of the final rows.
    """

    def __init__(self, final: StepRecord):
        """Begin a step in which every loop has the tables of the final rows."""
        self.common = final.common
        self.final_blocks = final.common.block_table_tensor
        self.final_slots = final.common.slot_mapping
        self.own_loops = 0

    def lay_over(self, open_rows: StepRecord, loops: Tensor, deepest: int, positions: Tensor) -> None:
        """Give loops before a request's last the rows of its open chunk, unless a whole chunk runs.

        Args:
            open_rows: the same step and the tables of open rows.
            loops: [R], the most loops that each request may run. Its tokens in this step are of one chunk.
            deepest: the largest of them.
            positions: [S], the position of each token in its own sequence.
        """
        self.own_loops = deepest - 1
        positions = positions[: len(self.final_slots)]
        spec, split = open_rows.builder.kv_cache_spec, open_rows.builder.entries_per_block
        chunk_size, block_size = spec.chunk_size, spec.block_size  # of the kernel's blocks
        held = open_rows.common.block_table_tensor
        lengths, later_loops = self.common.seq_lens, loops - 1
        loop = torch.arange(self.own_loops, device=loops.device)  # counted from 0
        # A step that runs a whole chunk has all its rows at hand: it writes the final blocks at every loop.
        whole = (self.common.query_start_loc.diff() == chunk_size) & (lengths % chunk_size == 0)
        own = (loop[:, None] < later_loops) & ~whole
        first = chunk_start((lengths - 1).clamp(min=0), chunk_size) // block_size
        width = min(chunk_size // block_size, self.final_blocks.shape[1])
        # The table may end inside the chunk: its columns are then the last ones, and some lie before the chunk.
        begin = first.clamp(max=self.final_blocks.shape[1] - width)
        self.columns = begin[:, None] + torch.arange(width, device=loops.device)
        block = self.columns - first[:, None]
        rows = torch.arange(len(loops), device=loops.device)[:, None]
        blocks = held[rows, entry(block.clamp(min=0), later_loops[:, None], loop[:, None, None], split)]
        final_blocks = self.final_blocks.gather(1, self.columns)
        self.own_blocks = torch.where(own[:, :, None] & (block >= 0), blocks, final_blocks)
        self.composed_blocks = self.final_blocks.clone()

        block = positions % chunk_size // block_size
        tokens = torch.arange(len(positions), device=loops.device, dtype=torch.int32)
        requests = requests_of(tokens, self.common)
        slots = held[requests, entry(block, later_loops[requests], loop[:, None], split)].long() * block_size
        slots += positions % block_size
        # A negative slot is padding's, which belongs to no request.
        self.own_slots = torch.where(own[:, requests] & (self.final_slots >= 0), slots, self.final_slots)

    def blocks(self, loop: int) -> Tensor:
        """Return a loop's block table, [R, blocks]. That of another loop is overwritten."""
        if loop > self.own_loops:
            return self.final_blocks
        return self.composed_blocks.scatter_(1, self.columns, self.own_blocks[loop - 1])

    def slots(self, loop: int) -> Tensor:
        """Return the slots that the step's tokens write in a loop, [S]."""
        return self.final_slots if loop > self.own_loops else self.own_slots[loop - 1]


class TablesByLoop(LoopTables):
    """A LoopLM's block tables and slots: a request of d loops has d blocks in a row for every block of its tokens."""

    def __init__(self, rows: StepRecord, loops: Tensor, deepest: int, longest: int, positions: Tensor):
        """Take apart the tables of a step.

        Args:
            rows: the step and its tables, of all loops.
            loops: [R], the most loops that each request may run.
            deepest: the largest of them.
            longest: the most tokens that a request has at the end of the step, at most.
            positions: [S], the position of each token in its own sequence.
        """
        super().__init__(rows)
        self.own_loops = deepest
        split, spec = rows.builder.entries_per_block, rows.builder.kv_cache_spec
        block_size = spec.block_size  # of the kernel's
        # A dummy run's requests may be longer than the table, which has room for all loops.
        width = min(cdiv(longest, block_size), self.final_blocks.shape[1] // (spec.max_loops * split) * split)
        tokens = len(self.final_slots)
        numbers = torch.arange(max(width, deepest, len(loops), tokens), dtype=torch.int32, device=loops.device)
        block, loop = numbers[:width], numbers[:deepest, None]  # counted from 0
        entries = entry(block, loops[:, None], loop[:, :, None], split)
        self.own_blocks = self.final_blocks[numbers[: len(loops), None], entries]
        positions, requests = positions[:tokens], requests_of(numbers[:tokens], self.common)
        # Padding's positions may be anything.
        slots = self.own_blocks[:, requests, (positions // block_size).clamp(max=width - 1)].long() * block_size
        written = (loop < loops[requests]) & (self.final_slots >= 0)
        self.own_slots = torch.where(written, slots + positions % block_size, PAD_SLOT_ID)
        self.final_blocks, self.final_slots = self.own_blocks[0], self.own_slots[0]

    def blocks(self, loop: int) -> Tensor:
        """Return a loop's block table, [R, blocks up to the longest request's last]."""
        return self.own_blocks[loop - 1]


def entry(block: Tensor, loops: Tensor, loop: Tensor, split: int) -> Tensor:
    """Return where a table has a loop's block, both counted from 0, if it has one of each loop in a row.

    Args:
        block: as the kernel counts them.
        loops: how many have a block.
        loop: which of them.
        split: the kernel's blocks in a block of the table, which are entries in a row.
    """
    if split == 1:
        return block * loops + loop
    return (block // split * loops + loop) * split + block % split


def requests_of(tokens: Tensor, common: CommonAttentionMetadata) -> Tensor:
    """Return the request of each of these tokens of a step, as an index into its R; padding's is the last."""
    ends = common.query_start_loc[1:]
    return torch.searchsorted(ends, tokens, right=True).clamp(max=len(ends) - 1)
