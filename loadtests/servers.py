"""The servers that load is put on: started on this machine, on a free port, and stopped whatever happens."""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

START_SECONDS = 300
STOP_SECONDS = 60


class ServerError(RuntimeError):
    """A server that did not start, or is not there."""


@contextmanager
def started(words: Sequence[str], log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """`melt-serve serve` with these words; gives its URL and process, once it is healthy.

    Raises:
        ServerError: it ended or took too long; with the last lines of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "melt_serve.cli", "serve", *words, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C ends the load, and that ends the server
        )
    server = psutil.Process(process.pid)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(log.read_text().splitlines()[-12:])
                raise ServerError(f"the server did not start; the end of {log}:\n{tail}")
            time.sleep(1)
        yield url, server
    finally:
        family = [server, *server.children(recursive=True)] if server.is_running() else []
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        _, left = psutil.wait_procs(family, timeout=5)
        for each in left:
            each.kill()


def healthy(url: str) -> bool:
    """Whether it answers."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def listener(url: str) -> psutil.Process:
    """The process of this machine that serves this URL.

    Raises:
        ServerError: there is none, or it may not be looked at.
    """
    port = int(url.rpartition(":")[2].rstrip("/"))
    try:
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid:
                return psutil.Process(each.pid)
    except psutil.AccessDenied:
        pass
    raise ServerError(f"no process that listens on port {port} of this machine: name it with --pid")
