"""Where a loop's rows are, held against the same said one token at a time."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from melt_serve.engine.attention import StepRecord
from melt_serve.engine.tables import LoopTables, TablesByLoop

BLOCK, CHUNK, MAX_LOOPS = 4, 16, 4
STEPS = ((0, 3, 3), (5, 6, 2), (0, 16, 4), (32, 48, 1), (40, 48, 4), (47, 48, 2), (16, 21, 1), (48, 54, 4), (63, 64, 3))
"""Requests of a step: the position of their first token, that after their last, and their loops."""


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("room", [64, 56])
def test_a_loop_has_rows_of_its_own_in_an_open_chunk_and_else_the_final_ones(room, split):
    """Where the kernel splits blocks, too, and where the table ends inside the chunk."""
    generator = torch.Generator().manual_seed(0)

    def table(requests, entries, begin):
        ids = torch.randperm(requests * entries, generator=generator) + begin
        return ids.view(requests, entries).int()

    steps = [step for step in STEPS if step[1] <= room]
    kernel_block = BLOCK // split
    final = table(len(steps), room // kernel_block, begin=1)
    held = table(len(steps), (MAX_LOOPS - 1) * CHUNK // kernel_block, begin=1000)

    def block_of(request, position, loop):
        start, end, loops = steps[request]
        column = position // kernel_block
        in_chunk = position % CHUNK // BLOCK * (loops - 1) + loop - 1
        opened = position >= (end - 1) // CHUNK * CHUNK
        if loop < loops and opened and (end - start < CHUNK):
            return held[request, in_chunk * split + column % split].item()
        return final[request, column].item()

    def slot_of(request, position, loop):
        return block_of(request, position, loop) * kernel_block + position % kernel_block

    tokens = [(request, position) for request, (start, end, _) in enumerate(steps) for position in range(start, end)]
    padding = 3
    positions = torch.tensor([position for _, position in tokens] + [0] * padding)
    ends = torch.tensor([0, *(end - start for start, end, _ in steps)]).cumsum(0)
    common = {"query_start_loc": ends.int(), "seq_lens": torch.tensor([end for _, end, _ in steps]).int()}
    slots = torch.tensor([slot_of(*token, loop=MAX_LOOPS) for token in tokens] + [-1] * padding)
    spec = SimpleNamespace(chunk_size=CHUNK, block_size=kernel_block)
    builder = SimpleNamespace(kv_cache_spec=spec, entries_per_block=split)
    tables = LoopTables(StepRecord(builder, SimpleNamespace(**common, block_table_tensor=final, slot_mapping=slots)))
    tables.lay_over(
        StepRecord(builder, SimpleNamespace(block_table_tensor=held)),
        loops=torch.tensor([loops for *_, loops in steps], dtype=torch.int32),
        deepest=MAX_LOOPS,
        positions=positions,
    )
    for loop in (1, 2, 3, 4, 1):
        assert tables.slots(loop).tolist() == [slot_of(*token, loop) for token in tokens] + [-1] * padding
        for request, (row, (_, end, _)) in enumerate(zip(tables.blocks(loop).tolist(), steps, strict=True)):
            columns = range(-(-end // kernel_block))
            assert row[: len(columns)] == [block_of(request, column * kernel_block, loop) for column in columns]
    assert torch.equal(tables.final_blocks, final)


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("split", [1, 2])
def test_a_looplms_loop_has_the_blocks_that_its_request_has_for_it(split, fits):
    steps = ((0, 3, 3), (5, 6, 2), (0, 16, 4), (40, 48, 4), (47, 48, 1), (16, 21, 1), (33, 37, 2))
    kernel_block, longest, padding = BLOCK // split, 48, 3
    entries = longest // kernel_block * MAX_LOOPS + 5  # longer than needed, as vLLM aligns it
    held = torch.randperm(len(steps) * entries, generator=torch.Generator().manual_seed(0)).view(len(steps), -1).int()

    def block_of(request, position, loop):
        *_, loops = steps[request]
        return held[request, (position // BLOCK * loops + loop - 1) * split + position % BLOCK // kernel_block].item()

    tokens = [(request, position) for request, (start, end, _) in enumerate(steps) for position in range(start, end)]
    ends = torch.tensor([0, *(end - start for start, end, _ in steps)]).cumsum(0)
    common = SimpleNamespace(
        query_start_loc=ends.int(),
        seq_lens=None,
        block_table_tensor=held,
        slot_mapping=torch.tensor([0] * len(tokens) + [-1] * padding),  # vLLM's say only what is padding
    )
    spec = SimpleNamespace(block_size=kernel_block, max_loops=MAX_LOOPS)
    builder = SimpleNamespace(kv_cache_spec=spec, entries_per_block=split)
    positions = torch.tensor([position for _, position in tokens] + [10**6] * padding)
    loops = torch.tensor([loops for *_, loops in steps], dtype=torch.int32)
    # In a dummy run requests may be longer than the table.
    tables = TablesByLoop(StepRecord(builder, common), loops, MAX_LOOPS, longest if fits else 10 * longest, positions)
    for loop in (1, 4, 2, 3):
        for request, (_, end, most) in enumerate(steps):
            if loop <= most:
                expected = [block_of(request, position, loop) for position in range(0, end, kernel_block)]
                assert tables.blocks(loop)[request, : len(expected)].tolist() == expected
        slots = [
            block_of(request, position, loop) * kernel_block + position % kernel_block
            if loop <= steps[request][2]
            else PAD_SLOT_ID
            for request, position in tokens
        ]
        assert tables.slots(loop).tolist() == slots + [PAD_SLOT_ID] * padding
