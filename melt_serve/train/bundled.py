"""`python -m melt_serve.train bundled`: make the bundled checkpoints from nothing."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from melt_serve.bundled import CHECKPOINTS
from melt_serve.train.commands import Commands, add_minutes, add_questions, add_resume, new_command, run_stages
from melt_serve.train.session import Session

if TYPE_CHECKING:
    from melt_serve.train.recipe import Recipe

DESCRIPTION = """\
Make the bundled checkpoints from nothing: train a LoopLM teacher, turn it into a MELT by the paper's two phases,
measure both on held-out questions, and write them with their cards. About half an hour on
2 CPU cores.

A run can be cut into sessions: Ctrl-C, SIGTERM or --minutes saves it after the current step, and it is saved every
minute anyway. --resume goes on, and computes exactly what an unbroken run would have."""
EXAMPLES = """\
examples:
  python -m melt_serve.train bundled                        remake the bundled checkpoints, in place
  python -m melt_serve.train bundled --minutes 20           the first twenty minutes of it
  python -m melt_serve.train bundled --resume               ... and the rest
  python -m melt_serve.train bundled --out ./mine --seed 1  others of their kind, elsewhere
  python -m melt_serve.train bundled --teacher melt_serve/checkpoints/looplm-demo
      remake the bundled MELT only, from the bundled LoopLM

exit codes: 0, done; 3, --minutes are over; 2, wrong words, or --teacher is no LoopLM; 1, all else that went wrong
"""


def add_command(commands: Commands) -> None:
    """Add `bundled` to the commands of `python -m melt_serve.train`."""
    command = new_command(
        commands, "bundled", bundled, "remake the bundled checkpoints from nothing", DESCRIPTION, EXAMPLES
    )
    add = command.add_argument
    add("--out", type=Path, default=CHECKPOINTS, help="folder for both checkpoints (default: the bundled ones')")
    add("--run", type=Path, default=Path("runs/demo"), help="folder for states and logs (default: runs/demo)")
    add("--teacher", help="post-train this LoopLM of the task, a folder or OWNER/NAME, and make no other")
    add("--seed", type=int, default=0, help="seed of weights and data (default: 0)")
    add_resume(command)
    add_minutes(command)
    add_questions(command)


def bundled(arguments: argparse.Namespace) -> int:
    """Make the bundled checkpoints, for one session; return the exit code.

    Raises:
        CheckpointError: `--teacher` is no whole LoopLM.
    """
    from melt_serve.checkpoint_check import read_looplm
    from melt_serve.checkpoint_config import located_looped
    from melt_serve.train.recipe import Recipe

    recipe, kept = Recipe(output=str(arguments.out)).seeded(arguments.seed), arguments.teacher
    if kept is not None:
        read_looplm(located_looped(kept))
    return run_stages(
        lambda session: make_bundled(recipe, arguments.run, session, arguments.questions, kept),
        arguments.run,
        arguments,
        f"bundled {f'--teacher {kept} ' if kept else ''}--resume --run {arguments.run}",
    )


def make_bundled(recipe: "Recipe", folder: Path, session: Session, questions: int, kept: str | None = None) -> str:
    """Make the checkpoints of the bundled kind, print their table, and return where they are.

    Args:
        kept: see `make_checkpoints`.

    Raises:
        Paused, TrainingError: see `make_checkpoints`.
    """
    from melt_serve.task.evaluate import table
    from melt_serve.train.bundled_run import make_checkpoints

    target = Path(recipe.output or CHECKPOINTS)
    print(table(make_checkpoints(recipe, folder, target, session, questions, kept)))
    return f"{target}/melt-demo" if kept else f"{target}/looplm-demo and {target}/melt-demo"
