"""Kills: one process of a server's tree dies under load, and all others must follow it."""

import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import psutil

from melt_serve.server_process import ServerError
from tests.faults.servers import MODES, serving
from tests.faults.storm import storm

SECONDS_TO_END = 10
AT_ONCE = 2
"""Servers that start and die side by side: a start is imports, in one thread most of the time."""


def kill_all(seeds: Sequence[int], folder: Path) -> Iterator[str | None]:
    """Yield what `kill_one` returns for each seed, in their order."""
    pool = ProcessPoolExecutor(AT_ONCE, mp_context=get_context("spawn"))  # a server is stopped in a main thread
    try:
        yield from pool.map(kill_one, seeds, repeat(folder))
    finally:
        pool.shutdown(cancel_futures=True)


def kill_one(seed: int, folder: Path) -> str | None:
    """Start a server, kill one of its processes at a moment that the seed says; return what was left alive, or None."""
    chance = random.Random(seed)
    try:
        with serving(MODES[seed % 2], folder / f"{seed}.log") as attacked:
            crowd = threading.Thread(target=storm, args=(attacked, 2, seed))
            crowd.start()
            time.sleep(2 * chance.random())
            server = psutil.Process(attacked.server.process.pid)
            tree = [server, *server.children(recursive=True)]
            tree = [each for each in tree if "resource_tracker" not in " ".join(each.cmdline())]  # ends nothing
            victim = chance.choice(tree)
            name = " ".join(victim.cmdline())[-60:] or victim.name()
            victim.send_signal(signal.SIGKILL)
            attacked.server.process.poll()  # else it stays a zombie
            over = time.monotonic() + SECONDS_TO_END
            while (alive := [each for each in tree if lives(each)]) and time.monotonic() < over:
                attacked.server.process.poll()
                time.sleep(0.2)
            crowd.join()
    except ServerError as error:
        return f"the server did not start: {error}"
    return f"{name} was killed, {len(alive)} of {len(tree)} processes stayed" if alive else None


def lives(process: psutil.Process) -> bool:
    """Return whether a process runs still."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
