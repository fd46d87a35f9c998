"""What the commands of `python -m melt_serve.train` share: flags, how a session ends, errors in one line.

A command's file adds itself with `add_command` and imports what needs torch when it runs, so that --help is fast.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from melt_serve import terminal
from melt_serve.train.processes import launched
from melt_serve.train.session import Paused, Session, StudyError, TrainingError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
SAME_COMMAND = "the same command goes on"


def new_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], help: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """Add a command; its flags are the caller's to add.

    Args:
        run: what the command does; gives the exit code, or raises one of `expected_errors`.
    """
    command = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run_command=run)
    return command


def add_recipe(command: argparse.ArgumentParser, default: str | None = None, may_lack: bool = False) -> None:
    """Add the words that name a recipe and change its fields.

    Args:
        default: the recipe's name where none is given; None where one must be.
        may_lack: whether the command does without one.
    """
    shown = "" if default is None else f" (default: {default})"
    command.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs=None if default is None and not may_lack else "?",
        default=default,
        help=f"a bundled recipe's name, or a TOML file{shown}",
    )
    command.add_argument("overrides", metavar="key=value", nargs="*", help="change a field of the recipe")


def add_resume(command: argparse.ArgumentParser) -> None:
    """Add the flag that goes on with a run of an earlier session."""
    command.add_argument("--resume", action="store_true", help="go on with the run in that folder")


def add_minutes(command: argparse.ArgumentParser, default: float = math.inf) -> None:
    """Add the flag that ends a session in time."""
    shown = "" if math.isinf(default) else f" (default: {default:g})"
    command.add_argument(
        "--minutes", type=minutes, default=default, metavar="M", help=f"save and stop after M minutes{shown}"
    )


def add_questions(command: argparse.ArgumentParser) -> None:
    """Add the flag that says on how many questions the bundled checkpoints are measured."""
    command.add_argument(
        "--questions",
        type=terminal.positive,
        default=1000,
        metavar="N",
        help="held-out questions to measure the bundled checkpoints on (default: 1000)",
    )


def add_push(command: argparse.ArgumentParser) -> None:
    """Add the flag that puts the checkpoint on the hub."""
    command.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload it to the Hugging Face hub (HF_TOKEN); a new model there is private",
    )


def minutes(text: str) -> float:
    """Parse a non-negative number of minutes."""
    if (value := float(text)) < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, but is {text}")
    return value


def run_session(
    work: Callable[[Session], None],
    minutes: float,
    paused: str = f"paused, everything is saved; {SAME_COMMAND}",
    stopped: str = f"stopped, finished runs are saved; {SAME_COMMAND}",
) -> int:
    """Do a command's work in one session; return the exit code, which says how it ended.

    Args:
        paused: said when the session is over before the work is.
        stopped: said after Ctrl-C outside the steps of training.

    Returns:
        0 when done, 3 when the minutes are over, 128 + signal after a signal that the work heard, 130 after Ctrl-C.
    """
    session = Session(minutes)
    try:
        work(session)
    except Paused:
        say(paused)
        if launched() and not speaks():
            return 0  # the launcher ends all where one fails, and the first process may be saving still
        return 3 if session.signal is None else 128 + session.signal
    except KeyboardInterrupt:
        say(f"\n{stopped}")
        return 130
    return 0


def run_stages(
    train: Callable[[Session], str], folder: Path, arguments: argparse.Namespace, words_to_resume: str
) -> int:
    """Run a recipe's stages for one session, plot their losses, and say where the outcome is; return the exit code.

    Args:
        train: goes on with the stages whose states lie in `folder`; gives what it wrote in the end.
        arguments: with `resume` and `minutes`.
        words_to_resume: the words after `python -m melt_serve.train` that go on with the run.
    """
    from melt_serve.train.loop.logs import LOG, plot_losses

    def work(session: Session) -> None:
        if not arguments.resume and any(folder.glob("*.state.pt")):
            raise TrainingError(f"{folder} holds a run already: add --resume, or choose another --run folder")
        try:
            wrote = train(session)
        except Paused:
            if speaks():
                plot_losses(folder)
            raise
        if speaks():
            plot = plot_losses(folder)
            print(f"wrote {wrote}; losses: {folder / LOG}" + (f" and {plot}" if plot else ""))

    go_on = f"go on with: python -m melt_serve.train {words_to_resume}"
    return run_session(
        work,
        arguments.minutes,
        f"paused, everything is saved; {go_on}",
        f"stopped, the training is saved; {go_on}",
    )


def speaks() -> bool:
    """Whether this process is the one of torchrun's that writes and speaks for all; alone, it is."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print to stderr, once for all processes."""
    if speaks():
        print(text, file=sys.stderr)


def expected_errors() -> tuple[type[Exception], ...]:
    """Return the errors whose message tells a user what to do. Their modules are imported only now."""
    from melt_serve.capacity import PlanError
    from melt_serve.checkpoint_path import CheckpointError
    from melt_serve.train.data.records import DataError
    from melt_serve.train.recipe_files import RecipeError

    return (OSError, CheckpointError, DataError, PlanError, RecipeError, StudyError, TrainingError)


def fail(error: Exception) -> int:
    """Say what went wrong in one line, once for all processes; return the exit code."""
    from melt_serve.checkpoint_path import CheckpointError

    code = 2 if isinstance(error, CheckpointError) else 1
    return terminal.fail(error, "melt_serve.train", code) if speaks() else code
