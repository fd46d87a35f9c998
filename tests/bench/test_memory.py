"""`melt-serve bench memory` on real engines of the bundled checkpoint's shape."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import psutil
import pytest

from melt_serve import cli
from melt_serve.bench.memory import Row, table
from melt_serve.bench.shapes import BLOCK_SIZE, Checkpoint, shape
from melt_serve.bench.worker import memory
from melt_serve.config import LoopLMConfig, MeltConfig, kv_bytes_per_token
from tests.engine.engines import engine
from tests.requires import needs_fp8_rows
from tests.signals import hear_ctrl_c

LAYERS, HIDDEN, KV_MEMORY = 1, 192, 64 << 20
MELT_ROW = kv_bytes_per_token(MeltConfig(**shape("demo")), bytes_per_value=2)


def measured(tmp_path, model, kv_dtype="auto", mode=None):
    """What an engine of four loops in this process says of itself, with the flags' defaults."""
    checkpoint = Checkpoint(shape("demo"), model, 4, chunk_size=64, decode_mode=mode)
    checkpoint.config.save_pretrained(tmp_path / str(mode))
    limits = {"block_size": BLOCK_SIZE, "max_model_len": 2048, "max_num_batched_tokens": 64, "max_num_seqs": 64}
    sizes = {"dtype": "bfloat16", "kv_cache_memory_bytes": KV_MEMORY, "kv_cache_dtype": kv_dtype}
    with engine(tmp_path / str(mode), load_format="dummy", **limits, **sizes) as llm:
        return Row(model, mode, 4, kv_dtype, **memory(llm, prompt=64))


def test_a_melts_rows_do_not_grow_with_the_loops_and_an_open_chunk_is_a_constant(tmp_path):
    token, chunk = rows = [measured(tmp_path, "melt", mode=mode) for mode in ("token", "chunk")]
    assert [row.kv_bytes_per_token for row in rows] == [MELT_ROW] * 2  # of four loops as of one
    assert [row.open_chunk_bytes for row in rows] == [0, 3 * 64 * MELT_ROW]
    assert token.max_concurrency == token.token_capacity / 2048
    assert token.token_capacity == pytest.approx(KV_MEMORY / MELT_ROW, rel=0.01)
    assert chunk.max_concurrency == pytest.approx(token.max_concurrency * 2048 / (2048 + 3 * 64), rel=0.01)
    assert all(row.transient_bytes == LAYERS * 64 * HIDDEN * 2 for row in rows)
    assert "MELT, chunk mode  4" in table(rows)


def check_looplm(row, size):
    expected = kv_bytes_per_token(LoopLMConfig(**shape("demo")), size, loops=4)
    assert row["kv_bytes_per_token"] == expected == 2 * size * MELT_ROW
    assert row["token_capacity"] == pytest.approx(KV_MEMORY / expected, rel=0.01)
    assert (row["decode_mode"], row["open_chunk_bytes"], row["transient_bytes"]) == (None, 0, 0)


def test_a_looplms_rows_grow_with_the_loops_and_a_plot_is_written(capsys, tmp_path):
    plot = tmp_path / "memory.png"
    words = ["--models", "looplm", "--loops", "4", "--json", "--plot", str(plot)]
    assert cli.main(["bench", "memory", *words]) == 0
    output = capsys.readouterr().out
    (row,) = json.loads(output.splitlines()[-1])["rows"]
    check_looplm(row, size=2)
    assert row["peak_bytes"] > 64 << 20
    assert "LoopLM" in output and plot.read_bytes().startswith(b"\x89PNG")


@needs_fp8_rows
def test_fp8_halves_a_looplms_rows(tmp_path):
    check_looplm(asdict(measured(tmp_path, "looplm", "fp8")), size=1)


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
