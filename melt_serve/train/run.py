"""`python -m melt_serve.train run`: follow a recipe, most often from a LoopLM of one's own to a MELT that is served."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from melt_serve.terminal import positive
from melt_serve.train.bundled import make_bundled
from melt_serve.train.commands import (
    Commands,
    add_minutes,
    add_push,
    add_questions,
    add_recipe,
    add_resume,
    new_command,
    run_stages,
    speaks,
)
from melt_serve.train.processes import launch, launched
from melt_serve.train.recipes import bundled_recipes
from melt_serve.train.session import Session, TrainingError

if TYPE_CHECKING:
    from melt_serve.train.recipe import Recipe

DESCRIPTION = """\
Follow a recipe: a LoopLM becomes a MELT by the paper's two phases, and is written as a checkpoint that vLLM serves.

RECIPE is a TOML file, or one that comes with the package: {recipes}. Every field can be set on the
command line as key=value, or stage.key=value; recipe.py says what each means. Paths are relative to where you are.

--run keeps the run: the recipe, states, losses.jsonl, TensorBoard's logs, and losses.svg, a plot of every part of the
loss. Ctrl-C, SIGTERM or --minutes saves it after the current step, and it is saved as often as the recipe says anyway.
--resume goes on after any of them or a crash, and computes exactly what an unbroken run would have.

Exit codes: 0 done, 1 an error, 2 wrong words or no whole teacher, 3 --minutes are over, 130 Ctrl-C, 143 SIGTERM."""
EXAMPLES = """\
examples:
  python -m melt_serve.train run melt-1.6b teacher=./Ouro-1.4B-Thinking data.files=chats.jsonl output=./melt-1.6b
      with the paper's data and rates; a line of chats.jsonl is {"messages": [{"role": "user", "content": "..."}, ...]}
      or {"text": "..."}
  python -m melt_serve.train run melt-1.6b-paper ... chunk_size=500
      the paper's own loss and decode mode, as we read them, and its chunks
  python -m melt_serve.train run ./mine.toml --run runs/mine --minutes 60
  python -m melt_serve.train run --run runs/mine --resume
      an hour of a recipe of your own, and the rest: the folder knows the recipe
  python -m melt_serve.train run --run runs/mine --resume alignment.steps=600 data.broken=skip
      more steps of the last stage; broken records from here on left out
  python -m melt_serve.train run ./mine.toml --run runs/mine --processes 8
      on eight GPUs, with FSDP; the losses are those of one, up to rounding
  torchrun --nnodes 2 --nproc-per-node 8 ... -m melt_serve.train run ./mine.toml --run-folder runs/mine
      on those of two machines
  python -m melt_serve.train run ./mine.toml evaluation.files=heldout.jsonl report_to=wandb
      measured on held-out records before the first step and every 50; shown in Weights & Biases
  tensorboard --logdir runs
      watch
"""
HELP_RUN = "folder for states and logs (default: runs/RECIPE); torchrun takes --run for its own: say --run-folder there"


def add_command(commands: Commands) -> None:
    """Add `run` to the commands of `python -m melt_serve.train`."""
    command = new_command(
        commands,
        "run",
        run,
        "follow a recipe: make a MELT from a LoopLM of your own",
        DESCRIPTION.format(recipes=", ".join(bundled_recipes())),
        EXAMPLES,
    )
    add_recipe(command, may_lack=True)
    command.add_argument("--run", "--run-folder", type=Path, help=HELP_RUN)
    add_resume(command)
    command.add_argument(
        "--processes", type=positive, default=1, metavar="N", help="processes on this machine, one a GPU (default: 1)"
    )
    add_minutes(command)
    add_questions(command)
    add_push(command)


def run(arguments: argparse.Namespace) -> int:
    """Follow the recipe, of whichever kind it is, for one session; return the exit code.

    Raises:
        RecipeError: there is no such recipe, or it cannot be followed.
        TrainingError: none is named, and there is no run to go on with.
    """
    from melt_serve.train.loop.hub import push
    from melt_serve.train.post_training import post_train
    from melt_serve.train.recipe import PostTraining
    from melt_serve.train.recipe_files import load_recipe, written_recipe
    from melt_serve.train.run_folder import read_facts

    named, words = arguments.recipe, list(arguments.overrides)
    if named is not None and "=" in named:
        named, words = None, [named, *words]
    if named is None and not (arguments.resume and arguments.run):
        raise TrainingError("name a RECIPE, or --resume --run FOLDER of a run that is there")
    folder = arguments.run or Path("runs") / Path(named).stem
    recipe: Recipe | PostTraining = (
        written_recipe(read_facts(folder), words, folder) if named is None else load_recipe(named, words)
    )
    if arguments.push and not isinstance(recipe, PostTraining):
        raise TrainingError(f"--push={arguments.push}: only what a post-training makes is pushed")
    several = ["--processes", str(arguments.processes)] if arguments.processes > 1 else []
    if several and not launched():
        flags = [*several, "--minutes", str(arguments.minutes), "--questions", str(arguments.questions)]
        flags += ["--push", arguments.push] if arguments.push else []
        launched_words = ["run", *([] if named is None else [named]), *words, "--run-folder", str(folder), *flags]
        return launch([*launched_words, *(["--resume"] if arguments.resume else [])], arguments.processes)

    def train(session: Session) -> str:
        if not isinstance(recipe, PostTraining):
            return make_bundled(recipe, folder, session, arguments.questions)
        post_train(recipe, folder, session)
        if arguments.push and speaks():
            return f"{recipe.output} and {push(Path(recipe.output), arguments.push)}"
        return recipe.output

    again = [] if isinstance(recipe, PostTraining) else [named or "", *words]
    again += ["--processes", os.environ["WORLD_SIZE"]] if launched() else []
    return run_stages(train, folder, arguments, " ".join(["run", *again, f"--resume --run {folder}"]))
