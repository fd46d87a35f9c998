"""`python -m melt_serve.train`: make a MELT, the bundled one or one's own."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from melt_serve import terminal
from melt_serve.bundled import CHECKPOINTS
from melt_serve.train.cost import memory, trial
from melt_serve.train.data import show
from melt_serve.train.recipes import bundled_recipes
from melt_serve.train.studies import ablate, lengths

if TYPE_CHECKING:
    from melt_serve.train.recipe import PostTraining, Recipe
    from melt_serve.train.session import Session

DEMO_DESCRIPTION = """\
Make the bundled checkpoints from nothing: train a LoopLM teacher, turn it into a MELT by the paper's two phases,
measure both on held-out questions, and write them with their cards. About half an hour on
2 CPU cores.

A run can be cut into sessions: Ctrl-C, SIGTERM or --minutes saves it after the current step, and it is saved every
minute anyway. --resume goes on, and computes exactly what an unbroken run would have."""

DEMO_EXAMPLES = """\
examples:
  python -m melt_serve.train demo                           remake the bundled checkpoints, in place
  python -m melt_serve.train demo --minutes 20              the first twenty minutes of it
  python -m melt_serve.train demo --resume                  ... and the rest
  python -m melt_serve.train demo --out ./mine --seed 1     others of their kind, elsewhere
"""

RUN_DESCRIPTION = """\
Follow a recipe: a LoopLM becomes a MELT by the paper's two phases, and is written as a checkpoint that vLLM serves.

RECIPE is a TOML file, or one that comes with the package: {recipes}. Every field can be set on the
command line as key=value, or stage.key=value; recipe.py says what each means. Paths are relative to where you are.

--run keeps the run: the recipe, states, losses.jsonl, TensorBoard's logs, and losses.svg, a plot of every part of the
loss. Ctrl-C, SIGTERM or --minutes saves it after the current step, and it is saved as often as the recipe says anyway.
--resume goes on after any of them or a crash, and computes exactly what an unbroken run would have.

Exit codes: 0 done, 1 an error, 2 wrong words, 3 --minutes are over, 130 Ctrl-C, 143 SIGTERM."""

RUN_EXAMPLES = """\
examples:
  python -m melt_serve.train run melt-1.6b teacher=./Ouro-1.4B-Thinking data.files=chats.jsonl output=./melt-1.6b
      the paper's run; a line of chats.jsonl is {"messages": [{"role": "user", "content": "..."}, ...]}
      or {"text": "..."}
  python -m melt_serve.train run melt-1.6b ... chunk_size=500 alignment.alignment=0
      with the paper's chunks, and without aligned attention
  python -m melt_serve.train run ./mine.toml --run runs/mine --minutes 60
  python -m melt_serve.train run ./mine.toml --run runs/mine --resume
      an hour of a recipe of your own, and the rest
  torchrun --nproc-per-node 8 -m melt_serve.train run ./mine.toml --run-folder runs/mine
      on eight GPUs, with FSDP; the losses are those of one, up to rounding
  tensorboard --logdir runs
      watch
"""

PLAN_DESCRIPTION = """\
Show what a post-training takes, without starting it: steps, tokens, arithmetic, the memory of each device by part, and
the time. Neither data nor teacher is read, but for the teacher's shape; without one it is Ouro-1.4B's.

Time and what is kept for the backward pass are extrapolated from real steps of each stage that are run now, with random
weights, on this machine's device: the width divided by --scale, two layers, sequences of two chunks, all loops. Time is
scaled by arithmetic, so it is that of more of this device; small shapes use a GPU badly, so there it is too long."""

PLAN_EXAMPLES = """\
examples:
  python -m melt_serve.train plan melt-1.6b --processes 8
      the paper's run on eight devices like this one
  python -m melt_serve.train plan melt-1.6b --scale 1
      measured at the recipe's own width, on a GPU
  python -m melt_serve.train plan ./mine.toml micro_batch=4 checkpoint_chunks=false
