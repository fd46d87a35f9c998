"""Signals to processes under test, and what is left of them."""

import signal
from contextlib import suppress

import psutil


def hear_ctrl_c() -> None:
    """Run in a child before it starts: a test run in the background ignores Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def still_running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended after five seconds; a zombie has, even if its new parent does not look."""
    found = []
    for each in psutil.wait_procs(processes, timeout=5)[1]:
        with suppress(psutil.NoSuchProcess):
            found += [each] * (each.status() != psutil.STATUS_ZOMBIE)
    return found
