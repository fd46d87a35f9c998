"""All of a server's processes end together, and its health means it: vLLM itself, under `melt-serve serve`."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from melt_serve.server_process import answers, free_port, running
from melt_serve.supervisor import SHARED_MEMORY
from tests.signals import still_running

TIMEOUTS = ["--step-timeout", "2", "--shutdown-timeout", "60"]


AS_USERS = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # other tests set other values


class Family(NamedTuple):
    """A server's processes, by what they are."""

    supervisor: psutil.Process
    api: psutil.Process
    engine: psutil.Process
    workers: list[psutil.Process]

    @classmethod
    def of(cls, pid: int) -> "Family":
        supervisor = psutil.Process(pid)
        (api,) = supervisor.children()
        (engine,) = (each for each in api.children() if "EngineCore" in each.cmdline()[0])
        workers = [each for each in engine.children() if "resource_tracker" not in " ".join(each.cmdline())]
        assert workers, engine.children()
        return cls(supervisor, api, engine, workers)


def kill_one(words: list[str], victim: str, load: bool, folder: Path, *, stopped: bool = False) -> None:
    """Start a server, kill one of its processes, and see that nothing is left of the others within ten seconds.

    Args:
        words: of `melt-serve serve`.
        victim: a field of `Family`; of workers the last one.
        load: with answers being streamed.
        folder: for its log.
        stopped: first stop the process for a while, under load, and see that the server is not ready meanwhile.

    Raises:
        AssertionError: something was left, or the exit code says that all was well.
    """
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own names are too long for sockets
    shared = {*SHARED_MEMORY.iterdir()}
    port = free_port()
    command = [sys.executable, "-m", "melt_serve.cli", "serve", "--port", str(port), *words]
    with running(
        command, port, folder / "log", ready="/melt/ready", environment={**AS_USERS, "TMPDIR": str(temporary)}
    ) as server:
        family = Family.of(server.process.pid)
        everyone = psutil.Process(server.process.pid).children(recursive=True)
        own = {Path(mapped.path) for each in everyone for mapped in each.memory_maps() if "/dev/shm/" in mapped.path}
        assert own and not own & shared
        streams = [stream(server.url) for _ in range(4 if load else 0)]
        chosen = getattr(family, victim)
        chosen = chosen[-1] if isinstance(chosen, list) else chosen
        if stopped:
            not_ready_while_stopped(server.url, chosen)
        chosen.kill()
        started = time.monotonic()
        code = server.process.wait(10)
        assert code == -signal.SIGKILL if victim == "supervisor" else code > 0
        assert not still_running(everyone) and time.monotonic() - started < 10
        del streams
    assert not own & {*SHARED_MEMORY.iterdir()} - left_to_the_next(temporary)
    left = {each.name for each in temporary.iterdir()} - {f"torchinductor_{os.getuid()}"}  # compiled code: kept
    assert victim == "supervisor" or not left
    shutil.rmtree(temporary)


def left_to_the_next(temporary: Path) -> set[Path]:
    """Return the shared memory that is named in folders of servers whose supervisor was killed."""
    names = [entry.name for folder in temporary.glob("melt-serve-run-*") for entry in folder.iterdir()]
    return {memory for name in names for memory in SHARED_MEMORY.glob(f"{name}*")}


def stream(url: str, tokens: int = 700):
    """Begin a streamed answer; return it when its first token is there."""
    body = b'{"model": "melt-demo", "prompt": "Ann is in Rome.", "stream": true, "ignore_eos": true, "max_tokens": %d}'
    request = urllib.request.Request(f"{url}/v1/completions", body % tokens, {"Content-Type": "application/json"})
    answer = urllib.request.urlopen(request, timeout=60)
    answer.readline()
    return answer


def status(url: str, data: bytes | None = None) -> tuple[int, str | None]:
    """Return an answer's status, and when to come back."""
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, None
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Retry-After"]


