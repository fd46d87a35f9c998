"""The servers that load is put on: started on this machine, on a free port, or found there."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from melt_serve.server_process import ServerError, free_port, running, tail


@contextmanager
def started(words: Sequence[str], log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Start `melt-serve serve` with these words, yield its URL and process once it is ready, and stop it.

    Raises:
        ServerError: it ended or took too long; with the last lines of its log.
    """
    port = free_port()
    command = [sys.executable, "-m", "melt_serve.cli", "serve", *words, "--port", str(port)]
    try:
        with running(command, port, log, ready="/melt/ready", start_new_session=True) as server:
            yield server.url, psutil.Process(server.process.pid)
    except ServerError:
        raise ServerError(f"the server did not start; the end of {log}:\n{tail(log, lines=12)}") from None


def listener(url: str) -> psutil.Process:
    """Find the process of this machine that serves this URL.

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
