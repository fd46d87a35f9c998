"""What a step would make a GPU's host wait for, found on a CPU, where nothing waits.

On a CPU the device is the host, so a copy is no event of its own. What is watched are the operations that cannot go on
without a value of a tensor, and the methods that bring one to the host, while the model's forward runs.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from melt_serve.engine import exits, step
from melt_serve.engine.melt import MeltModel
from tests.engine.engines import CONTRASTS, DEPTHS, EXITS, LENGTHS, RIGHT, Served, distance, generate, prompts

OPERATIONS = ("nonzero", "_local_scalar_dense", "masked_select", "_unique2", "unique_dim", "repeat_interleave")
"""Operators of PyTorch whose result, or its shape, depends on a value."""
TO_HOST = ("cpu", "tolist", "numpy", "item", "__bool__", "__int__", "__float__", "__index__", "__array__")
"""Methods of a tensor that bring its values to the host."""
FROM_HOST = ("tensor", "as_tensor")
"""Functions of PyTorch that make a tensor of the host's values: on a GPU a copy from memory that is not pinned."""


@dataclass
class Step:
    """One forward: how often the host reads what it may wait for, copies it starts, and waits that nobody planned."""

    plan: Any
    reads: int = 0
    copies: int = 0
    surprises: list[str] = field(default_factory=list)


class Operations(TorchDispatchMode):
    """Notes operators whose outcome depends on a value."""

    def __init__(self, note: Callable[[str], None]):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in OPERATIONS:
            self.note(name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            kinds = [index.dtype for index in args[1] if index is not None]
            if torch.bool in kinds or torch.uint8 in kinds:
                self.note(f"{name} by booleans")
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[list[Step]]:
    """Give the steps that the model runs inside, each with what was seen in it."""
    steps: list[Step] = []
    quiet = 1  # outside of a forward, and inside of what is counted by itself

    def note(what: str) -> None:
        if not quiet:
            steps[-1].surprises.append(what)

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal quiet
            if not quiet:
                setattr(steps[-1], name, getattr(steps[-1], name) + 1)
            quiet += 1
            try:
                return function(*args, **kwargs)
            finally:
                quiet -= 1

        return call

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            moves = name != "to" or "device" in kwargs or any(isinstance(arg, str | torch.device) for arg in args[1:])
            if moves and not kwargs.get("non_blocking") and not kwargs.get("pin_memory"):
                note(name)
            return function(*args, **kwargs)

        return call

    forward = MeltModel.forward

    def run(model: MeltModel, *args: Any, **kwargs: Any) -> Any:
        nonlocal quiet
        steps.append(Step(kwargs.get("plan", args[-1])))
        quiet -= 1
        try:
            with Operations(note):
                return forward(model, *args, **kwargs)
        finally:
            quiet += 1

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(MeltModel, "forward", run)
        for module in (step, exits):
            patches.setattr(module, "to_host", counted("reads", step.to_host))
            patches.setattr(module, "async_tensor_h2d", counted("copies", step.async_tensor_h2d))
        patches.setattr(exits, "begin_to_host", counted("copies", step.begin_to_host))
        for name in (*TO_HOST, "to", "new_tensor"):
            patches.setattr(torch.Tensor, name, noted(name, getattr(torch.Tensor, name)))
        for name in FROM_HOST:
            patches.setattr(torch, name, noted(name, getattr(torch, name)))
        yield steps


def judge_waits(served: Served) -> None:
    """Answer prompts and generate at one depth, at several, and with exits: each right, and none waited for unplanned.

    Depths known before cost no wait, and at most one copy. Exits cost a wait for each loop after which a token may go.
    Contrasts and exit probabilities of tokens cost copies, and no wait.
    """
    llm, model = served
    asked = prompts(*LENGTHS)
    with watched() as steps:
        outputs = generate(llm, asked, DEPTHS, contrasts=CONTRASTS, max_tokens=2, told=True)
    assert distance(model, asked, outputs, DEPTHS, contrasts=CONTRASTS) <= RIGHT
    assert not {what for each in steps for what in each.surprises} and not any(each.reads for each in steps)
    assert max(each.copies for each in steps) > 2
    assert llm.reset_prefix_cache()
    for loops, exit_thresholds in ((3, None), (DEPTHS, None), (DEPTHS, EXITS)):
        with watched() as steps:
            outputs = generate(llm, asked, loops, exit_thresholds, max_tokens=6)
        assert distance(model, asked, outputs, loops, exit_thresholds) <= RIGHT
        surprises = {what for each in steps for what in each.surprises}
        assert len(steps) >= 6 and not surprises, surprises
        for each in steps:
            if exit_thresholds is None:
                assert each.reads == 0 and each.copies <= 1
            else:
                assert each.reads < each.plan.deepest
        assert sum(each.reads for each in steps) > 0 or exit_thresholds is None
        assert llm.reset_prefix_cache()
