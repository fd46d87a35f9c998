"""`melt-serve demo`, run as its user runs it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from melt_serve.config import MeltConfig, kv_bytes_per_token
from melt_serve.serve import BUNDLED

DEMO = [str(Path(sys.executable).with_name("melt-serve")), "demo", "--json"]


def servers() -> int:
    """Running vLLM servers whose command line names the bundled checkpoint and the demo's address."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        found += str(BUNDLED).encode() in words and b"18321" not in words
    return found


def test_the_demo_answers_shows_its_cache_and_leaves_nothing_running():
    done = subprocess.run(DEMO, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    row = kv_bytes_per_token(MeltConfig.from_pretrained(BUNDLED), bytes_per_value=2)  # vLLM serves in bfloat16
    assert result["questions"] == 10 and result["correct"] >= 9
    assert result["kv_bytes_per_token"] == row
    assert result["looplm_kv_bytes_per_token"] == {"1": row, "4": 4 * row, "16": 16 * row}
    assert "right" in done.stdout
    assert servers() == 0


def test_ctrl_c_stops_the_server_too():
    demo = subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while servers() == 0:
        assert time.monotonic() < deadline and demo.poll() is None
        time.sleep(0.2)
    time.sleep(3)
    demo.send_signal(signal.SIGINT)
    _, errors = demo.communicate(timeout=60)
    assert demo.returncode == 130
    assert "Traceback" not in errors
    assert servers() == 0


def test_fewer_than_one_question_is_refused_at_once():
    done = subprocess.run([*DEMO, "--questions", "0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--questions must be at least 1" in done.stderr
