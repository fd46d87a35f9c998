"""The training loop every stage shares: learning rates, logs, and runs that go on where they stopped."""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from melt_serve.train.atomic import replacing
from melt_serve.train.loop.distributed import any_of, full_tensors, load_model, load_optimizer, rank
from melt_serve.train.loop.logs import LOG, board, forget_after
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


def save_state(path: Path, stage: Stage, step: int, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Write the run's state, all of it or nothing; whole tensors, so that any number of processes can load it.

    Raises:
        TrainingError: the disk is full, or fails.
    """
    state = {
        "stage": asdict(stage),
        "step": step,
        "model": full_tensors(model.state_dict()),
        "optimizers": [full_tensors(optimizer.state_dict()) for optimizer in optimizers],
    }
    if rank() > 0:
        return
    try:
        with replacing(path) as part, part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer hides the disk's error behind one of its own
        reason = error if isinstance(error, OSError) else error.__context__ or error
        kept = "the one saved before is whole" if path.exists() else "there is none yet"
        raise TrainingError(f"the state {path} cannot be saved ({reason}); {kept}") from error


def load_state(path: Path, stage: Stage, model: nn.Module, optimizers: Sequence[Optimizer]) -> int:
    """Load a saved state; return the steps done, 0 where there is none.

    Raises:
        TrainingError: the state is of another recipe.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["stage"] != asdict(stage):
        changed = sorted(key for key, value in asdict(stage).items() if state["stage"].get(key) != value)
        raise TrainingError(f"{path} was made by another recipe ({', '.join(changed)} differ); use another folder")
    load_model(model, state["model"])
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
        load_optimizer(optimizer, optimizer_state)
    return state["step"]
