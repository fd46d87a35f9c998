"""The parent of vLLM's processes: it passes output and signals on, and sees to it that all of them end together."""

import asyncio
import ctypes
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE_SECONDS = 5
"""How long vLLM may take to tell its clients that one of its processes died, or that their time is over."""

SHARED_MEMORY = Path("/dev/shm")
RUN_FOLDER = "melt-serve-run-"
LIFELINE = "lifeline"
"""The name of a run's socket in its folder."""
SHARED_NAMES = ("psm_", "vllm_dist_")
"""How names of the shared memory begin that vLLM leaves in a run's folder (`engine/lifeline.py`)."""
LONGEST_FOLDER = 107 - 37
"""A socket's path has at most 107 bytes, and vLLM's have names of 36."""
START_OUTPUT = 1 << 20
"""The most bytes of a start's output that are kept, to explain why it failed."""

PR_SET_CHILD_SUBREAPER = 36


def supervise(
    words: Sequence[str], environment: Mapping[str, str], explain: Callable[[str], str | None] = lambda output: None
) -> int:
    """Run vLLM's server until it ends, or is told to; return the exit code.

    - The output is passed on as it is.
    - A signal that ends programs lets a server that is ready end its requests; one that is not is ended at once, as is
      any when Ctrl-C is pressed twice.
    - No process outlives another, whichever is killed, this one included, and nothing of them stays in memory or on
      disk: what a supervisor that was killed could not remove, the next one does.

    Args:
        words: the command line. Its process and what it starts hold the lifeline (`engine/lifeline.py`).
        environment: variables beside our own.
        explain: makes a sentence of the output of a start that failed; None if it finds none.
    """
    sweep()
    with run_folder() as folder:
        return asyncio.run(Supervisor(folder, explain).run(words, environment))


