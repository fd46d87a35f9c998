"""`melt-serve bench memory` on real engines of the bundled checkpoint's shape."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from melt_serve import cli
from melt_serve.bench.shapes import shape
from melt_serve.config import LoopLMConfig, MeltConfig, kv_bytes_per_token
from melt_serve.device import peak_memory
from tests.requires import needs_fp8_rows
from tests.signals import hear_ctrl_c

LAYERS, HIDDEN = 1, 192
MELT_ROW = kv_bytes_per_token(MeltConfig(**shape("demo")), bytes_per_value=2)


def bench(capsys, *words):
    code = cli.main(["bench", "memory", "--json", *words])
    output = capsys.readouterr()
    assert code == 0, output.err
    return json.loads(output.out.splitlines()[-1])["results"], output.out


@pytest.mark.usefixtures("in_this_process")
def test_a_melts_rows_do_not_grow_with_the_loops_and_an_open_chunk_is_a_constant(capsys):
    rows, table = bench(capsys, "--models", "melt", "--loops", "4")
    assert [(row["decode_mode"], row["loops"]) for row in rows] == [("token", 4), ("chunk", 4)]
    assert [row["kv_bytes_per_token"] for row in rows] == [MELT_ROW] * 2  # of four loops as of one
    assert all(set(row["kv_bytes_by_loops"].values()) == {MELT_ROW} for row in rows)
    assert [row["open_chunk_bytes"] for row in rows] == [0, 3 * 64 * MELT_ROW]
    token, chunk = (row["max_concurrency"] for row in rows)
    assert token == rows[0]["token_capacity"] / 2048
    assert rows[0]["token_capacity"] == pytest.approx((64 << 20) / MELT_ROW, rel=0.01)
    assert chunk == pytest.approx(token * 2048 / (2048 + 3 * 64), rel=0.01)
    assert all(row["transient_bytes"] == LAYERS * 64 * HIDDEN * 2 for row in rows)
    assert "MELT, chunk mode  4" in table


def check_looplm(row, size):
    expected = kv_bytes_per_token(LoopLMConfig(**shape("demo")), size, loops=4)
    assert row["kv_bytes_per_token"] == expected == 2 * size * MELT_ROW
    assert row["kv_bytes_by_loops"] == {str(loops): expected * loops // 4 for loops in (1, 2, 4)}
    assert row["token_capacity"] == pytest.approx((64 << 20) / expected, rel=0.01)
    assert (row["decode_mode"], row["open_chunk_bytes"], row["transient_bytes"]) == (None, 0, 0)


def test_a_looplms_rows_grow_with_the_loops_and_a_plot_is_written(capsys, tmp_path):
    """In a child process, whose memory is its own."""
    plot = tmp_path / "memory.png"
    (row,), _ = bench(capsys, "--models", "looplm", "--loops", "4", "--plot", str(plot))
    check_looplm(row, size=2)
    assert 64 << 20 < row["peak_bytes"] != peak_memory(torch.device("cpu"))
    assert plot.read_bytes().startswith(b"\x89PNG")


@needs_fp8_rows
@pytest.mark.usefixtures("in_this_process")
def test_fp8_halves_rows(capsys):
    (row,), _ = bench(capsys, "--models", "looplm", "--loops", "4", "--kv-dtype", "fp8")
    check_looplm(row, size=1)


def test_ctrl_c_ends_the_engine_too():
    command = [sys.executable, "-m", "melt_serve.cli", "bench", "memory"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)
    deadline = time.monotonic() + 60
    while not (engines := psutil.Process(process.pid).children()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "")
    assert not any(engine.is_running() for engine in engines)


def test_what_vllm_refuses_is_one_line_that_names_the_engine(capsys):
    assert cli.main(["bench", "memory", "--models", "melt", "--loops", "2", "--context", "4096"]) == 1
    error = capsys.readouterr().err
    assert "MELT, token mode, T=2, KV auto" in error and "max_position_embeddings=2048" in error
    assert error.count("melt-serve: error") == error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--kv-cache-memory", "1M"], "LoopLM, T=2, KV auto: one request of --context=2048 tokens takes 3145728 bytes"),
        (["--chunk-size", "128"], "--step-tokens=64 must be at least --chunk-size=128"),
        (["--context", "64"], "--step-tokens=64 must be at least --chunk-size=64 and below --context=64"),
        (["--plot", "nowhere/memory.png"], "nowhere is not a folder"),
        (["--plot", "memory.doc"], ".png, .svg or .pdf"),
    ],
)
def test_what_cannot_be_measured_is_one_line_at_once(words, says, capsys):
    assert cli.main(["bench", "memory", "--models", "looplm,melt", "--loops", "2", *words]) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["--loops", "0"], ["--kv-cache-memory", "2X"], ["--models", "gpt"], ["--shape", "x"]]
)
def test_flags_that_make_no_sense_are_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "memory", *words])
    assert ended.value.code == 2
    assert words[0] in capsys.readouterr().err
