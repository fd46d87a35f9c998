"""What vLLM wrote before it ended is one sentence: the root cause, not what points to it."""

import shutil
import subprocess
import sys

import pytest

from melt_serve.bundled import MELT
from melt_serve.server_process import free_port
from melt_serve.start_failures import explain
from tests.test_checkpoint_check import without

ENGINE = "(EngineCore pid=7) ERROR 11-28 00:08:27 [core.py:1510] "
WORKER = "(VllmWorker-0 pid=9) ERROR 11-28 00:08:26 [multiproc_executor.py:953] "
POINTERS = """
(EngineCore pid=7) ERROR 11-28 00:08:27 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-28 00:08:27 [core.py:1510]   File "core.py", line 1482, in run_engine_core
(EngineCore pid=7) ERROR 11-28 00:08:27 [core.py:1510] Exception: WorkerProc initialization failed due to an exception
Traceback (most recent call last):
  File "utils.py", line 1431, in wait_for_engine_startup
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}
"""
TRACE = 'Traceback (most recent call last):\n  File "x.py", line 1, in x\n    raise ValueError(\n'
OUTPUT = {
    "port": (
        f"{TRACE}OSError: [Errno 98] Address already in use",
        "the port is in use; choose another one with --port",
    ),
    "worker": (
        f"{WORKER}{TRACE}{WORKER}zmq.error.ZMQError: Too many open files{POINTERS}",
        "Too many open files; raise",
    ),
    "engine": (
        f"{ENGINE}{TRACE}{ENGINE}ValueError: No available memory for the cache blocks.{POINTERS}",
        "blocks; raise",
    ),
    "coloured": (f"\x1b[0;36m{ENGINE}\x1b[0m{TRACE}{ENGINE}ValueError: MELT: no{POINTERS}", "MELT: no"),
    "pydantic": (
        f"{TRACE}pydantic_core._pydantic_core.ValidationError: 1 validation error for VllmConfig\n"
        "  Value error, MELT: chunk_size must be at least 1, not 0 [type=value_error, input_value=ArgsKwargs(())]\n"
        "    For further information visit https://errors.pydantic.dev",
        "MELT: chunk_size must be at least 1, not 0",
    ),
    "announced": (
        f"{TRACE}hub.StrictDataclassFieldValidationError: Validation error for field 'decode_mode':\n"
        "    TypeError: Field 'decode_mode' expected one of ('token', 'chunk'), got beam",
        "Validation error for field 'decode_mode': TypeError: Field 'decode_mode' expected one of",
    ),
    "chain": (
        f"{TRACE}ValueError: Unknown level: 'LOUD'\n\nThe above exception was the direct cause of the following "
        f"exception:\n\n{TRACE}ValueError: Unable to configure handler 'vllm'",
        "Unable to configure handler 'vllm' (Unknown level: 'LOUD'); look at VLLM_LOGGING_LEVEL=loud in",
    ),
    "flag": (
        "usage: api_server.py [-h]\n  [model_tag]\napi_server.py: error: unrecognized arguments: --x",
        "arguments: --x",
    ),
    "killed": (
        "(EngineCore pid=7) ERROR 1-1 0:0:0 [m.py:3] Worker proc VllmWorker-0 died unexpectedly (exit code: -9)"
        + POINTERS,
        "a process of vLLM was killed, most likely for want of memory",
    ),
}


@pytest.mark.parametrize("name", OUTPUT)
def test_the_root_cause_is_found(name):
    text, says = OUTPUT[name]
    said = explain(
        f"INFO 11-28 00:00:51 [api_utils.py:286] args: {{'port': 1}}\n{text}\n", {"VLLM_LOGGING_LEVEL": "loud"}
    )
    assert said is not None and says in said and "\n" not in said and "root cause" not in said


@pytest.mark.parametrize("text", ["", "INFO: fine", POINTERS])
def test_where_there_is_none_nothing_is_made_up(text):
    assert explain(text, {}) is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--max-num-batched-tokens", "4"],
            "MELT: --max-num-batched-tokens=4 is below this checkpoint's",
        ),
        (["--kv-cache-memory-bytes", "64M"], "MELT: the checkpoint lacks the tensor model.layers.0.self_attn.kv_gate."),
    ],
    ids=["before the engine", "in a worker"],
)
def test_a_failed_start_ends_with_its_root_cause(words, says, tmp_path):
    """What vLLM says itself, on a checkpoint that nobody has looked at before."""
    folder = tmp_path / "melt"
    shutil.copytree(MELT, folder)
    without("kv_gate")(folder)
    command = [sys.executable, "-m", "melt_serve.cli", "serve", folder, "--skip-checks", "--enforce-eager"]
    ended = subprocess.run([*command, "--port", str(free_port()), *words], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"melt-serve: error: {says}")
