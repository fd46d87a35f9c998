"""Servers are watched while they start, and stopped whatever happens. Plain ones: vLLM's are in tests/api."""

import os
import signal
import sys
import threading

import psutil
import pytest

from melt_serve import server_process
from melt_serve.server_process import ServerError, answers, free_port, running
from tests.signals import still_running

STUBBORN = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("I stay", flush=True)
from http.server import HTTPServer, SimpleHTTPRequestHandler
HTTPServer(("127.0.0.1", int(sys.argv[1])), SimpleHTTPRequestHandler).serve_forever()
"""


def test_a_server_runs_while_the_block_does_and_gets_our_variables_and_more(tmp_path, monkeypatch):
    monkeypatch.setenv("OURS", "1")
    port, seconds = free_port(), []
    script = "import os, runpy, sys; print(os.environ['OURS'], os.environ['MORE'], flush=True); "
    script += "sys.argv = ['server', *sys.argv[1:]]; runpy.run_module('http.server', run_name='__main__')"
    words = [sys.executable, "-c", script, str(port), "--bind", "127.0.0.1"]
    with running(
        words, port, tmp_path / "log", ready="/", environment={"MORE": "2"}, progress=seconds.append
    ) as server:
        assert answers(f"{server.url}/") and not answers(f"{server.url}/nowhere")
        assert server.log.read_text().startswith("1 2\n")
        assert seconds == sorted(seconds) and seconds[0] < 1
    assert server.process.returncode == -signal.SIGTERM and not answers(f"{server.url}/")


@pytest.mark.parametrize(
    ("last", "says"), [("sys.exit(7)", "ended with exit code 7"), ("time.sleep(600)", "was not ready after 1 s")]
)
def test_what_ends_or_is_never_ready_is_an_error_with_its_last_lines(tmp_path, monkeypatch, last, says):
    monkeypatch.setattr(server_process, "START_SECONDS", 1 if "sleep" in last else 300)
    script = f"import sys, time; print(*range(30), sep='\\n', flush=True); {last}"
    children = psutil.Process().children()
    with (
        pytest.raises(ServerError) as failed,
        running([sys.executable, "-c", script], free_port(), tmp_path / "log"),
    ):
        pytest.fail("nothing answers")
    assert says in str(failed.value) and str(failed.value).endswith(
        "lines:\n" + "".join(f"{n}\n" for n in range(10, 30))
    )
    assert psutil.Process().children() == children


def test_what_does_not_listen_to_reason_is_killed_with_its_children_however_often_one_presses(tmp_path, monkeypatch):
    monkeypatch.setattr(server_process, "STOP_SECONDS", 2)
    before = [signal.getsignal(number) for number in server_process.ENDING_SIGNALS]
    port = free_port()
    words = [sys.executable, "-c", STUBBORN, str(port)]
    with (
        pytest.raises(KeyboardInterrupt),
        running(words, port, tmp_path / "log", ready="/", start_new_session=True) as server,
    ):
        family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children()]
        assert len(family) == 2 and os.getpgid(family[1].pid) == server.process.pid
        threading.Timer(1, os.kill, [os.getpid(), signal.SIGINT]).start()  # while it is being stopped
        raise KeyboardInterrupt
    assert server.process.returncode == -signal.SIGKILL and not still_running(family)
    assert [signal.getsignal(number) for number in server_process.ENDING_SIGNALS] == before
