"""The supervisor ends all processes together. Plain programs stand for vLLM's, whose own are in test_processes.py."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from melt_serve import supervisor
from tests.signals import hear_ctrl_c, still_running

SUPERVISE = """
import sys
from melt_serve.supervisor import supervise
sys.exit(supervise([sys.executable, "-c", *sys.argv[1:]], {}, lambda output: "because" if "why" in output else None))
"""
SERVER = """
import os, signal, subprocess, sys, time
from melt_serve.engine import lifeline
lifeline.hold("the server")
worker = "from melt_serve.engine import lifeline; lifeline.hold('the worker'); print('up', flush=True); "
worker = subprocess.Popen([sys.executable, "-c", worker + "import time; time.sleep(600)"], stdout=subprocess.PIPE)
worker.stdout.readline()
if sys.argv[1] != "starting":
    lifeline.tell_ready(float(sys.argv[1]))
def end(*_):
    print("told", flush=True)
    time.sleep(float(sys.argv[2]))
    worker.kill()
    sys.exit(3)
signal.signal(signal.SIGTERM, end)
print("started", os.environ["TMPDIR"], flush=True)
while True:
    time.sleep(600)
"""


@pytest.fixture
def start(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    started = []

    def run(*arguments, script=SERVER):
        words = [sys.executable, "-c", SUPERVISE, script, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(words, **pipes, preexec_fn=hear_ctrl_c)
        started.append(process)
        if script is SERVER:
            assert process.stdout.readline().startswith(f"started {tmp_path}/melt-serve-run-")
        return process, psutil.Process(process.pid).children(recursive=True)

    yield run
    for process in started:
        process.kill()
        process.communicate()


def ended(process, family, seconds=9):
    """Wait for the end of all; return exit code, output and errors."""
    output, errors = process.communicate(timeout=seconds)
    assert len(family) == 2 and not still_running(family)
    return process.returncode, output, errors


@pytest.mark.parametrize("number", supervisor.ENDING_SIGNALS)
def test_a_signal_ends_a_server_that_starts_at_once(start, number, tmp_path):
    process, family = start("starting", "600")
    process.send_signal(number)
    code, output, errors = ended(process, family)
    assert (code, output, errors) == (128 + number, "", "") and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("number", supervisor.ENDING_SIGNALS)
def test_a_signal_lets_a_server_that_is_ready_end_by_itself_and_its_exit_code_is_kept(start, number):
    process, family = start("30", "0.5")
    process.send_signal(number)
    assert ended(process, family) == (3, "told\n", "")


def test_a_second_ctrl_c_ends_it_at_once_but_a_second_sigterm_does_not(start):
    process, family = start("30", "600")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "told\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert ended(process, family)[0] == 128 + signal.SIGTERM


def test_a_server_that_does_not_stop_in_time_is_killed(start):
    process, family = start("0", "600")
    process.send_signal(signal.SIGTERM)
    code, _, errors = ended(process, family)
    assert code == 128 + signal.SIGKILL and "killed (--shutdown-timeout)" in errors and errors.count("\n") == 1


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("victim", ["the supervisor", "the server", "the worker"])
def test_whichever_is_killed_ends_all(start, victim, stopped, tmp_path):
    process, family = start("30", "600")
    killed = {"the supervisor": psutil.Process(process.pid), "the server": family[0], "the worker": family[1]}[victim]
    for other in {*family} - {killed} if stopped else ():
        other.suspend()
    killed.kill()
    code, _, errors = ended(process, family)
    assert code == (-signal.SIGKILL if victim == "the supervisor" else 128 + signal.SIGKILL)
    if victim != "the supervisor":
        assert f"{victim} (pid {killed.pid}) ended" in errors and not [*tmp_path.iterdir()]


def test_what_a_killed_supervisor_left_is_removed_by_the_next_one(start, tmp_path):
    process, family = start("30", "600")
    (folder,) = tmp_path.glob("melt-serve-run-*")
    memory = Path(tempfile.mkstemp(prefix="psm_", dir=supervisor.SHARED_MEMORY)[1])
    (folder / memory.name).touch()
    running, others = start("30", "0")
    assert folder.is_dir() and memory.exists()  # in use
    process.kill()
    ended(process, family)
    assert folder.is_dir() and memory.exists()
    third, children = start("starting", "0")
    assert not folder.exists() and not memory.exists()
    for each, its in ((running, others), (third, children)):
        each.terminate()
        _, _, errors = ended(each, its)
    assert f"removed {folder}, left by a server that was killed" in errors and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("script", "code", "says"),
    [
        ("print('why'); raise SystemExit(7)", 7, "melt-serve: error: because\n"),
        ("raise SystemExit(7)", 7, ""),
        ("print('why')", 0, ""),  # as --help=all
        ("from melt_serve.engine.lifeline import *; hold('x'); tell_ready(9)", 1, "melt-serve: error: x"),
    ],
)
def test_a_start_that_fails_is_explained_and_a_server_never_ends_well_by_itself(start, script, code, says):
    process, _ = start(script=script)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == code and errors.startswith(says) and bool(errors) == bool(says)
    assert output == ("why\n" if "why" in script else "")


@pytest.mark.parametrize("letters", [0, 40])
def test_sockets_are_where_their_names_fit(start, monkeypatch, letters):
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="m" * letters) as place:
        monkeypatch.setenv("TMPDIR", place)
        monkeypatch.delenv("VLLM_RPC_BASE_PATH", raising=False)
        process, _ = start(script="import os; print(os.environ.get('VLLM_RPC_BASE_PATH'))")
        assert process.communicate(timeout=30)[0].strip() == (place if letters else "None")


def test_a_process_that_finds_no_supervisor_ends_at_once():
    script = "from melt_serve.engine import lifeline; lifeline.hold('late'); print('lives')"
    gone = {**os.environ, "MELT_LIFELINE": "/nowhere/lifeline"}
    late = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=gone)
    assert late.returncode == 1 and not late.stdout


def test_only_folders_of_runs_are_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor.tempfile, "gettempdir", lambda: str(tmp_path))
    work = tmp_path / f"{supervisor.RUN_FOLDER}mine" / "work.py"
    work.parent.mkdir()
    work.write_text("of somebody's own")
    supervisor.sweep()
    assert work.is_file()
