"""For `melt-serve bench depth`: right answers of the bundled checkpoint, which needs its loops, on an engine."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from melt_serve.bench.engine import Engine
from melt_serve.bench.shapes import BLOCK_SIZE
from melt_serve.bundled import MELT

if TYPE_CHECKING:
    from melt_serve.config import DecodeMode

CACHE = {"kv_cache_memory_bytes": 64 << 20, "block_size": BLOCK_SIZE, "max_num_seqs": 128}


def accuracy_by_depth(
    depths: Sequence[int], questions: int, decode_mode: "DecodeMode", progress: tqdm
) -> dict[int, float]:
    """Return the share of held-out questions that the checkpoint answers right at each depth.

    Raises:
        BenchError: the engine failed.
    """
    progress.set_description("starting")
    right = {}
    arguments = {**CACHE, "hf_overrides": {"decode_mode": decode_mode}}
    with Engine(f"{MELT.name}, {decode_mode} mode", MELT, arguments) as engine:
        engine.answer()
        for loops in depths:
            progress.set_description(f"T={loops}, questions")
            right[loops] = engine.ask("share_right", questions=questions, loops=loops)
            progress.update()
    return right


def trained_loops() -> int:
    """Return the most loops that the checkpoint runs."""
    from melt_serve.config import MeltConfig

    most = MeltConfig.from_pretrained(MELT).max_loops
    assert most is not None
    return most