@pytest.mark.parametrize(
    ("victim", "load", "words"),
    [
        ("supervisor", True, ""),
        ("api", True, ""),
        ("engine", False, ""),
        ("workers", True, ""),
        ("workers", True, "--tensor-parallel-size 2 --step-timeout 2"),
    ],
)
def test_whichever_process_is_killed_nothing_is_left_of_the_others(victim, load, words, tmp_path, monkeypatch):
    if words:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if (os.cpu_count() or 1) > 1 else "0|0")
    kill_one(words.split(), victim, load, tmp_path, stopped=bool(words))


@pytest.mark.parametrize("seconds", [0.5, 1.5, 5])
def test_a_signal_ends_a_start_at_any_moment(seconds, tmp_path):
    """Before Python has ours, its own handler ends it."""
    command = [sys.executable, "-m", "melt_serve.cli", "serve", "--port", str(free_port())]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **AS_USERS})
    time.sleep(seconds)
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait(10) in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert not still_running(family) and "Traceback" not in (tmp_path / "log").read_text()


def test_several_api_servers_count_together_and_stop_together(tmp_path):
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "melt_serve.cli", "serve", "--port", str(port), "--api-server-count", "2"]
    with running(command, port, log, ready="/melt/ready", environment=AS_USERS) as server:
        (parent,) = psutil.Process(server.process.pid).children()
        assert sum("APIServer" in each.cmdline()[0] for each in parent.children()) == 2
        for _ in range(6):
            stream(server.url, tokens=3).read()
        for _ in range(6):  # whichever of them answers
            now = json.load(urllib.request.urlopen(f"{server.url}/melt/info"))["now"]
            assert sum(now["requests_by_loops"].values()) == 6 and sum(now["tokens_by_loops"].values()) == 18
            metrics = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
            assert sum(float(each) for each in re.findall(r"^melt_requests_total\{.*\} (.*)", metrics, re.M)) == 6
        answers = [stream(server.url, tokens=200) for _ in range(4)]  # both servers have some
        server.process.terminate()
        assert all("length" in answer.read().decode() for answer in answers)
        assert server.process.wait(20) == 0
    text = log.read_text()
    assert not re.search("ERROR|Traceback|leaked", text[text.index("shutdown triggered") :])


def test_ready_only_while_steps_end_and_a_stop_ends_answers_whole_and_quietly(tmp_path):
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "melt_serve.cli", "serve", "--port", str(port), *TIMEOUTS]
    with running(command, port, log, ready="/melt/ready", environment=AS_USERS, start_new_session=True) as server:
        ready, family = f"{server.url}/melt/ready", Family.of(server.process.pid)
        for stuck in (family.engine, *family.workers):
            not_ready_while_stopped(server.url, stuck)

        with ThreadPoolExecutor() as pool:
            whole = [pool.submit(stream(server.url).read) for _ in range(2)]
            os.killpg(os.getpgid(server.process.pid), signal.SIGINT)  # as a terminal's Ctrl-C does
            wait_for(ready, 503)
            assert status(f"{server.url}/v1/completions", b"{}") == (503, "10")
            assert all(b'"finish_reason":"length"' in each.result() for each in whole)
        assert server.process.wait(20) == 0
    text = log.read_text()
    assert not re.search("ERROR|Traceback|leaked", text[text.index("shutdown triggered") :])
    assert re.search("POST '/v1/completions' 503 in .*, refused: The server is stopping., request", text)


def not_ready_while_stopped(url: str, process: psutil.Process) -> None:
    """Stop a process in the middle of an answer and let it go on; see what the probes say, and the answer's end."""
    answer, ready = stream(url), f"{url}/melt/ready"
    process.suspend()
    wait_for(ready, 503)
    assert status(ready)[1] is not None and answers(f"{url}/health")  # it lives
    process.resume()
    wait_for(ready, 200)
    assert b'"finish_reason":"length"' in answer.read()


def wait_for(url: str, wanted: int) -> None:
    """Ask until the status is the wanted one, for twenty seconds."""
    deadline = time.monotonic() + 20
    while (seen := status(url)[0]) != wanted:
        assert time.monotonic() < deadline, seen
        time.sleep(0.2)
