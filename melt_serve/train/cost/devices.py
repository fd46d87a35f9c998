"""What a post-training takes of devices that one can rent: hours at a share of their peak, and what fits on one."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from melt_serve.capacity import PlanError
from melt_serve.config import LoopLMConfig
from melt_serve.terminal import columns
from melt_serve.train.cost.arithmetic import memory, sequence_flops, trained_weights
from melt_serve.train.cost.probe import kept_by_length
from melt_serve.train.distil.build import student_config
from melt_serve.train.recipe import PostTraining, TrainBase
from melt_serve.train.stages import Distillation

CAPACITIES = (24, 48, 80)
"""GB of memory that a post-training is fitted into."""
SPARE = 0.1
"""The share of a device's memory that is left for what is not counted: CUDA, temporary copies, fragments."""
PAPER_HOURS = 1040
"""H100-hours of MELT-1.6B's post-training (arXiv 2605.07721)."""
USUAL_RANK = 16
"""Of the adapters, where the recipe has none."""


@dataclass(frozen=True)
class BasePlan:
    """What the recipe takes with its base trained one way.

    Attributes:
        name: the way, in words.
        trained: weights.
        flops: of all stages.
        memory: bytes on each device, of the stage that needs the most.
        longest: tokens of the longest sequence that fits, by GB of a device; 0 where none does.
    """

    name: str
    trained: int
    flops: float
    memory: int
    longest: dict[int, int]


def base_plans(recipe: PostTraining, teacher: LoopLMConfig, processes: int, scale: int) -> list[BasePlan]:
    """Plan the recipe for each way to train its base that it can have.

    Args:
        processes, scale: see `plan.plan`.

    Raises:
        PlanError: it does not compute in bfloat16.
    """
    if recipe.dtype != "bfloat16":
        raise PlanError(f"dtype={recipe.dtype}: the peaks of devices are those of bfloat16; set dtype=bfloat16")
    bases: tuple[tuple[TrainBase, int | None], ...] = (
        ("full", None),
        ("frozen", None),
        ("lora", recipe.lora_rank or USUAL_RANK),
    )
    plans = []
    for base, rank in bases:
        try:
            with_base = replace(recipe, train_base=base, lora_rank=rank)
        except ValueError:  # nothing of it would be trained
            continue
        plans.append(base_plan(with_base, teacher, processes, scale))
    return plans


def base_plan(recipe: PostTraining, teacher: LoopLMConfig, processes: int, scale: int) -> BasePlan:
    """Plan the recipe with its base trained as it says."""
    student = student_config(recipe, teacher)
    sizes = [
        partial(stage_bytes, recipe, teacher, stage, processes, kept_by_length(teacher, recipe, stage, scale))
        for stage in recipe.stages.values()
    ]

    def most(length: int) -> int:
        return max(size(length) for size in sizes)

    lengths = range(recipe.grid, teacher.max_position_embeddings + 1, recipe.grid)
    fitting = {each: bisect_right(lengths, (1 - SPARE) * each * 1e9, key=most) for each in CAPACITIES}
    return BasePlan(
        name=recipe.train_base if recipe.lora_rank is None else f"lora, rank {recipe.lora_rank}",
        trained=trained_weights(student, teacher, recipe),
        flops=sum(
            stage.steps * recipe.sequences * sequence_flops(student, recipe, stage) for stage in recipe.stages.values()
        ),
        memory=most(recipe.sequence_length),
        longest={each: lengths[count - 1] if count else 0 for each, count in fitting.items()},
    )


def stage_bytes(
    recipe: PostTraining,
    teacher: LoopLMConfig,
    stage: Distillation,
    processes: int,
    kept: Callable[[int], float],
    length: int,
) -> int:
    """Return the bytes on each device in a stage whose sequences have so many tokens."""
    recipe = replace(recipe, sequence_length=length, batch_tokens=length * recipe.micro_batch)
    return sum(memory(teacher, recipe, stage, processes, kept(length)).values())


def device_table(plans: list[BasePlan], recipe: PostTraining, name: str, peak: float, share: float) -> str:
    """Format the plans in columns, with the hours of one device of this name at a share of its peak, FLOPs a second."""
    lines = [
        ("", *(each.name for each in plans)),
        ("weights trained", *(f"{each.trained / 1e9:.3f} G" for each in plans)),
        ("PFLOP", *(f"{each.flops / 1e15:,.0f}" for each in plans)),
        (f"{name}-hours", *(f"{each.flops / (share * peak) / 3600:,.1f}" for each in plans)),
        (f"memory, {recipe.sequence_length:,} tokens", *(f"{each.memory / 1e9:.1f} GB" for each in plans)),
    ]
    for capacity in CAPACITIES:
        longest = [each.longest[capacity] for each in plans]
        lines.append((f"longest on {capacity} GB", *(f"{each:,} tokens" if each else "none" for each in longest)))
    return (
        f"{columns(lines)}\n\nhours: of one {name} at {share:.0%} of its {peak / 1e12:,.0f} TFLOP/s in "
        f"bfloat16; the paper's run took {PAPER_HOURS:,} H100-hours\nmemory: of each device, micro_batch="
        f"{recipe.micro_batch}; of a device a tenth is left for what is not counted"
    )
