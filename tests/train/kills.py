"""Kill -9 at random moments of a tiny run, which loses nothing: `python -m tests.train.kills --kills 50`.

Each session is a process of its own, forked from one that has imported everything, so that kills fall into the run and
not into imports. After a kill the run goes on; when it is done, its weights, losses and evaluations must be those of a
run that nobody killed, bit for bit, and the next run begins.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from melt_serve.terminal import positive
from melt_serve.train.__main__ import main as train
from melt_serve.train.loop.logs import read_log
from melt_serve.train.loop.states import read_state
from melt_serve.train.post_training import post_train  # noqa: F401 (imported before the forks, for all of them)
from tests.train.tiny_run import TIMED, prepare

WORDS = (
    "save_steps=1",
    "keep_last=2",
    "keep_every=3",
    "data.window=4",
    "evaluation.steps=2",
    "evaluation.documents=2",
    "evaluation.length=48",
    "evaluation.sample_tokens=2",
)


def session(folder: Path, name: str, seconds: float | None) -> tuple[int, float]:
    """Go on with a run, and kill it after so many seconds; return its exit code, below 0 for a signal, and its time."""
    words = [*WORDS, f"evaluation.files={folder}/chats.jsonl", f"output={folder / name}-melt"]
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            said = os.open(folder / f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(said, sys.stdout.fileno())
            os.dup2(said, sys.stderr.fileno())
            os._exit(train(["run", str(folder / "recipe.toml"), *words, "--run", str(folder / name), "--resume"]))
        finally:
            os._exit(70)  # an error that nobody expected; its traceback is in the file
    ended, status = 0, 0
    while not ended:
        if seconds is not None and time.monotonic() - begun >= seconds:
            os.kill(child, signal.SIGKILL)
            seconds = None
        time.sleep(0.002)
        ended, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status), time.monotonic() - begun


def reached(folder: Path) -> tuple[int, int]:
    """Return how many steps are in the states that a killed run has left, and how many in its log. Both are whole."""
    saved = sum(read_state(path)["step"] for path in folder.glob("*.state.pt"))
    return saved, len(read_log(folder / "losses.jsonl"))


def outcome(folder: Path, name: str) -> tuple[bytes, list[dict[str, object]]]:
    """Return a finished run's weights, and its numbers but those that time decides."""
    logs = [read_log(folder / name / f"{log}.jsonl") for log in ("losses", "evaluations")]
    numbers = [{key: value for key, value in each.items() if key not in TIMED} for log in logs for each in log]
    return (folder / f"{name}-melt" / "model.safetensors").read_bytes(), numbers


def campaign(folder: Path, kills: int, seed: int) -> Counter[str]:
    """Kill runs so often, at moments drawn from the time that a whole run takes; count where it fell.

    Raises:
        AssertionError: a run did not go on, or did not end as the one that nobody killed.
    """
    prepare(folder)
    code, whole = session(folder, "unbroken", None)
    assert code == 0, (folder / "unbroken.txt").read_text()
    expected = outcome(folder, "unbroken")
    chance = random.Random(seed)
    fell: Counter[str] = Counter()
    name, before = "run-0", 0
    while fell["kills"] < kills:
        begins = not (folder / name).exists()
        code, seconds = session(folder, name, chance.uniform(0, whole))
        assert code in (0, -signal.SIGKILL), f"{name}: {code}\n{(folder / f'{name}.txt').read_text()}"
        if code:
            fell["kills"] += 1
            saved, logged = reached(folder / name)
            assert before <= saved <= logged <= saved + 1, f"{name}: {before} steps, then {saved}, {logged} logged"
            before = saved
            writes = [path.name for path in folder.rglob(".*.partial")]
            fell["before the first state"] += not saved
            fell["between states"] += bool(saved) and not writes
            fell["while a file was written"] += bool(writes)
            continue
        whole = seconds if begins else whole  # the machine may have become quicker, or slower
        fell["runs done"] += 1
        assert outcome(folder, name) == expected, f"{name} is not the run that nobody killed"
        name, before = f"run-{fell['runs done']}", 0
    code, _ = session(folder, name, None)
    assert code == 0, (folder / f"{name}.txt").read_text()
    assert outcome(folder, name) == expected, f"{name} is not the run that nobody killed"
    fell["runs done"] += 1
    return fell


def main(words: Sequence[str] | None = None) -> None:
    """Run the campaign and print its counts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=positive, default=50, metavar="N", help="how many (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    options = parser.parse_args(words)
    with TemporaryDirectory() as folder:
        print(json.dumps(campaign(Path(folder), options.kills, options.seed)))


if __name__ == "__main__":
    main()
