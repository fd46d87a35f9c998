"""The memory of one real training step, as sequences and loops grow, beside what `cost` says of it.

Letters as in `melt_serve.modeling`: T loops, S tokens of a sequence.
"""

import gc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from melt_serve.capacity import PlanError
from melt_serve.config import LoopLMConfig
from melt_serve.train.cost.arithmetic import step_memory
from melt_serve.train.cost.probe import kept_for_backward, random_step, reduced
from melt_serve.train.recipe import PostTraining
from melt_serve.train.stages import Distillation

PHASE_1, PHASE_2, WITHOUT = "phase 1", "phase 2", "phase 1 without the LoopLM's rows"


@dataclass(frozen=True)
class Measured:
    """The memory of one step of one sequence, forward and backward.

    Attributes:
        variant: PHASE_1, PHASE_2, or WITHOUT: phase 1 with MELT's rows alone.
        length: S.
        loops: T.
        peak: the most bytes that were there at once, but for weights and what else was there before the step.
        planned: the same, as `arithmetic.step_memory` has it.
    """

    variant: str
    checkpoint_chunks: bool
    length: int
    loops: int
    peak: int
    planned: int


def measure(
    recipe: PostTraining, teacher: LoopLMConfig, scale: int, lengths: Sequence[int], loops: Sequence[int]
) -> list[Measured]:
    """Measure both phases, with and without `checkpoint_chunks`: every length at the recipe's loops, all loops at one.

    Args:
        teacher: its shape, of which the width is divided by `scale`, see `probe.reduced`.

    Raises:
        PlanError: the recipe lacks one of the phases.
    """
    small, recipe = reduced(teacher, recipe, scale)
    if recipe.transition is None or recipe.alignment is None:
        raise PlanError("memory is measured of both phases: the recipe needs the stages transition and alignment")
    usual, middle = max(recipe.transition.loops), sorted(lengths)[(len(lengths) - 1) // 2]
    points = sorted({(length, usual) for length in lengths} | {(middle, each) for each in loops})
    variants = {
        PHASE_1: recipe.transition,
        PHASE_2: recipe.alignment,
        WITHOUT: replace(recipe.transition, interpolate=False),
    }
    runs = list(product(points, (True, False), variants.items()))
    found = []
    for (length, each_loops), recomputed, (variant, stage) in tqdm(runs, unit="step", dynamic_ncols=True):
        stage = replace(stage, loops=(each_loops,))
        run = replace(
            recipe,
            sequence_length=length,
            batch_tokens=length * recipe.micro_batch,
            checkpoint_chunks=recomputed,
            transition=stage,
            alignment=stage,
            max_loops=None,
        )
        planned = step_memory(small, run, stage, kept_for_backward(small, run, stage, 2))
        peak = peak_of_step(run, small, stage)
        found.append(Measured(variant, recomputed, length, each_loops, peak, round(sum(planned.values()))))
    return found


def peak_of_step(recipe: PostTraining, teacher: LoopLMConfig, stage: Distillation) -> int:
    """Return the most bytes at once in a step's forward and backward, on this machine's device."""
    student, loss = random_step(teacher, recipe, stage)
    student.checkpoint_chunks = recipe.checkpoint_chunks
    gc.collect()
    if student.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss().backward()
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as counted:
        loss().backward()
    return counted.most


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages that operations made and nobody has given back.

    What a kernel needs for itself while it runs is not seen.

    Attributes:
        now: at this moment.
        most: the most there ever were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        made = operation(*arguments, **(keywords or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor):
                self.see(each.untyped_storage())
        self.most = max(self.most, self.now)
        return made

    def see(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is gone."""
        address, size = storage._cdata, storage.nbytes()
        if address in self.storages:
            return

        def gone(_: object) -> None:
            del self.storages[address]
            self.now -= size

        self.storages[address] = weakref.ref(storage, gone)
        self.now += size
