"""What is checked before a run's first step: its data and its disk. The teacher's checks are in `distil/teacher.py`."""

import math
import sys
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from melt_serve.config import MeltConfig, weight_shapes
from melt_serve.convert import check_space
from melt_serve.train.data.datasets import Corpus
from melt_serve.train.data.packing import Batches, Counts
from melt_serve.train.data.records import DataError
from melt_serve.train.data.sequences import packing_of
from melt_serve.train.distil.build import DTYPES
from melt_serve.train.distil.shared_base import ADAPTED, is_gate
from melt_serve.train.loop.states import KEPT
from melt_serve.train.recipe import PostTraining
from melt_serve.train.session import TrainingError

FEW = 0.1
"""Of what is learnt, the share that should lie beyond the first chunk of its document, or a warning says so."""


def check_data(recipe: PostTraining, corpus: Corpus, tokenizer: PreTrainedTokenizerFast) -> None:
    """Read the beginning of every file, one window of records together, and see that a run learns from it.

    A MELT's rows are learnt where a token sees those of an earlier chunk, or in `token` mode of its own.

    Raises:
        TrainingError: no sequence has a second chunk.
        DataError: a record is broken, where none may be; there is nothing to learn, or nothing about rows.
    """
    smallest = min(recipe.chunk_sizes)
    rows_in_chunk = any(stage.decode_aware_from < 1 for stage in recipe.stages.values())
    if recipe.sequence_length <= smallest and not rows_in_chunk:
        raise TrainingError(
            f"sequence_length={recipe.sequence_length} is not more than chunk_size={smallest}: all tokens would lie in "
            "one chunk, and nothing would be learnt about rows; set a smaller chunk_size, or longer sequences"
        )
    window = math.ceil(recipe.data.window / len(corpus.sources))
    packing = replace(packing_of(recipe), chunk_size=smallest, window=window, weights=None)
    found: list[Counts] = []
    for source in corpus.sources:
        batches = Batches(Corpus(sources=[source]), tokenizer, packing, report=lambda broken: None)
        batches.next_window()
        found.append(batches.counts)
    learnt, beyond = (sum(getattr(each, name) for each in found) for name in ("supervised", "beyond_first_chunk"))
    names = ", ".join(str(source.path) for source in corpus.sources)
    if not learnt:
        raise DataError(f"nothing to learn at the beginning of {names}; `melt-serve train data` says why")
    if rows_in_chunk or beyond >= FEW * learnt:
        return
    says = (
        f"{beyond / learnt:.1%} of what is learnt in {names} lies beyond the first chunk_size={smallest} tokens of its "
        "document, and only there rows are learnt"
    )
    if not beyond:
        raise DataError(f"{says}; set a smaller chunk_size, or use longer documents")
    print(f"warning: {says}: documents are short for it; consider a smaller chunk_size", file=sys.stderr)


def check_disk(recipe: PostTraining, config: MeltConfig, folder: Path) -> None:
    """See that the disks have room for the states of all stages, and for the checkpoint.

    Every stage keeps its newest state and the one before, or as many as `keep_last` says, and what `keep_every` asks
    for; and while one is written there is another. States hold what is trained.

    Raises:
        ConversionError: one has not.
    """
    shapes = list(weight_shapes(config))
    weights = sum(math.prod(shape) for _, shape in shapes)
    trained = weights
    if recipe.train_base != "full":
        trained = sum(math.prod(shape) for key, shape in shapes if is_gate(key))
        adapted = (shape for key, shape in shapes if key.split(".")[-2] in ADAPTED)
        trained += (recipe.lora_rank or 0) * sum(map(sum, adapted))
    found = (path.stat() for path in folder.rglob("*.state.pt*"))
    kept = sum({(each.st_dev, each.st_ino): each.st_size for each in found}.values())  # one may have many names
    every = sum(stage.steps // recipe.keep_every for stage in recipe.stages.values()) if recipe.keep_every else 0
    states = max(2, recipe.keep_last) * len(recipe.stages) + every + 1
    needed = states * 3 * 4 * trained  # weights and AdamW's two moments, in float32
    check_space(folder / KEPT, max(0, needed - kept))
    check_space(Path(recipe.output).absolute(), DTYPES[recipe.dtype].itemsize * weights)
