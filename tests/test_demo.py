"""`melt-serve demo`, run as its user runs it."""

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from melt_serve.config import MeltConfig, kv_bytes_per_token
from melt_serve.serve import BUNDLED

DEMO = [str(Path(sys.executable).with_name("melt-serve")), "demo", "--json"]


def run_demo(*, interrupt: bool = False) -> tuple[int, str, str, list[psutil.Process]]:
    """Run the demo, or press Ctrl-C once its server is starting: exit code, output, errors, every process it began."""
    demo = subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children: set[psutil.Process] = set()
    deadline = time.monotonic() + 300
    while demo.poll() is None:
        assert time.monotonic() < deadline
        with suppress(psutil.NoSuchProcess):
            children |= set(psutil.Process(demo.pid).children(recursive=True))
        if interrupt and len(children) > 1:  # the API server, and the engine it starts
            demo.send_signal(signal.SIGINT)
            interrupt = False
        time.sleep(0.2)
    output, errors = demo.communicate()
    return demo.returncode, output, errors, list(children)


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those not ended; a zombie has, even if its new parent does not look."""
    found = []
    for each in processes:
        with suppress(psutil.NoSuchProcess):
            found += [each] * (each.status() != psutil.STATUS_ZOMBIE)
    return found


def test_the_demo_answers_shows_its_cache_and_leaves_nothing_running():
    code, output, errors, processes = run_demo()
    assert code == 0, output + errors
    result = json.loads(output.splitlines()[-1])
    row = kv_bytes_per_token(MeltConfig.from_pretrained(BUNDLED), bytes_per_value=2)  # vLLM serves in bfloat16
    assert result["questions"] == 10 and result["correct"] >= 9
    assert result["kv_bytes_per_token"] == row
    assert result["looplm_kv_bytes_per_token"] == {"1": row, "4": 4 * row, "16": 16 * row}
    assert output.count("   right") == result["correct"]
    assert processes and not running(processes)


def test_ctrl_c_stops_the_server_too():
    code, _, errors, processes = run_demo(interrupt=True)
    assert code == 130
    assert "Traceback" not in errors
    assert processes and not running(processes)


def test_fewer_than_one_question_is_refused_at_once():
    done = subprocess.run([*DEMO, "--questions", "0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--questions must be at least 1" in done.stderr
