"""`python -m melt_serve.train cost`: what a post-training takes, before it is started.

Letters as in `melt_serve.modeling`: T loops, N layers, S tokens of a sequence, d hidden size, C chunk size.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from melt_serve.terminal import columns, positive
from melt_serve.train.commands import Commands, add_recipe, new_command

if TYPE_CHECKING:
    from melt_serve.config import LoopLMConfig
    from melt_serve.train.recipe import PostTraining

PEAKS = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}
"""FLOPs a second of dense bfloat16 matmuls, by NVIDIA's data sheets of the SXM devices."""
DESCRIPTION = """\
Show what a post-training takes, without starting it: steps, tokens, arithmetic, the memory of each device by part, and
the time. Neither data nor teacher is read, but for the teacher's shape; without one it is Ouro-1.4B's.

Time and what is kept for the backward pass are extrapolated from real steps of each stage that are run now, with random
weights, on this machine's device: the width divided by --scale, two layers, sequences of two chunks, all loops. Time is
scaled by arithmetic, so it is that of more of this device; small shapes use a GPU badly, so there it is too long.

With --device nothing is timed: the hours are those of that device at a share of its peak, and stand beside the paper's,
with the base trained whole, frozen, or through adapters (train_base), and the longest sequences that fit."""
EXAMPLES = """\
examples:
  python -m melt_serve.train cost melt-1.6b --processes 8
      the paper's run on eight devices like this one
  python -m melt_serve.train cost melt-1.6b --scale 1
      measured at the recipe's own width, on a GPU
  python -m melt_serve.train cost melt-1.6b --device h100 --share 0.2
      H100-hours at a fifth of its peak, and what fits on a device of 24, 48 or 80 GB
  python -m melt_serve.train cost ./mine.toml micro_batch=4 checkpoint_chunks=false
"""


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes.

    Attributes:
        memory: bytes on each device, by part.
        flops: of all its steps.
        seconds: of all its steps, extrapolated.
    """

    steps: int
    tokens: int
    memory: dict[str, int]
    flops: float
    seconds: float


def add_command(commands: Commands) -> None:
    """Add `cost` to the commands of `python -m melt_serve.train`."""
    help = "see what a recipe takes, without starting it"
    command = new_command(commands, "cost", cost, help, DESCRIPTION, EXAMPLES)
    add_recipe(command)
    add = command.add_argument
    add("--processes", type=positive, default=1, metavar="P", help="devices that share the work (default: 1)")
    add("--scale", type=positive, default=32, metavar="K", help="measure at 1/K of the width (default: 32)")
    add("--device", choices=PEAKS, help="hours of this device, and what fits, instead of time measured here")
    add("--share", type=share, default=0.1, metavar="X", help="of --device's peak, 0 to 1 (default: 0.1)")


def share(text: str) -> float:
    """Parse a share of a peak, above 0 and at most 1."""
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, but is {text}")
    return value


def cost(arguments: argparse.Namespace) -> int:
    """Print what the recipe takes; return the exit code.

    Raises:
        RecipeError, PlanError: see `to_be_planned` and `base_plans`.
    """
    import torch

    from melt_serve.train.cost.probe import MEASURED_STEPS

    recipe, teacher = to_be_planned(arguments.recipe, arguments.overrides)
    if arguments.device:
        from melt_serve.train.cost.devices import base_plans, device_table

        plans = base_plans(recipe, teacher, arguments.processes, arguments.scale)
        peak = PEAKS[arguments.device]
        print(device_table(plans, recipe, arguments.device.upper(), peak, arguments.share))
        return 0
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


def to_be_planned(recipe: str, overrides: Sequence[str]) -> tuple["PostTraining", "LoopLMConfig"]:
    """Load a recipe that may lack teacher, data and output; return it and its teacher's shape, by default Ouro-1.4B's.

    Raises:
        RecipeError, PlanError: there is none, or it is no post-training.
    """
    from melt_serve.capacity import shape_of
    from melt_serve.train.recipe import PostTraining
    from melt_serve.train.recipe_files import RecipeError, load_recipe

    defaults = {"teacher": "ouro-1.4b", "data": {"files": "-"}, "output": "-"}
    loaded = load_recipe(recipe, overrides, defaults)
    if not isinstance(loaded, PostTraining):
        raise RecipeError(f"{recipe} is of the bundled kind; only a post-training can be planned")
    return loaded, shape_of(loaded.teacher)


def plan(recipe: "PostTraining", teacher: "LoopLMConfig", processes: int, scale: int) -> dict[str, StagePlan]:
    """Plan every stage, by name. Runs some steps of each at a shape `scale` times smaller, see `probe.reduced`.

    Args:
        teacher: its shape.
        processes: devices that share the work.
    """
    from melt_serve.train.cost.arithmetic import memory, sequence_flops
    from melt_serve.train.cost.probe import kept_for_backward, measured_rate, reduced
    from melt_serve.train.distil.build import student_config

    small_teacher, small = reduced(teacher, recipe, scale)
    plans = {}
    for name, stage in recipe.stages.items():
        rate = measured_rate(small_teacher, small, small.stages[name])
        flops = stage.steps * recipe.sequences * sequence_flops(student_config(recipe, teacher), recipe, stage)
        plans[name] = StagePlan(
            steps=stage.steps,
            tokens=stage.steps * recipe.batch_tokens,
            memory=memory(teacher, recipe, stage, processes, kept_for_backward(teacher, recipe, stage, scale)),
            flops=flops,
            seconds=flops / rate / processes,
        )
    return plans


def table(plans: dict[str, StagePlan]) -> str:
    """Format steps, memory and time in columns; GB are 10^9 bytes."""
    all_steps = [("", *plans, "together")]
    for what, values in (
        ("steps", [each.steps for each in plans.values()]),
        ("tokens", [each.tokens for each in plans.values()]),
    ):
        all_steps.append((what, *(f"{value:,}" for value in values), f"{sum(values):,}"))
    flops, seconds = [each.flops for each in plans.values()], [each.seconds for each in plans.values()]
    all_steps.append(("PFLOP", *(f"{value / 1e15:,.3g}" for value in flops), f"{sum(flops) / 1e15:,.3g}"))
    all_steps.append(("hours", *(f"{value / 3600:,.3g}" for value in seconds), f"{sum(seconds) / 3600:,.3g}"))
    parts = [("memory of each device", *plans)]
    for part in next(iter(plans.values())).memory:
        sizes = [each.memory[part] for each in plans.values()]
        if any(sizes):
            parts.append((part, *(f"{size / 1e9:.2f} GB" for size in sizes)))
    parts.append(("sum", *(f"{sum(each.memory.values()) / 1e9:.2f} GB" for each in plans.values())))
    return f"{columns(all_steps)}\n\n{columns(parts)}"
