"""Where a run's numbers are shown besides its folder: TensorBoard, Weights & Biases, or a logger of one's own.

A logger is a context manager that gives a function of numbers and a step:

    @contextmanager
    def mine(folder: Path, stage: str, step: int) -> Iterator[Callable[[Mapping[str, float], int], None]]:
        yield lambda numbers, step: print(stage, step, numbers)

`report_to = ["mine_module:mine"]` in a recipe names it. Points of a stage from `step` on come anew: a run that was
killed repeats what it had not saved.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from melt_serve.train.loop.distributed import rank
from melt_serve.train.session import Paused, TrainingError

WANDB_ID = "wandb.id"

Show = Callable[[Mapping[str, Any], int], None]
Logger = Callable[[Path, str, int], AbstractContextManager[Show]]


@contextmanager
def loggers(report_to: Sequence[str], folder: Path, stage: str, step: int) -> Iterator[Show]:
    """Open a stage's loggers, those of the first process alone; give what shows numbers in all of them.

    Lists are shown entry by entry: `kd_by_loop` as `kd_by_loop/1`, `kd_by_loop/2`. Texts are left out.

    Args:
        report_to: `tensorboard`, `wandb`, or `module:function`.

    Raises:
        TrainingError: there is no such logger.
    """
    with ExitStack() as stack:
        named = map(logger_of, report_to if rank() == 0 else ())
        opened = [stack.enter_context(logger(folder, stage, step)) for logger in named]

        def show(numbers: Mapping[str, Any], step: int) -> None:
            points = flat(numbers)
            for each in opened:
                each(points, step)

        yield show


def logger_of(name: str) -> Logger:
    """Return the logger of that name.

    Raises:
        TrainingError: there is none, or what it needs is not installed.
    """
    if name == "wandb":
        import_wandb()
    if name in LOGGERS:
        return LOGGERS[name]
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise TrainingError(
            f"report_to: there is no logger {name!r} ({error}); name {', '.join(LOGGERS)}, or module:function"
        ) from error


def flat(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Return all numbers by name, those of lists and tables with their place in the name."""
    points: dict[str, float] = {}
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            points |= {f"{name}/{inner}": each for inner, each in flat(value).items()}
        elif isinstance(value, list):
            points |= {f"{name}/{place}": each for place, each in enumerate(value, 1) if isinstance(each, int | float)}
        elif isinstance(value, int | float):
            points[name] = value
    return points


@contextmanager
def tensorboard(folder: Path, stage: str, step: int) -> Iterator[Show]:
    """Show numbers in TensorBoard, where it is installed; points from `step` on are drawn anew."""
    if find_spec("tensorboard") is None:
        yield lambda numbers, step: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard" / stage), purge_step=step) as writer:

        def show(numbers: Mapping[str, float], step: int) -> None:
            for part, value in numbers.items():
                writer.add_scalar(part, value, step)

        yield show


def import_wandb() -> ModuleType:
    """Import Weights & Biases.

    Raises:
        TrainingError: it is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise TrainingError("report_to=wandb needs Weights & Biases: pip install wandb") from None
    return cast(ModuleType, wandb)


@contextmanager
def wandb(folder: Path, stage: str, step: int) -> Iterator[Show]:
    """Show numbers in Weights & Biases, a run a stage, the same one in every session; it reads WANDB_* itself.

    Raises:
        TrainingError: it is not installed.
    """
    wandb = import_wandb()
    name, noted = folder.resolve().name, folder / WANDB_ID
    if not noted.exists():  # a folder of that name may have held another run before
        noted.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    own = f"{name}-{noted.read_text(encoding='utf-8').strip()}"
    try:
        run = wandb.init(dir=folder, name=f"{name}-{stage}", id=f"{own}-{stage}", group=own, resume="allow")
    except wandb.Error as error:
        raise TrainingError(f"report_to=wandb: {' '.join(str(error).split())}") from error
    run.define_metric("*", step_metric="at_step")  # its own counter never goes back, ours does after kill -9

    def show(numbers: Mapping[str, float], step: int) -> None:
        run.log({**numbers, "at_step": step})

    failed = 1
    try:
        yield show
        failed = 0
    except Paused:
        failed = 0
        raise
    finally:
        run.finish(exit_code=failed)  # `with run` prints a traceback where a session ends, and calls the run crashed


LOGGERS: dict[str, Logger] = {"tensorboard": tensorboard, "wandb": wandb}