"""

HELP_RUN = "folder for states and logs (default: runs/RECIPE); torchrun takes --run for its own: say --run-folder there"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit code: 0 when done, 3 when a session ended first, 130 after Ctrl-C.

    Args:
        argv: the words after `python -m melt_serve.train`, by default the process's own.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m melt_serve.train", description="Train MELT checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="remake the bundled checkpoints from nothing",
        description=DEMO_DESCRIPTION,
        epilog=DEMO_EXAMPLES,
        formatter_class=raw,
    )
    demo.set_defaults(run_command=run_demo)
    add = demo.add_argument
    add("--out", type=Path, default=CHECKPOINTS, help="folder for both checkpoints (default: the bundled ones')")
    add("--run", type=Path, default=Path("runs/demo"), help="folder for states and logs (default: runs/demo)")
    add("--seed", type=int, default=0, help="seed of weights and data (default: 0)")
    add_session(demo)
    add_questions(demo)

    run = commands.add_parser(
        "run",
        help="follow a recipe: make a MELT from a LoopLM of your own",
        description=RUN_DESCRIPTION.format(recipes=", ".join(bundled_recipes())),
        epilog=RUN_EXAMPLES,
        formatter_class=raw,
    )
    run.set_defaults(run_command=run_recipe)
    add_recipe(run)
    run.add_argument("--run", "--run-folder", type=Path, help=HELP_RUN)
    add_session(run)
    add_questions(run)

    plan = commands.add_parser(
        "plan",
        help="see what a recipe takes, without starting it",
        description=PLAN_DESCRIPTION,
        epilog=PLAN_EXAMPLES,
        formatter_class=raw,
    )
    plan.set_defaults(run_command=run_plan)
    add_recipe(plan)
    plan.add_argument("--processes", type=int, default=1, metavar="P", help="devices that share the work (default: 1)")
    plan.add_argument("--scale", type=int, default=32, metavar="K", help="measure at 1/K of the width (default: 32)")

    trial.add_command(commands)
    add_recipe(memory.add_command(commands))
    show.add_command(commands)
    ablate.add_command(commands)
    lengths.add_command(commands)

    arguments, rest = parser.parse_known_args(argv)
    if unknown := [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides += rest  # argparse takes no key=value after a flag
    if getattr(arguments, "questions", 1) < 1:
        parser.error(f"--questions must be at least 1, not {arguments.questions}")
    for flag in ("processes", "scale"):
        if getattr(arguments, flag, 1) < 1:
            parser.error(f"--{flag} must be at least 1, not {getattr(arguments, flag)}")
    if getattr(arguments, "minutes", 0) < 0:
        parser.error(f"--minutes must not be negative, but is {arguments.minutes}")
    return arguments.run_command(arguments)


def add_session(command: argparse.ArgumentParser) -> None:
    """The flags of a run in many sessions."""
    command.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    command.add_argument("--minutes", type=float, default=math.inf, metavar="M", help="save and stop after M minutes")


def add_questions(command: argparse.ArgumentParser) -> None:
    """The flag of what is measured in the end."""
    command.add_argument(
        "--questions",
        type=int,
        default=1000,
        metavar="N",
        help="held-out questions to measure the bundled checkpoints on (default: 1000)",
    )


def add_recipe(command: argparse.ArgumentParser) -> None:
    """A recipe and what is changed of it."""
    command.add_argument("recipe", metavar="RECIPE", help="a bundled recipe's name, or a TOML file")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="change a field of the recipe")


def run_demo(arguments: argparse.Namespace) -> int:
    """`python -m melt_serve.train demo`."""
    from melt_serve.train.recipe import Recipe

    recipe = Recipe(output=str(arguments.out)).seeded(arguments.seed)
    return follow(recipe, arguments, arguments.run, f"demo --resume --run {arguments.run}")


def run_recipe(arguments: argparse.Namespace) -> int:
    """`python -m melt_serve.train run`."""
    from melt_serve.train.recipe_files import RecipeError, load_recipe

    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
    except RecipeError as error:
        return fail(error)
    folder = arguments.run or Path("runs") / Path(arguments.recipe).stem
    words = " ".join([arguments.recipe, *arguments.overrides])
    return follow(recipe, arguments, folder, f"run {words} --resume --run {folder}")


def run_plan(arguments: argparse.Namespace) -> int:
    """`python -m melt_serve.train plan`."""
    import torch

    from melt_serve.capacity import PlanError
    from melt_serve.train.cost.plan import plan, table, to_be_planned
    from melt_serve.train.cost.probe import MEASURED_STEPS
    from melt_serve.train.recipe_files import RecipeError

    try:
        recipe, teacher = to_be_planned(arguments.recipe, arguments.overrides)
    except (PlanError, RecipeError) as error:
        return fail(error)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{arguments.recipe}: {recipe.teacher}, C={recipe.chunk_size}, sequences of {recipe.sequence_length:,} tokens, "
        f"{recipe.sequences} a step, {arguments.processes} processes, {recipe.dtype}"
    )
    print(table(plan(recipe, teacher, arguments.processes, arguments.scale)))
    print(
        f"\ntime: from {MEASURED_STEPS} steps of each stage at 1/{arguments.scale} of the width on {device}, by FLOPs"
    )
    return 0


def follow(recipe: "Recipe | PostTraining", arguments: argparse.Namespace, folder: Path, again: str) -> int:
    """Run what a recipe says, whichever kind it is, for one session.

    Args:
        again: the words that go on with the run.
    """
    from melt_serve.train.data.datasets import DataError
    from melt_serve.train.loop.logs import LOG, plot_losses
    from melt_serve.train.recipe import PostTraining
    from melt_serve.train.run import post_train
    from melt_serve.train.session import Paused, Session, TrainingError

    again = f"go on with: python -m melt_serve.train {again}"
    session = Session(arguments.minutes)
    try:
        if not arguments.resume and any(folder.glob("*.state.pt")):
            raise TrainingError(f"{folder} holds a run already: add --resume, or choose another --run folder")
        if isinstance(recipe, PostTraining):
            post_train(recipe, folder, session)
            wrote = recipe.output
        else:
            wrote = make_bundled(recipe, folder, session, arguments.questions)
    except Paused:
        if speaks():
            plot_losses(folder)
            print(f"paused, everything is saved; {again}", file=sys.stderr)
        return 3 if session.signal is None else 128 + session.signal
    except KeyboardInterrupt:
        print(f"\nstopped, the training is saved; {again}", file=sys.stderr)
        return 130
    except (OSError, DataError, TrainingError) as error:
        return fail(error)
    if not speaks():
        return 0
    plot = plot_losses(folder)
    print(f"wrote {wrote}; losses: {folder / LOG}" + (f" and {plot}" if plot else ""))
    return 0


def make_bundled(recipe: "Recipe", folder: Path, session: "Session", questions: int) -> str:
    """Make both checkpoints of the bundled kind, show their table, and say where they are."""
    from melt_serve.task.evaluate import table
    from melt_serve.train.bundled import make_checkpoints

    target = Path(recipe.output or CHECKPOINTS)
    print(table(make_checkpoints(recipe, folder, target, session, questions)))
    return f"{target}/looplm-demo and {target}/melt-demo"


def speaks() -> bool:
    """Whether this process is the one of torchrun's that writes and speaks for all; alone, it is."""
    return os.environ.get("RANK", "0") == "0"


def fail(error: Exception) -> int:
    """Say what went wrong in one line, once for all processes; the exit code of a failure."""
    return terminal.fail(error, "melt_serve.train") if speaks() else 1


if __name__ == "__main__":
    sys.exit(main())
