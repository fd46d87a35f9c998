"""`python -m melt_serve.train plan`: what a post-training takes, before it is started.

Letters as in `melt_serve.modeling`: T loops, N layers, S tokens of a sequence, d hidden size, C chunk size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from melt_serve.capacity import GB, shape_of
from melt_serve.config import LoopLMConfig
from melt_serve.terminal import columns
from melt_serve.train.cost.arithmetic import memory, sequence_flops
from melt_serve.train.cost.probe import kept_for_backward, measured_rate, reduced
from melt_serve.train.distil.build import student_config
from melt_serve.train.recipe import PostTraining
from melt_serve.train.recipe_files import RecipeError, load_recipe


@dataclass(frozen=True)
class StagePlan:
    """One stage.

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


def to_be_planned(recipe: str, overrides: Sequence[str]) -> tuple[PostTraining, LoopLMConfig]:
    """A recipe that may lack a teacher, data and output, and its teacher's shape, by default Ouro-1.4B's.

    Raises:
        RecipeError, PlanError: there is none, or it is no post-training.
    """
    defaults = {"teacher": "ouro-1.4b", "data": {"files": "-"}, "output": "-"}
    loaded = load_recipe(recipe, overrides, defaults)
    if not isinstance(loaded, PostTraining):
        raise RecipeError(f"{recipe} is of the bundled kind; only a post-training can be planned")
    return loaded, shape_of(loaded.teacher)


def plan(recipe: PostTraining, teacher: LoopLMConfig, processes: int, scale: int) -> dict[str, StagePlan]:
    """Every stage by name. Runs some steps of each at a shape `scale` times smaller, see `reduced`.

    Args:
        teacher: its shape.
        processes: devices that share the work.
    """
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
    """Steps, memory and time in columns; GB are 10^9 bytes."""
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
            parts.append((part, *(f"{size / GB:.2f} GB" for size in sizes)))
    parts.append(("sum", *(f"{sum(each.memory.values()) / GB:.2f} GB" for each in plans.values())))
    return f"{columns(all_steps)}\n\n{columns(parts)}"
