"""A server in a process of its own: started, watched until it answers, and stopped whatever happens."""

import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TextIO

START_SECONDS = 300
STOP_SECONDS = 60
"""How long a server may take to end by itself: its running requests have 30 of them (`serve.SAFE_DEFAULTS`)."""
EARLY_STOP_SECONDS = 5
"""The same of a server that is not ready: it has no requests, and while vLLM starts its engine, it does not listen."""
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ServerError(RuntimeError):
    """A server that did not start; the message says why and ends with the last lines of its log."""


class Server(NamedTuple):
    """A server that answers."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def running(
    words: Sequence[str],
    port: int,
    log: Path,
    *,
    ready: str = "/health",
    scheme: str = "http",
    environment: Mapping[str, str] | None = None,
    start_new_session: bool = False,
    progress: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Server]:
    """Start a server on this machine, yield it once it answers, and stop it at the end of the block.

    Args:
        words: its command line, which makes it listen on `port`.
        port: see `free_port`.
        log: the file that gets its output.
        ready: the path that it answers once it is ready.
        scheme: https where its command line names a certificate; `SSL_CERT_FILE` has to vouch for it.
        environment: variables that it gets beside our own.
        start_new_session: start it in a session and process group of its own. Ctrl-C then reaches us alone, and what
            the server leaves running is killed with it.
        progress: called once a second until it is ready, with the seconds since its start.

    Raises:
        ServerError: it ended, or was not ready after `START_SECONDS`.
    """
    url = f"{scheme}://127.0.0.1:{port}"
    process, patience = None, EARLY_STOP_SECONDS
    try:
        with log.open("w") as output:
            process = subprocess.Popen(
                words,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=start_new_session,
            )
        wait_until_ready(process, url + ready, log, progress)
        patience = STOP_SECONDS
        yield Server(url, process, log)
    finally:
        if process is not None:
            stop(process, patience)


@contextmanager
def own_server(command: Callable[[int], Sequence[str]], model: str, out: TextIO) -> Iterator[Server]:
    """Start a server for this program alone, tell how long it takes, yield it, and stop it however the block ends.

    Args:
        command: makes its command line, for a port.
        model: what is told about what it serves.
        out: where it is told: in one line of a terminal, or in a line every ten seconds.

    Raises:
        ServerError: it did not start.
    """

    def progress(seconds: float) -> None:
        starting = f"Starting vLLM on {model} ... {seconds:3.0f} s "
        if out.isatty():
            print(f"\r{starting}", end="", file=out, flush=True)
        elif int(seconds) % 10 == 0:
            print(starting.rstrip(), file=out, flush=True)

    port, started = free_port(), time.monotonic()
    with exits_on_signals(), tempfile.TemporaryDirectory(prefix="melt-log-") as folder:
        log = Path(folder) / "log"
        with running(command(port), port, log, start_new_session=True, progress=progress) as server:
            print(f"\nReady at {server.url} after {time.monotonic() - started:.0f} s.\n", file=out, flush=True)
            yield server


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, progress: Callable[[float], None]) -> None:
    """Ask `url` once a second until it answers.

    Raises:
        ServerError: the process ended, or `START_SECONDS` are over.
    """
    started = time.monotonic()
    while True:
        seconds = time.monotonic() - started
        progress(seconds)
        if process.poll() is not None:
            raise ServerError(f"the server ended with exit code {process.returncode}; its last lines:\n{tail(log)}")
        if seconds > START_SECONDS:
            raise ServerError(f"the server was not ready after {START_SECONDS} s; its last lines:\n{tail(log)}")
        if answers(url):
            return
        time.sleep(1)


def answers(url: str) -> bool:
    """Return whether a GET of `url` succeeds within five seconds."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:  # refused, reset, too slow, or an HTTP error
        return False


def tail(log: Path, lines: int = 20) -> str:
    """Return the last lines of a log."""
    return "".join(log.read_text(errors="replace").splitlines(keepends=True)[-lines:])


def stop(process: subprocess.Popen[bytes], patience: float) -> None:
    """End a server politely, after `patience` seconds by force, with all that is left of its session if it has its own.

    Signals that would end this process are ignored meanwhile: impatience does not interrupt it.
    """
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING_SIGNALS}
    try:
        for how in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                process.send_signal(how)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(patience)
        with suppress(ProcessLookupError):  # it has no process group of its own, or nothing is left in it
            os.killpg(process.pid, signal.SIGKILL)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def exits_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit, as Ctrl-C raises KeyboardInterrupt, so that the server is stopped."""
    before = {number: signal.signal(number, _raise_exit) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
