"""The order in which an epoch takes its records, a window at a time: at random, or along the files."""

import random
from collections.abc import Collection, Sequence
from hashlib import blake2b
from itertools import islice

import torch
from torch import Tensor

from melt_serve.train.data.datasets import Corpus, Cursor
from melt_serve.train.data.records import BrokenRecord, Record


class Permuted:
    """The order that takes all records of an epoch at random. A cursor is how many of them are done."""

    def __init__(self, corpus: Corpus, size: int, seed: int, weights: Sequence[float] | None = None):
        """Take so many records a window; see `packing.Packing` for the weights."""
        self.corpus, self.seed, self.size, self.weights = corpus, seed, size, weights
        self.epoch: int | None = None

    def window(self, epoch: int, cursor: Cursor) -> tuple[list[Record | BrokenRecord], Cursor]:
        """Read the records from this cursor on, none at the end; return them and the cursor after them."""
        if epoch != self.epoch:
            seed = random.Random(f"order {self.seed} {epoch}").getrandbits(63)
            self.order = self.drawn(torch.Generator().manual_seed(seed))
            self.epoch = epoch
        (done,) = cursor or [0]
        chosen = self.order[done : done + self.size].tolist()
        return [self.corpus.read(index) for index in chosen], [done + len(chosen)]

    def drawn(self, generator: torch.Generator) -> Tensor:
        """Draw the order of an epoch: the numbers of the records in it."""
        if self.weights is None:
            return torch.randperm(len(self.corpus), generator=generator)
        chosen, first = [], 0
        for weight, end in zip(self.weights, self.corpus.ends, strict=True):
            once = torch.arange(first, end)
            part = round((weight % 1) * len(once))
            chosen += [*[once] * int(weight), once[torch.randperm(len(once), generator=generator)[:part]]]
            first = end
        numbers = torch.cat(chosen)
        return numbers[torch.randperm(len(numbers), generator=generator)]


class Streamed:
    """The order that follows the files, shuffled within each window. A cursor is one in the files."""

    def __init__(self, corpus: Corpus, size: int, seed: int):
        """Take so many records a window."""
        self.corpus, self.size, self.seed = corpus, size, seed

    def window(self, epoch: int, cursor: Cursor) -> tuple[list[Record | BrokenRecord], Cursor]:
        """Read the records as `Permuted.window` does."""
        read = list(islice(self.corpus.stream(cursor), self.size))
        records = [record for record, _ in read]
        random.Random(f"window {self.seed} {epoch} {cursor}").shuffle(records)
        return records, read[-1][1] if read else cursor


def digest_of(records: Sequence[Record | BrokenRecord], broken: Collection[int]) -> str:
    """Return a checksum of a window's records, but for those with these numbers; an empty text if others are broken."""
    digest = blake2b(digest_size=16)
    for number, record in enumerate(records):
        if number not in broken:
            if isinstance(record, BrokenRecord):
                return ""
            digest.update(record.fingerprint)
    return digest.hexdigest()
