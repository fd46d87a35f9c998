"""`python -m melt_serve.train export`: a checkpoint of a run as it is now, also while it runs."""

import argparse
from dataclasses import replace
from pathlib import Path

from melt_serve.train.commands import Commands, add_push, new_command

DESCRIPTION = """\
Write the MELT that a run has come to, as a checkpoint that vLLM serves: of the newest state in its folder, or of
--state, such as one of those that keep_last and keep_every let stay in RUN/states. The run may go on meanwhile."""
EXAMPLES = """\
examples:
  python -m melt_serve.train export runs/mine ./mine-now
      then: melt-serve serve ./mine-now
  python -m melt_serve.train export runs/mine ./mine-300 --state runs/mine/states/alignment-000300.state.pt
  python -m melt_serve.train export runs/mine ./mine-now --push OWNER/NAME
      and put it on the Hugging Face hub, with the token in HF_TOKEN

exit codes: 0, done; 1, no such run, or its state or the disk is not good; 2, wrong words, or no whole teacher"""


def add_command(commands: Commands) -> None:
    """Add `export` to the commands of `python -m melt_serve.train`."""
    command = new_command(commands, "export", export, "write a checkpoint of a run that goes on", DESCRIPTION, EXAMPLES)
    command.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    command.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write; a MELT there is replaced")
    command.add_argument("--state", type=Path, metavar="FILE", help="a state of the run (default: its newest)")
    add_push(command)


def export(arguments: argparse.Namespace) -> int:
    """Write the checkpoint, and push it where that is asked for; return the exit code.

    Raises:
        CheckpointError: the run's teacher is not whole.
        TrainingError: there is no such run, its state is damaged, or `output` holds something else.
    """
    from melt_serve.train.loop.hub import push
    from melt_serve.train.post_training import export_state
    from melt_serve.train.recipe_files import written_recipe
    from melt_serve.train.run_folder import newest_state, read_facts

    run, output = arguments.run, arguments.output
    recipe = replace(written_recipe(read_facts(run), [], run), output=str(output))
    state = arguments.state or newest_state(run, recipe)
    print(f"wrote {output}: {export_state(recipe, state, run)}")
    if arguments.push:
        print(f"pushed to {push(output, arguments.push)}")
    return 0
