"""For `melt-serve bench depth`: right answers of the bundled checkpoints, which need their loops, on engines."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from melt_serve.bench.engine import Engine
from melt_serve.bench.report import set_loop_axis
from melt_serve.bench.shapes import BLOCK_SIZE, Model
from melt_serve.bundled import LOOPLM, MELT
from melt_serve.terminal import columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from melt_serve.config import DecodeMode, LoopLMConfig

BUNDLED: dict[Model, Path] = {"melt": MELT, "looplm": LOOPLM}
ENGINE: dict[str, object] = {
    "kv_cache_memory_bytes": 64 << 20,
    "block_size": BLOCK_SIZE,
    "max_num_seqs": 128,
    "enable_prefix_caching": False,  # questions share their first words, whose blocks would be counted once
}


@dataclass(frozen=True)
class Answers:
    """What a bundled checkpoint answered at one depth.

    Attributes:
        checkpoint: its name.
        loops: the most that a token ran.
        exit_threshold: with which it might leave before them; 1: never.
        right: the share of right answers.
        mean_loops: that the generated tokens ran.
        tokens_per_second: generated, of all questions together.
        kv_bytes_per_token: final rows, as the pool had given blocks away for them.
    """

    checkpoint: str
    loops: int
    exit_threshold: float
    right: float
    mean_loops: float
    tokens_per_second: float
    kv_bytes_per_token: int


def depths_asked(model: Model, loops: Sequence[int], thresholds: Sequence[float]) -> list[tuple[int, float]]:
    """Return the loops and exit thresholds that a bundled checkpoint is asked at: thresholds at its own loops."""
    config = config_of(model)
    whole = [(each, 1.0) for each in loops if each <= config.most_loops]
    return whole + [(config.total_ut_steps, each) for each in sorted({*thresholds}, reverse=True) if each < 1]


def ask_bundled(
    model: Model, depths: Sequence[tuple[int, float]], questions: int, decode_mode: "DecodeMode", progress: tqdm
) -> list[Answers]:
    """Ask held-out questions at each of the depths.

    Raises:
        BenchError: the engine failed.
    """
    folder, arguments = BUNDLED[model], dict(ENGINE)
    if model == "melt":
        arguments["hf_overrides"] = {"decode_mode": decode_mode}
    progress.set_description(f"{folder.name}, starting")
    asked = []
    with Engine(folder.name, folder, arguments) as engine:
        engine.answer()
        for loops, threshold in depths:
            progress.set_description(f"{folder.name}, T={loops}, questions")
            facts = engine.ask("ask_questions", questions=questions, loops=loops, exit_threshold=threshold)
            asked.append(Answers(folder.name, loops, threshold, **facts))
            progress.update()
    return asked


def trained_loops(model: Model) -> int:
    """Return the most loops that a bundled checkpoint runs."""
    return config_of(model).most_loops


def config_of(model: Model) -> "LoopLMConfig":
    """Return a bundled checkpoint's config."""
    from melt_serve.checkpoint_config import load_config

    return load_config(BUNDLED[model])


def table(answers: Sequence[Answers]) -> str:
    """Show the answers; B are bytes."""
    lines = [("checkpoint", "T", "exit threshold", "right", "loops run", "tok/s", "KV a token")]
    for each in answers:
        threshold = "-" if each.exit_threshold == 1 else f"{each.exit_threshold:g}"
        counts = (f"{each.right:.1%}", f"{each.mean_loops:.2f}", f"{each.tokens_per_second:.1f}")
        lines.append((each.checkpoint, str(each.loops), threshold, *counts, f"{each.kv_bytes_per_token:,} B"))
    return columns(lines)


def draw(axes: "Axes", answers: Sequence[Answers]) -> None:
    """Draw right answers over the loops that tokens ran: a line for each checkpoint, and one where tokens exit."""
    set_loop_axis(axes, "right answers, bundled checkpoints", sorted({each.loops for each in answers}))
    axes.set_xlabel("loops that tokens ran, on average")
    for number, name in enumerate(dict.fromkeys(each.checkpoint for each in answers)):
        for exits, style in ((False, "o-"), (True, "x--")):
            drawn = sorted(
                (each.mean_loops, each.right)
                for each in answers
                if each.checkpoint == name and (each.exit_threshold < 1) == exits
            )
            if drawn:
                label = f"{name}, exits" if exits else name
                axes.plot(*zip(*drawn, strict=True), style, color=f"C{number}", label=label)
    axes.set_ylim(0, 1.05)
    axes.legend()