class Supervisor:
    """One run of a server.

    Attributes:
        ready: it takes requests.
        drain_seconds: how long its running requests may take when it is told to stop.
        told: the signal that told it to stop.
        hurried: told so while it started, or twice: it was killed at once.
        cut: it had more to do when its time was over.
        output: what it wrote before it was ready.
    """

    def __init__(self, folder: Path, explain: Callable[[str], str | None]):
        self.folder = folder
        self.explain = explain
        self.ready = False
        self.drain_seconds = 0.0
        self.told: signal.Signals | None = None
        self.hurried = False
        self.cut = False
        self.output = bytearray()

    async def run(self, words: Sequence[str], environment: Mapping[str, str]) -> int:
        """Start the server, wait for its end, and return the exit code."""
        adopt_orphans()
        self.loop = asyncio.get_running_loop()
        for number in ENDING_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                self.loop.add_signal_handler(number, self.stop, number)
        lifeline = self.folder / LIFELINE
        async with await asyncio.start_unix_server(self.watch, lifeline):
            (our_out, its_out), (our_err, its_err) = os.pipe(), os.pipe()
            self.process = await asyncio.create_subprocess_exec(
                *words,
                stdout=its_out,
                stderr=its_err,
                env={**os.environ, **self.variables(), **environment, "MELT_LIFELINE": str(lifeline)},
                start_new_session=True,  # Ctrl-C reaches this process alone
            )
            if self.told is not None:  # meanwhile
                self.kill()
            os.close(its_out)
            os.close(its_err)
            pumps = [
                threading.Thread(target=self.pump, args=ends, daemon=True) for ends in ((our_out, 1), (our_err, 2))
            ]
            for pump in pumps:
                pump.start()
            code = await self.process.wait()
            await self.end_all()
            for pump in pumps:
                pump.join(GRACE_SECONDS)  # whoever reads our output may have stopped to
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})  # the ends of the lifeline
        return self.exit_code(code)

    def variables(self) -> dict[str, str]:
        """Return what keeps the temporary files of this run in its folder, and the look of its output."""
        variables = {"TMPDIR": str(self.folder), "PYTHONUNBUFFERED": "1"}
        if len(str(self.folder)) > LONGEST_FOLDER and "VLLM_RPC_BASE_PATH" not in os.environ:
            variables["VLLM_RPC_BASE_PATH"] = tempfile.gettempdir()  # where vLLM would have them
        kept = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}"  # compiled code: worth keeping
        variables["TORCHINDUCTOR_CACHE_DIR"] = os.environ.get("TORCHINDUCTOR_CACHE_DIR", kept)
        if sys.stdout.isatty():
            variables["VLLM_LOGGING_COLOR"] = os.environ.get("VLLM_LOGGING_COLOR", "1")
        return variables

    def pump(self, source: int, target: int) -> None:
        """Pass output on until its last writer has ended, and remember that of the start."""
        while chunk := os.read(source, 1 << 16):
            if not self.ready:
                self.output += chunk
                del self.output[:-START_OUTPUT]
            with suppress(OSError):  # nobody reads it any more
                while chunk:
                    chunk = chunk[os.write(target, chunk) :]
        os.close(source)

    async def watch(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Learn a process's name from its end of the lifeline, then whether it is ready, and when it has ended."""
        name = (await reader.readline()).decode().strip()
        while line := await reader.readline():
            self.ready, self.drain_seconds = True, float(line)
        writer.close()
        if self.told is None:
            if self.ready:
                say(f"{name} ended, and the server with it")
            self.loop.call_later(GRACE_SECONDS * (1 if self.ready else 2), self.kill)

    def stop(self, number: signal.Signals) -> None:
        """Do what a signal asks for."""
        again = self.told is not None
        self.told = self.told or number
        if not self.ready or (again and number == signal.SIGINT):
            self.hurried = True
            self.kill()
        elif not again:
            with suppress(ProcessLookupError):
                self.process.terminate()
            self.loop.call_later(self.drain_seconds + GRACE_SECONDS, self.cut_off)

    def cut_off(self) -> None:
        """Kill a server that takes longer to stop than it may."""
        say(f"not stopped {self.drain_seconds + GRACE_SECONDS:g} s after it was told to: killed (--shutdown-timeout)")
        self.cut = True
        self.kill()

    def kill(self, *, trackers: bool = False) -> None:
        """Kill all processes, but those of Python's that remove shared memory once the others have ended."""
        for each in descendants():
            with suppress(psutil.Error):
                if trackers or "multiprocessing.resource_tracker" not in " ".join(each.cmdline()):
                    each.kill()

    async def end_all(self) -> None:
        """Return when no process is left."""
        started = self.loop.time()
        while descendants():
            self.kill(trackers=self.loop.time() > started + GRACE_SECONDS)
            await asyncio.sleep(0.05)

    def exit_code(self, code: int) -> int:
        """Return vLLM's own exit code, 128 + N after signal N, and never 0 where nobody asked for an end.

        A start that failed for a reason that can be told ends with vLLM's code, or with 1 where we killed the rest.
        """
        if self.hurried:
            assert self.told is not None
            return 128 + self.told
        if (
            not self.ready
            and self.told is None
            and code
            and (why := self.explain(self.output.decode(errors="replace")))
        ):
            say(why)
            return max(code, 1)
        unasked = self.ready and self.told is None
        return 128 - code if code < 0 else code or int(unasked or self.cut)


def say(what: str) -> None:
    """Print a line about an error."""
    print(f"melt-serve: error: {what}", file=sys.stderr, flush=True)


def adopt_orphans() -> None:
    """Become the parent of all descendants whose own parent dies, so that none can be lost from sight."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def descendants() -> list[psutil.Process]:
    """Return all processes below this one that run."""
    found = []
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


@contextmanager
def run_folder() -> Iterator[Path]:
    """Make a folder for all that a run leaves on disk; it is locked while it is in use, and removed in the end."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=RUN_FOLDER))
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():  # nobody swept it before it was locked
            break
        os.close(lock)
    try:
        yield folder
    finally:
        remove(folder)
        os.close(lock)


def sweep() -> None:
    """Remove what runs left whose supervisor was killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{RUN_FOLDER}*"):
        with suppress(OSError):  # in use, another user's, or gone
            if folder.is_symlink() or folder.stat().st_uid != os.getuid() or not (folder / LIFELINE).is_socket():
                continue  # no run's, or one that begins just now
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(folder)
                print(f"melt-serve: removed {folder}, left by a server that was killed", file=sys.stderr, flush=True)
            finally:
                os.close(lock)


def remove(folder: Path) -> None:
    """Remove a run's folder, and the shared memory that is named in it."""
    for name in (entry.name for entry in folder.iterdir() if entry.name.startswith(SHARED_NAMES)):
        for memory in SHARED_MEMORY.glob(f"{name}*"):
            memory.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
