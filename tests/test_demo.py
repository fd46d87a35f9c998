"""`melt-serve demo`, run as its user runs it."""

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import psutil
import pytest

from melt_serve import demo
from melt_serve.bundled import MELT
from melt_serve.config import MeltConfig, kv_bytes_per_token
from tests.signals import hear_ctrl_c, still_running

DEMO = [str(Path(sys.executable).with_name("melt-serve")), "demo", "--json"]
CLOSES_THE_TERMINAL = """
import os, pathlib, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {child.pid}")
os.kill(os.getppid(), signal.SIGHUP)
time.sleep(600)
"""


def run_demo(*signals: signal.Signals) -> tuple[int, str, str, list[psutil.Process]]:
    """Run the demo, and send it signals once its server is starting; gives the exit code, its output, its errors, and
    every process it began."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(DEMO, **pipes, preexec_fn=hear_ctrl_c)
    children: set[psutil.Process] = set()
    deadline = time.monotonic() + 300
    while process.poll() is None:
        assert time.monotonic() < deadline
        with suppress(psutil.NoSuchProcess):
            children |= set(psutil.Process(process.pid).children(recursive=True))
        if signals and len(children) > 1:  # the API server, and the engine it starts
            process.send_signal(signals[0])
            signals = signals[1:]
        time.sleep(0.2)
    output, errors = process.communicate()
    return process.returncode, output, errors, list(children)


def test_the_demo_answers_shows_its_cache_and_leaves_nothing_running():
    code, output, errors, processes = run_demo()
    assert code == 0, output + errors
    result = json.loads(output.splitlines()[-1])
    row = kv_bytes_per_token(MeltConfig.from_pretrained(MELT), bytes_per_value=2)  # vLLM serves in bfloat16
    assert result["questions"] == 10 and result["correct"] >= 9
    assert result["kv_bytes_per_token"] == row
    assert result["looplm_kv_bytes_per_token"] == {"1": row, "4": 4 * row, "16": 16 * row}
    assert output.count("   right") == result["correct"]
    deeper = re.findall(r"^ +(\d) loops? +-> (.*)$", output, re.MULTILINE)
    assert [loops for loops, _ in deeper] == ["1", "2", "3", "4"]
    assert len({answer for _, answer in deeper[1:]}) == 3  # each loop takes it one step further
    assert processes and not still_running(processes)


def test_ctrl_c_pressed_twice_stops_the_server_too():
    code, _, errors, processes = run_demo(signal.SIGINT, signal.SIGINT)
    assert code == 130
    assert "Traceback" not in errors
    assert processes and not still_running(processes)


def test_a_closed_terminal_stops_the_server_and_all_it_started(monkeypatch, tmp_path):
    """Another program is the server here, and it closes the terminal itself, once it has started one more."""
    pids = tmp_path / "pids"
    monkeypatch.setattr(demo, "command", lambda words: [sys.executable, "-c", CLOSES_THE_TERMINAL, str(pids)])
    before = signal.getsignal(signal.SIGHUP)
    with pytest.raises(SystemExit) as ended:
        demo.main([])
    assert ended.value.code == 129 and signal.getsignal(signal.SIGHUP) == before
    server, child = map(int, pids.read_text().split())
    assert not psutil.pid_exists(server)
    assert not psutil.pid_exists(child) or not still_running([psutil.Process(child)])


def test_too_few_right_answers_fail(monkeypatch, capsys):
    monkeypatch.setattr(demo, "server", lambda: nullcontext("http://nowhere"))
    monkeypatch.setattr(demo, "kv_costs", lambda url: (1024, {"1": 1024}))
    for right, code in ((8, 1), (9, 0)):
        monkeypatch.setattr(demo, "deepen", lambda url: None)
        monkeypatch.setattr(demo, "ask", lambda url, asked, right=right: right)
        assert demo.main([]) == code
        assert f"{right} of 10 answers right" in capsys.readouterr().out


def test_a_server_that_dies_is_one_error_with_its_last_words(monkeypatch, capsys):
    dying = [sys.executable, "-c", "print('out of luck'); raise SystemExit(7)"]
    monkeypatch.setattr(demo, "command", lambda words: dying)
    assert demo.main([]) == 1
    error = capsys.readouterr().err
    assert "exit code 7" in error and "out of luck" in error and "Traceback" not in error


def test_fewer_than_one_question_is_refused_at_once(capsys):
    with pytest.raises(SystemExit) as refused:
        demo.main(["--questions", "0"])
    assert refused.value.code == 2
    assert "--questions must be at least 1" in capsys.readouterr().err
