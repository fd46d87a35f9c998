"""Where the sequences of a post-training come from: by number, so that a step's are the same whenever it runs."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from melt_serve.train.atomic import replacing
from melt_serve.train.data.batch import IGNORED, Batch
from melt_serve.train.data.datasets import Corpus
from melt_serve.train.data.order import digest_of
from melt_serve.train.data.packing import Batches, Packing, collate
from melt_serve.train.recipe import PostTraining

INDEX = "data.jsonl"
logger = logging.getLogger(__name__)


class Sequences:
    """A run's sequences: packs of documents, or a document each.

    They come from a stream that only goes forward. Where its windows of records begin is noted in the run's folder, a
    line each, so that a run that is resumed reads one window, not all that came before.
    """

    def __init__(self, recipe: PostTraining, tokenizer: PreTrainedTokenizerFast, folder: Path):
        """Open the files; nothing is read yet.

        Raises:
            DataError: the files are missing, or none that can be read.
        """
        self.packing = packing_of(recipe)
        self.corpus = Corpus(recipe.data.files)
        self.stream = Batches(self.corpus, tokenizer, self.packing, ahead=True)
        self.index = folder / INDEX
        self.start = self.stream.state_dict()
        text = self.index.read_text(encoding="utf-8") if self.index.exists() else ""
        noted = {entry["first"]: entry["state"] for entry in map(parsed, text.splitlines()) if entry}
        self.windows: list[tuple[int, dict[str, Any]]] = list(noted.items())
        self.torn = bool(text) and not text.endswith("\n")
        self.next = 0

    def __call__(self, numbers: range) -> Batch:
        """Return the sequences with these numbers, as a batch.

        Raises:
            DataError: see `Batches`.
        """
        self.go_to(numbers.start)
        batch = collate([self.next_pack() for _ in numbers], self.packing)
        return batch if not self.packing.alone else as_chats(batch)

    def go_to(self, number: int) -> None:
        """Let this sequence be the next one."""
        known = [(first, state) for first, state in self.windows if first <= number]
        first, state = max(known, key=lambda window: window[0], default=(0, None))
        begins = state and not self.stream.packs  # it may say which records were left out, though they are whole now
        if number < self.next or first > self.next or begins:
            self.stream.load_state_dict(state or self.start)
            self.next = first
        while self.next < number:
            self.next_pack()

    def next_pack(self) -> list[Any]:
        """Return the next sequence's documents."""
        pack = self.stream.next_pack()
        if self.stream.used == 1 and all(first != self.next for first, _ in self.windows):
            found = {"broken": self.stream.broken, "digest": self.stream.digest}
            self.windows.append((self.next, {**self.stream.state_dict(), "used": 0, **found}))
            self.note()
        self.next += 1
        return pack

    def close(self) -> None:
        """Stop reading ahead."""
        self.stream.close()

    def accept_changes(self) -> bool:
        """Take files that have changed since the run began, if all that it has read of them so far is the same.

        Broken records that were left out may have been mended; those that were not reached may be anything.

        Returns:
            False where something that was read has changed, or nothing is known of it; then nothing is taken.
        """
        for _, state in self.windows:
            records, _ = self.stream.order.window(state["epoch"], state["place"])
            if not state.get("digest") or digest_of(records, state["broken"]) != state["digest"]:
                return False
        files = self.stream.data["files"]
        self.windows = [(first, {**state, "data": {**state["data"], "files": files}}) for first, state in self.windows]
        lines = [json.dumps({"first": first, "state": state}) + "\n" for first, state in self.windows]
        with replacing(self.index) as part:
            part.write_text("".join(lines), encoding="utf-8")
        return True

    def note(self) -> None:
        """Write the window that has just begun to the run's folder. (All ranks do: they read the same.)"""
        first, state = self.windows[-1]
        try:
            with self.index.open("a", encoding="utf-8") as index:
                index.write(("\n" if self.torn else "") + json.dumps({"first": first, "state": state}) + "\n")
            self.torn = False
        except OSError as error:
            logger.warning("%s: %s; to resume this run will take longer", self.index, error)


def packing_of(recipe: PostTraining) -> Packing:
    """Return how a recipe's documents become sequences."""
    data = recipe.data
    return Packing(
        length=recipe.sequence_length,
        chunk_size=recipe.grid,
        seed=recipe.seed,
        streaming=data.streaming,
        window=data.window,
        too_long=data.too_long,
        broken=data.broken,
        alone=not data.pack,
        learn=data.learn,
        weights=data.weights,
    )


def parsed(line: str) -> dict[str, Any] | None:
    """Parse a line of the index; return None if the run was killed while it was written."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def as_chats(batch: Batch) -> Batch:
    """Turn packs of one document each into chats, which may run token by token from the first learnt token on."""
    width = int(batch.attention_mask.sum(-1).max())
    return replace(
        batch,
        input_ids=batch.input_ids[:, :width],
        attention_mask=batch.attention_mask[:, :width],
        labels=batch.labels[:, :width],
        prompt_lengths=(batch.labels != IGNORED).int().argmax(-1),
        document_starts=None,
    )
