"""A real engine in a child process: its memory is its own, its crash is one error, and it can be ended at any time."""

import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

from melt_serve.bench.shapes import Checkpoint

STOP_SECONDS = 10
AS_TRAINED: dict[str, object] = {"load_format": "auto", "skip_tokenizer_init": False, "dtype": "auto"}


class BenchError(RuntimeError):
    """An engine could not be measured; the message says which and why."""


class Engine:
    """vLLM on a checkpoint, started and ended by `with`; one question at a time.

    Args:
        name: what errors call it.
        checkpoint: a shape, which gets random weights; or the folder of a real one, with weights and tokenizer.
        arguments: vLLM's own, as for its `LLM`.
    """

    def __init__(self, name: str, checkpoint: Checkpoint | Path, arguments: dict[str, object]):
        self.name = name
        self.folder = tempfile.TemporaryDirectory(prefix="melt-bench-")
        folder = Path(self.folder.name)
        if isinstance(checkpoint, Path):
            path, arguments = checkpoint, {**AS_TRAINED, **arguments}
        else:
            path = folder / "checkpoint"
            checkpoint.config.save_pretrained(path)
        self.log: IO[str] = open(folder / "log", "w+", errors="replace")  # noqa: SIM115 (closed in `__exit__`)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "melt_serve.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, "TMPDIR": self.folder.name},  # vLLM leaves files there
            start_new_session=True,  # Ctrl-C is for us: we end it
        )
        self.send("start", path=str(path), arguments=arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process: it ends itself when nobody is left to ask."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()
        self.folder.cleanup()

    def ask(self, what: str, **facts: object) -> Any:
        """Have the worker run `what`, one of its functions; return its answer.

        Raises:
            BenchError: it failed, or its process ended.
        """
        self.send(what, **facts)
        return self.answer()

    def send(self, what: str, **facts: object) -> None:
        """Ask without waiting; questions are answered in turn."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: reading its answer will tell
            self.process.stdin.write(json.dumps([what, facts]) + "\n")
            self.process.stdin.flush()

    def answer(self) -> Any:
        """Wait for the answer to the oldest question not yet answered (the first is `start`).

        Raises:
            BenchError: see `ask`.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            how = (
                f"was killed by signal {-code} (9: too little memory?)" if code < 0 else f"ended with exit code {code}"
            )
            raise BenchError(f"{self.name}: the engine {how}; its last words: {self.last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise BenchError(f"{self.name}: {reply['error']}")
        return reply["answer"]

    def last_words(self) -> str:
        """Return the last line of the process's log."""
        self.log.seek(0)
        lines: Sequence[str] = deque((line for line in self.log if line.strip()), maxlen=1)
        return lines[0].strip() if lines else "none"
