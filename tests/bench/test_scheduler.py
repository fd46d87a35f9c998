"""`melt-serve bench scheduler`, small, and what its scheduler's work is counted in: never how fast it is."""

import json
import sys

import pytest

from melt_serve import cli
from melt_serve.bench.scheduler import CHUNK_SIZE, add_requests, run_step, start_scheduler
from melt_serve.bench.shapes import Checkpoint, shape

REQUESTS = 16


def calls_of_a_step(mode, max_loops, loops):
    """Count the Python functions that a step calls for each request that generates a token."""
    checkpoint = Checkpoint(shape("demo"), "melt" if mode else "looplm", max_loops, CHUNK_SIZE, mode)
    scheduler = start_scheduler(checkpoint.config, REQUESTS, tokens=100)
    add_requests(scheduler, REQUESTS, loops, generated=20)
    for _ in range(3):
        run_step(scheduler)
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        output = scheduler.schedule()
    finally:
        sys.setprofile(None)
    assert len(output.num_scheduled_tokens) == REQUESTS
    assert len(scheduler.kv_cache_manager.coordinator.single_type_managers) == (2 if mode == "chunk" else 1)
    return calls / REQUESTS


@pytest.mark.parametrize("loops", [1, 2])
def test_a_step_costs_no_more_where_a_checkpoint_is_built_for_more_loops(loops):
    token = calls_of_a_step("token", 16, loops)
    chunk = calls_of_a_step("chunk", 2, loops)
    assert calls_of_a_step("chunk", 16, loops) == chunk <= 1.3 * token


def test_nor_where_a_looplms_requests_run_more_of_them():
    token = calls_of_a_step("token", 16, loops=1)
    assert calls_of_a_step(None, 16, loops=16) == calls_of_a_step(None, 16, loops=1) <= 1.3 * token


def test_the_command_shows_both_modes_and_the_open_rows_that_requests_hold(capsys, tmp_path):
    plot = tmp_path / "scheduler.svg"
    few = "--requests 4 --loops 2 --max-loops 4,2 --steps 3 --rounds 2".split()
    assert cli.main(["bench", "scheduler", *few, "--json", "--plot", str(plot)]) == 0
    table, line = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    results = json.loads(line)["results"]
    models = [(each["decode_mode"], each["max_loops"]) for each in results]
    assert models == [("token", 4), ("chunk", 2), ("chunk", 4), (None, 4)]
    # 40 to 47 tokens are two blocks of 32: of the last loop, of the one before it while their chunk is open, of each.
    assert [each["blocks"] for each in results] == [8, 16, 16, 16]
    assert [each["open_blocks"] for each in results] == [0, 8, 8, 0]
    assert results[0]["ratio"] == 1 and "reached" not in table
    assert plot.stat().st_size


def test_requests_deeper_than_a_checkpoint_are_one_line(capsys):
    assert cli.main(["bench", "scheduler", "--loops", "3", "--max-loops", "2,4"]) == 1
    assert "--loops=3 is above the least of --max-loops, 2" in capsys.readouterr().err
