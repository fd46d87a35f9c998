"""Signals to processes under test."""

import signal


def hear_ctrl_c() -> None:
    """Run in a child before it starts: a test run in the background ignores Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
