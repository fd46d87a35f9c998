"""`python -m melt_serve.train memory`: the memory of a training step as sequences and loops grow."""

import argparse
from pathlib import Path

from melt_serve.terminal import loop_list, positive
from melt_serve.train.commands import Commands, add_recipe, new_command

DESCRIPTION = """\
Measure the most memory that a real training step takes, forward and backward, as sequences and loops grow: phase 1 and
phase 2, with checkpoint_chunks and without, beside what `cost` says of the same shape. Phase 1 also without the
LoopLM's rows: the difference is what they cost.

The shape is the recipe's with the width divided by --scale, two layers and few words, and random weights; chunks are as
long as the recipe's. Lengths are measured at the recipe's loops, loops at the middle one of the lengths. Weights and
what else is there before a step are not counted. On a GPU it is what its allocator had given out; on a CPU the tensors
that were alive, without what a kernel needs for itself."""
EXAMPLES = """\
examples:
  python -m melt_serve.train memory melt-1.6b --report memory.md
      tables, memory.svg and memory.json
  python -m melt_serve.train memory melt-1.6b chunk_size=64 --lengths 128,256,512 --loops 1,4
      short chunks: a minute or two
  python -m melt_serve.train memory ./mine.toml --scale 1
      at the recipe's own width, on a GPU
"""


def add_command(commands: Commands) -> None:
    """Add `memory` to the commands of `python -m melt_serve.train`."""
    help = "measure what a step takes as sequences and loops grow"
    command = new_command(commands, "memory", memory, help, DESCRIPTION, EXAMPLES)
    add_recipe(command)
    add = command.add_argument
    add("--scale", type=positive, default=32, metavar="K", help="measure at 1/K of the width (default: 32)")
    add("--lengths", type=loop_list, metavar="S,...", help="tokens of a sequence (default: 2, 4, 8 and 16 chunks)")
    add("--loops", type=loop_list, default=[1, 2, 4, 8], metavar="T,...", help="(default: 1,2,4,8)")
    add("--report", type=Path, metavar="FILE.md", help="also write FILE.md, FILE.svg and FILE.json")


def memory(arguments: argparse.Namespace) -> int:
    """Measure and print the tables, and write the report if one is asked for; return the exit code.

    Raises:
        RecipeError, PlanError: see `to_be_planned`.
        OSError: the report cannot be written; before anything is measured, if that can be known.
    """
    from melt_serve.train.cost.memory_report import by_length, by_loops, table, write_memory_report
    from melt_serve.train.cost.plan import to_be_planned
    from melt_serve.train.cost.step_memory import measure
    from melt_serve.train.results import check_report

    recipe, teacher = to_be_planned(arguments.recipe, arguments.overrides)
    if arguments.report:
        check_report(arguments.report)
    lengths = arguments.lengths or [chunks * recipe.chunk_size for chunks in (2, 4, 8, 16)]
    found = measure(recipe, teacher, arguments.scale, lengths, arguments.loops)
    print(f"{table(found, by_length)}\n\n{table(found, by_loops)}")
    if arguments.report:
        files = write_memory_report(arguments.report, found, recipe, arguments.recipe, arguments.scale)
        print(f"\nwrote {', '.join(map(str, files))}")
    return 0
