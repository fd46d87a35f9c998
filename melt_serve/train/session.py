"""A session of a run: how long it may last, and what ends it."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Paused(Exception):
    """The session is over before the stage is; everything is saved."""


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why, and what is on disk is good."""


class StudyError(ValueError):
    """Something that is asked for does not exist, or the records cannot be read; the message says which."""


class Session:
    """One stretch of time in which stages may run, and the signals that end it early."""

    def __init__(self, minutes: float = math.inf):
        self.deadline = time.monotonic() + 60 * minutes
        self.signal: int | None = None

    @property
    def over(self) -> bool:
        """Whether the run should save and pause."""
        return self.signal is not None or time.monotonic() >= self.deadline

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM end the session after the current step."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._end) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self, number: int, _: object) -> None:
        self.signal = number
