"""The training loop every stage shares: learning rates, logs, and runs that go on where they stopped."""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from melt_serve.train.loop.distributed import any_of, ending_together, full_tensors, rank
from melt_serve.train.loop.loggers import Show, loggers
from melt_serve.train.loop.logs import EVALUATIONS, LOG, forget_after, listed, read_log
from melt_serve.train.loop.states import keep_for_good, load_state, save_state
from melt_serve.train.session import Paused, Session, TrainingError
from melt_serve.train.stages import Stage

Losses = dict[str, Tensor]
"""The parts of a loss by name, each a number or a list of them; `loss` is what is minimised."""
Watch = Callable[[int, Show], None]
"""Is told how many steps are done, when a session begins and after each step, and may show numbers of it."""


def unwatched(done: int, show: Show) -> None:
    """Do nothing while a stage goes on."""


@dataclass(frozen=True)
class Saving:
    """How often a run's state is saved: when this many steps or minutes have passed since the last time.

    Attributes:
        at_end: save it when its stage is done, too.
        keep_last, keep_every: see `keep_for_good`; a state is saved when it is to be kept.
        most_skipped: the share of the steps that may be skipped because their gradient is not finite.
    """

    steps: float = math.inf
    minutes: float = 1.0
    at_end: bool = True
    keep_last: int = 0
    keep_every: int | None = None
    most_skipped: float = 0.0


@dataclass(frozen=True)
class Run:
    """What all stages of a run share in one session.

    Attributes:
        folder: holds their states and logs.
        report_to: see `loggers`.
    """

    folder: Path
    session: Session
    saving: Saving = Saving()
    report_to: Sequence[str] = ("tensorboard",)


def run_stage(
    name: str,
    stage: Stage,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    losses: Callable[[int], Losses],
    run: Run,
    facts: Callable[[int, float], dict[str, float]] = lambda step, seconds: {},
    watch: Watch = unwatched,
) -> None:
    """Train `model` for the stage's steps, going on from what the run's folder holds of it.

    Every step's losses become a line of `losses.jsonl` there, and points where they are reported to. A step whose
    gradient is not finite changes nothing and is marked `skipped`. The state is saved as `Run.saving` says, and when
    the session is over; on one machine an interrupted run computes bit for bit what an unbroken one does.

    Args:
        name: the stage's, unique in its folder.
        losses: the loss of step i and its parts, from batch i.
        facts: what else is logged of step i, which took so many seconds.

    Raises:
        Paused: the session ended first.
        TrainingError: too many gradients are not finite, the state cannot be saved, or the folder holds that of another
            recipe.
    """
    folder, session, saving = run.folder, run.session, run.saving
    state_file = folder / f"{name}.state.pt"
    step = load_state(state_file, stage, model, optimizers)
    if rank() == 0:
        forget_after(folder / LOG, name, step)
        forget_after(folder / EVALUATIONS, name, step + 1)
    skipped = 0  # counted by the first process, which speaks for all
    if rank() == 0:
        skipped = sum(entry["stage"] == name and "skipped" in entry for entry in read_log(folder / LOG))
    highest = [[group["initial_lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    saved, saved_step = time.monotonic(), step
    parameters = [weight for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]]
    with (
        session.listen(),
        tqdm(
            total=stage.steps, initial=step, desc=f"{name:>10}", unit="step", dynamic_ncols=True, disable=rank() > 0
        ) as bar,
        (folder / LOG if rank() == 0 else Path(os.devnull)).open("a", encoding="utf-8") as log,
        loggers(run.report_to, folder, name, step) as show,
    ):
        watch(step, show)
        while step < stage.steps:
            begun = time.monotonic()
            share = share_of_rate(stage, step)
            for optimizer, rates in zip(optimizers, highest, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * share
                optimizer.zero_grad()
            parts = losses(step)
            parts["loss"].backward()
            norm = full_tensors(nn.utils.clip_grad_norm_(parameters, stage.clip))
            numbers = {part: value.tolist() for part, value in parts.items()}
            if norm.isfinite():
                for optimizer in optimizers:
                    optimizer.step()
            else:
                skipped += rank() == 0
                (lost,) = any_of([skipped > saving.most_skipped * stage.steps])
                if lost:
                    raise TrainingError(
                        f"{name}: the gradient of step {step} is not finite (loss {numbers['loss']}), nor were "
                        f"{skipped - 1} before; the last saved state is good. Look at the data of that step, start a "
                        "run with a lower learning rate, or let more steps be skipped (most_skipped)"
                    )
            seconds = time.monotonic() - begun
            numbers |= {"gradient_norm": norm.item(), "learning_rate": optimizers[0].param_groups[0]["lr"]}
            numbers |= {"skipped": 1} if not norm.isfinite() else {}
            numbers = finite(numbers | facts(step, seconds) | {"seconds": seconds})
            log.write(json.dumps({"stage": name, "step": step, **numbers}) + "\n")
            log.flush()
            show(numbers, step)
            step += 1
            bar.update()
            bar.set_postfix({p: f"{n:.4f}" for p in parts if isinstance(n := numbers.get(p), float)}, refresh=False)
            due = step - saved_step >= saving.steps or time.monotonic() - saved > 60 * saving.minutes
            due = due or (saving.keep_every is not None and step % saving.keep_every == 0)
            over, due = any_of([session.over, due])
            if (step == stage.steps and saving.at_end) or over or due:
                ending_together(partial(save, state_file, stage, step, model, optimizers, saving))
                saved, saved_step = time.monotonic(), step
            if over:
                raise Paused
            watch(step, show)


def save(
    path: Path, stage: Stage, step: int, model: nn.Module, optimizers: Sequence[Optimizer], saving: Saving
) -> None:
    """Write the run's state, and keep or drop older ones; only the first process writes."""
    save_state(path, stage, step, model, optimizers)
    if rank() == 0:
        keep_for_good(path, step, saving.keep_last, saving.keep_every)


def finite(numbers: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is no number: JSON has no word for it."""
    return {name: value for name, value in numbers.items() if all(map(math.isfinite, listed(value)))}


def share_of_rate(stage: Stage, step: int) -> float:
    """Return the share of the highest learning rate at this step: a linear rise, a plateau, a linear fall."""
    fall = max(1, round(stage.steps * (1 - stage.decay_from)))
    return min(1.0, (step + 1) / stage.warmup, (stage.steps - step) / fall)
