"""The training loop every stage shares: learning rates, logs, and runs that go on where they stopped."""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from melt_serve.train.loop.distributed import any_of, full_tensors, rank
from melt_serve.train.loop.logs import LOG, board, forget_after
from melt_serve.train.loop.states import load_state, save_state
from melt_serve.train.recipe import Stage
from melt_serve.train.session import Paused, Session, TrainingError

Losses = dict[str, Tensor]
"""The parts of a loss by name; `loss` is what is minimised."""


@dataclass(frozen=True)
class Saving:
    """How often a run's state is saved: when this many steps or minutes have passed since the last time.

    Attributes:
        at_end: save it when its stage is done, too.
    """

    steps: float = math.inf
    minutes: float = 1.0
    at_end: bool = True


EVERY_MINUTE = Saving()


def run_stage(
    name: str,
    stage: Stage,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    losses: Callable[[int], Losses],
    folder: Path,
    session: Session,
    saving: Saving = EVERY_MINUTE,
) -> None:
    """Train `model` for the stage's steps, going on from what `folder` holds of it.

    Every step's losses become a line of `folder/losses.jsonl`, and points in TensorBoard. The state is saved as
    `saving` says, and when the session is over; on one machine an interrupted run computes bit for bit
    what an unbroken one does.

    Args:
        name: the stage's, unique in its folder.
        losses: the loss of step i and its parts, from batch i.

    Raises:
        Paused: the session ended first.
        TrainingError: the gradient is not finite, the state cannot be saved, or `folder` holds that of another recipe.
    """
    state_file = folder / f"{name}.state.pt"
    step = load_state(state_file, stage, model, optimizers)
    if rank() == 0:
        forget_after(folder / LOG, name, step)
    highest = [[group["initial_lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    saved, saved_step = time.monotonic(), step
    parameters = [weight for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]]
    with (
        session.listen(),
        tqdm(
            total=stage.steps, initial=step, desc=f"{name:>10}", unit="step", dynamic_ncols=True, disable=rank() > 0
        ) as bar,
        (folder / LOG if rank() == 0 else Path(os.devnull)).open("a", encoding="utf-8") as log,
        board(folder, name, step) as show,
    ):
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
            numbers = {part: value.item() for part, value in parts.items()}
            if not norm.isfinite():
                raise TrainingError(
                    f"{name}: the gradient of step {step} is not finite (loss {numbers['loss']}); the last saved state "
                    "is good. Look at the data of that step, or start a run with a lower learning rate"
                )
            for optimizer in optimizers:
                optimizer.step()
            numbers |= {"gradient_norm": norm.item(), "seconds": time.monotonic() - begun}
            log.write(json.dumps({"stage": name, "step": step, **numbers}) + "\n")
            show({**numbers, "learning_rate_share": share}, step)
            step += 1
            bar.update()
            bar.set_postfix({part: f"{numbers[part]:.4f}" for part in parts}, refresh=False)
            due = step - saved_step >= saving.steps or time.monotonic() - saved > 60 * saving.minutes
            over, due = any_of([session.over, due], parameters[0].device)
            if (step == stage.steps and saving.at_end) or over or due:
                log.flush()
                save_state(state_file, stage, step, model, optimizers)
                saved, saved_step = time.monotonic(), step
            if over:
                raise Paused


def share_of_rate(stage: Stage, step: int) -> float:
    """Return the share of the highest learning rate at this step: a linear rise, a plateau, a linear fall."""
    fall = max(1, round(stage.steps * (1 - stage.decay_from)))
    return min(1.0, (step + 1) / stage.warmup, (stage.steps - step) / fall)
