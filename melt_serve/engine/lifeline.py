"""The lifeline: what ties vLLM's processes to `melt-serve serve`, their supervisor. Without one it does nothing."""

import ctypes
import os
import signal
import socket
import sys
from contextlib import suppress
from multiprocessing import parent_process
from multiprocessing.shared_memory import SharedMemory
from multiprocessing.util import Finalize
from pathlib import Path

PR_SET_PDEATHSIG = 1

_held: list[socket.socket] = []
_owned: list[SharedMemory] = []


def hold(name: str) -> None:
    """Tie this process to the supervisor: it learns when this process ends, and this process ends with its parent.

    A process that finds the supervisor gone ends at once.

    Args:
        name: what the supervisor calls it when it ends too soon.
    """
    path = os.environ.get("MELT_LIFELINE")
    if path is None or _held:
        return
    if sys.platform == "linux":  # the kernel does it, even to a process that is stopped
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    line = socket.socket(socket.AF_UNIX)
    try:
        line.connect(path)
        line.sendall(f"{name} (pid {os.getpid()})\n".encode())
    except OSError:
        os._exit(1)
    _held.append(line)
    if parent_process() is not None:
        # The interpreter's own end takes seconds: three for a worker, as many again for its engine.
        Finalize(None, leave, exitpriority=-1)  # after all others


def leave() -> None:
    """Leave a process of Python's `multiprocessing` that has done its work, unless it has failed."""
    error = sys.exception()
    if error is None or (isinstance(error, SystemExit) and not error.code):
        for memory in _owned:
            with suppress(FileNotFoundError):  # its queue has removed it
                memory.unlink()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def tell_ready(drain_seconds: float) -> None:
    """Tell the supervisor that the server takes requests, and how long they may take to end when it is stopped."""
    for line in _held:
        line.sendall(f"{drain_seconds}\n".encode())


def own(memory: SharedMemory) -> None:
    """Remove shared memory when this process leaves; its name in the run's folder says so even if all are killed."""
    if (path := os.environ.get("MELT_LIFELINE")) is not None:
        _owned.append(memory)
        Path(path).with_name(memory.name.lstrip("/")).touch()
