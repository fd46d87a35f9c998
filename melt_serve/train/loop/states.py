"""The state of a run on disk: written whole or not at all, with the one before it kept, and checked when it is read.

`torch.save` writes a zip archive with a checksum of every tensor, which `torch.load` does not look at.
"""

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from torch import nn
from torch.optim import Optimizer

from melt_serve.train.atomic import replacing
from melt_serve.train.loop.distributed import full_tensors, load_model, load_optimizer, rank, trained_state
from melt_serve.train.session import TrainingError
from melt_serve.train.stages import Stage

KEPT = "states"
PARTS = ("stage", "step", "model", "optimizers")


def save_state(path: Path, stage: Stage, step: int, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Write the run's state, all of it or nothing; whole tensors, so that any number of processes can load it.

    The state that was there is kept beside it, see `before`.

    Raises:
        TrainingError: the disk is full, or fails.
    """
    state = {
        "stage": asdict(stage),
        "step": step,
        "model": full_tensors(trained_state(model), by_all=False),
        "optimizers": [full_tensors(optimizer.state_dict(), by_all=False) for optimizer in optimizers],
    }
    if rank() > 0:
        return
    try:
        with replacing(path) as part:
            with part.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            keep(path)
    except (OSError, RuntimeError) as error:  # torch's writer hides the disk's error behind one of its own
        reason = error if isinstance(error, OSError) else error.__context__ or error
        kept = "the one saved before is whole" if path.exists() else "there is none yet"
        raise TrainingError(f"the state {path} cannot be saved ({reason}); {kept}") from error


def before(path: Path) -> Path:
    """Return where the state is kept that was saved before the newest."""
    return path.with_name(f"{path.name}.before")


def keep(path: Path) -> None:
    """Give a state that is about to be replaced a second name, so that there is one at every moment."""
    if path.exists():
        before(path).unlink(missing_ok=True)
        with suppress(OSError):  # a file system without hard links keeps the newest only
            os.link(path, before(path))


def keep_for_good(path: Path, step: int, last: int, every: int | None) -> None:
    """Keep the newest state under a name of its own in `states/` beside it, and of those there only some.

    Args:
        step: that it is of.
        last: keep so many.
        every: keep those of multiples of this many steps, too.
    """
    folder = path.parent / KEPT
    if not last and (every is None or step % every):
        return
    name = path.name.removesuffix(".state.pt")
    folder.mkdir(exist_ok=True)
    target = folder / f"{name}-{step:06}.state.pt"
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, target)
    own = re.compile(rf"{re.escape(name)}-\d{{6,}}\.state\.pt")  # not those of a stage `more-2`, if this is `more`
    found = sorted(each for each in folder.iterdir() if own.fullmatch(each.name))
    for old in found[: max(0, len(found) - last)]:
        if every is None or int(old.name.removesuffix(".state.pt").rpartition("-")[2]) % every:
            old.unlink()


def load_state(path: Path, stage: Stage, model: nn.Module, optimizers: Sequence[Optimizer]) -> int:
    """Load a saved state; return the steps done, 0 where there is none. The stage may have other steps than before.

    Raises:
        TrainingError: the state is damaged, or of another recipe.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
    if not path.exists():
        return 0
    try:
        state = read_state(path)
    except TrainingError as error:
        raise TrainingError(f"{error}; {way_out(path)}") from error
    own = {key: value for key, value in asdict(stage).items() if key != "steps"}
    if changed := sorted(key for key, value in own.items() if state["stage"].get(key) != value):
        raise TrainingError(f"{path} was made by another recipe ({', '.join(changed)} differ); use another folder")
    if state["step"] > stage.steps:
        raise TrainingError(f"{path} is of step {state['step']}, and steps={stage.steps} are fewer; ask for as many")
    try:
        load_model(model, state["model"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, optimizer_state)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise TrainingError(f"{path} does not fit this model ({reason}); {way_out(path)}") from error
    return state["step"]


def read_state(path: Path) -> dict[str, Any]:
    """Read a state, and compare every part of it with its checksum.

    Raises:
        TrainingError: it is damaged.
    """
    try:
        with ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # random bytes can look like anything
        raise TrainingError(f"the state {path} cannot be read ({error})") from error
    if damaged is not None:
        raise TrainingError(f"the state {path} is damaged: {damaged} does not match its checksum")
    if lost := [part for part in PARTS if part not in state]:
        raise TrainingError(f"the state {path} lacks {lost[0]}")
    return state


def way_out(path: Path) -> str:
    """Say how a run whose newest state is damaged goes on."""
    older = before(path)
    try:
        step = read_state(older)["step"]
    except TrainingError:
        return f"delete {path} to begin this stage anew"
    return f"the one before it, of step {step}, is whole. Go on from there: mv {older} {path}"
