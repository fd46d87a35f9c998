"""What is asked of a server, second by second: a scenario is a list of steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Prompt = str
"""How long prompts are: `short` (as trained) or `long` (many stories after one another)."""


@dataclass(frozen=True)
class Step:
    """A while of constant load.

    Attributes:
        seconds: how long.
        users: that ask at the same time, each one request after the other.
        loops: what requests ask for, by turns; a LoopLM's server cannot be asked and gets one number.
        tokens: of every answer; None for as many as the answer takes.
        long: whether prompts are as long as the model's context allows.
    """

    seconds: float
    users: int
    loops: tuple[int, ...]
    tokens: int | None = None
    long: bool = False


@dataclass(frozen=True)
class Options:
    """What the command line may change."""

    seconds: float
    users: int
    loops: Sequence[int]


@dataclass(frozen=True)
class Scenario:
    """A plan and what it is for.

    Attributes:
        seconds: of a step, unless the command line says otherwise.
        beside_looplm: whether the LoopLM gets the same load, on a server for each depth.
    """

    about: str
    steps: Callable[[Options], list[Step]]
    seconds: float = 60
    users: int = 16
    loops: tuple[int, ...] = (1, 2, 4, 8)
    beside_looplm: bool = False


def deep_loops(options: Options) -> list[Step]:
    """Ask the same requests, of the same lengths, ever deeper."""
    return [Step(options.seconds, options.users, (loops,), tokens=64) for loops in options.loops]


def mixed_depth(options: Options) -> list[Step]:
    """Mix all depths in every batch."""
    return [Step(options.seconds, options.users, tuple(options.loops))]


def burst(options: Options) -> list[Step]:
    """Keep a server quiet, put eight times the users on it at once, and let it be quiet again."""
    few, loops = max(1, options.users // 8), tuple(options.loops)
    return [Step(options.seconds, users, loops) for users in (few, 8 * few, few)]


def long_context(options: Options) -> list[Step]:
    """Send prompts that fill the context, shallow and deep."""
    return [Step(options.seconds, options.users, (loops,), tokens=32, long=True) for loops in options.loops]


def soak(options: Options) -> list[Step]:
    """Mix all depths, for long and steadily."""
    return [Step(options.seconds, options.users, tuple(options.loops))]


SCENARIOS = {
    "deep_loops": Scenario(
        "constant users, loops 1, 2, 4, 8, 16; then the same for a LoopLM",
        deep_loops,
        loops=(1, 2, 4, 8, 16),
        beside_looplm=True,
    ),
    "mixed_depth": Scenario("requests of all depths at the same time", mixed_depth),
    "burst": Scenario("eight times the users at once, for a while", burst, users=32),
    "long_context": Scenario("prompts that fill the context, shallow and deep", long_context, users=4, loops=(1, 8)),
    "soak": Scenario("half an hour of everything: does anything leak?", soak, seconds=1800, users=8),
}
