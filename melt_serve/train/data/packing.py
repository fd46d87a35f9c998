"""Documents in packs: long sequences with little padding, in a seeded order that can be gone on with anywhere.

    corpus = Corpus(["chats.jsonl"])
    batches = Batches(corpus, tokenizer, Packing(length=10_000, chunk_size=512, batch=32))
    for batch in batches: ...                    # endless; `batch` is what `Student.run_batch` takes
    json.dumps(batches.state_dict())             # small; a `Batches` that loads it goes on with the same bits

Records come in windows. Without `streaming` the order of an epoch is a permutation of all records, and a window is
the next so many of it; with `streaming` a window is the next so many records of the files, shuffled, so that nothing
needs to be known of the rest. A window's documents are packed together, the packs shuffled, and batches take them as
they come, across windows and epochs. All ranks do the same and each takes its share of a batch, so that neither the
batches nor a state depend on how many ranks there are.
"""

import json
import logging
import random
from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from melt_serve.config import on_grid
from melt_serve.train.data.batch import IGNORED, Batch
from melt_serve.train.data.datasets import Corpus, Cursor
from melt_serve.train.data.documents import Document, Learn, TooLong, documents_of, fitted
from melt_serve.train.data.records import BrokenRecord, DataError, Record

logger = logging.getLogger(__name__)
Broken = Literal["fail", "skip"]


@dataclass(frozen=True)
class Packing:
    """How documents become batches.

    Attributes:
        length: S, tokens of a pack.
        chunk_size: C, the model's: every document begins on a multiple of it in its pack.
        batch: packs a step, of all ranks together.
        seed: of the order.
        streaming: read the files in order, shuffled within windows, and never look ahead of them.
        window: records that are read, packed and held in memory at once.
        too_long: what to do with a document of more than S tokens: `cut` keeps its beginning, `split` makes several of
            it that do not see each other, `drop` leaves it out.
        broken: `fail` at the first record that cannot be learnt from, or `skip` and count them.
        alone: every document has a pack to itself.
        learn: see `documents_of`.
        weights: how often an epoch takes the records of each source: 2 twice, 0.5 a random half, drawn anew for each
            epoch. By default once. Not with `streaming`.
    """

    length: int
    chunk_size: int
    batch: int = 1
    seed: int = 0
    streaming: bool = False
    window: int = 1024
    too_long: TooLong = "cut"
    broken: Broken = "fail"
    alone: bool = False
    learn: Learn = "replies"
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("length", "chunk_size", "batch", "window"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.weights is not None and self.streaming:
            raise DataError("weights need a random order of all records: leave them out, or streaming")


@dataclass
class Counts:
    """What has been read so far.

    Attributes:
        records, broken: read, and of these not learnt from.
        documents, tokens, supervised: packed; supervised are the tokens whose prediction is learnt.
        too_long: documents of more than S tokens, before they were cut, split or dropped.
        packs, columns: packs, and their tokens with padding.
        lost_to_grid: padding between documents, because the next begins on a multiple of C; the rest stands at the end.
        beyond_first_chunk: supervised tokens that see final rows, those of an earlier chunk of their document.
    """

    records: int = 0
    broken: int = 0
    documents: int = 0
    tokens: int = 0
    supervised: int = 0
    too_long: int = 0
    packs: int = 0
    columns: int = 0
    lost_to_grid: int = 0
    beyond_first_chunk: int = 0


Pack = list[Document]


def warn(broken: BrokenRecord) -> None:
    """Log a skipped record: what is done about it by default."""
    logger.warning("left out: %s", broken)


class Batches:
    """An endless stream of batches, B packs of S columns each.

    Attributes:
        counts: of the windows read so far, the present one included.
        packs: the present window's.
        broken: which of the present window's records were left out as broken, by their place in it.
        digest: a checksum of its others.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerFast,
        packing: Packing,
        rank: int = 0,
        world_size: int = 1,
        report: Callable[[BrokenRecord], None] = warn,
    ):
        """Stand before the first batch.

        Args:
            report: told of every record that is skipped, in the first epoch.

        Raises:
            DataError: a batch cannot be shared evenly among the ranks.
        """
        if packing.batch % world_size:
            raise DataError(f"a batch of {packing.batch} packs cannot be shared evenly by {world_size} ranks")
        self.tokenizer, self.packing, self.report = tokenizer, packing, report
        self.rank, self.world_size = rank, world_size
        self.order: Streamed | Permuted = (Streamed if packing.streaming else Permuted)(corpus, packing)
        self.data = {"files": corpus.identity(), **asdict(replace(packing, batch=1, broken="skip"))}
        self.broken: list[int] = []
        self.digest = ""
        self.epoch = 0
        self.cursor: Cursor = []
        self.next_cursor: Cursor = []
        self.packs: list[Pack] = []
        self.used = 0
        self.counts = self.counts_before = Counts()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Return the next batch, or this rank's share of it.

        Raises:
            BrokenRecord: where records must not be broken.
            DataError: in a whole epoch there is nothing to learn.
        """
        packs = [self.next_pack() for _ in range(self.packing.batch)]
        return collate(packs[self.rank :: self.world_size], self.packing)

    def next_pack(self) -> Pack:
        """Return the next pack, whatever rank it is for."""
        ends = 0
        while self.used == len(self.packs):
            ends += not self.next_window()
            if ends > 1:
                raise DataError(f"nothing to learn in {', '.join(str(name) for name, _ in self.data['files'])}")
        self.used += 1
        return self.packs[self.used - 1]

    def next_window(self, left_out: Collection[int] = ()) -> bool:
        """Read and pack the next window; return false where this epoch has none, and the next one begins.

        Args:
            left_out: records that were broken when the window was first read, and may be mended now.
        """
        records, after = self.order.window(self.epoch, self.next_cursor)
        if not records:
            self.epoch, self.next_cursor = self.epoch + 1, []
            return False
        before, broken = replace(self.counts), []
        documents: list[Document] = []
        for number, record in enumerate(records):
            found = None if number in left_out else self.documents_of(record)
            if found is None:
                broken.append(number)
            documents += found or []
        if self.packing.alone:
            chosen = [[number] for number in range(len(documents))]
        else:
            chosen = best_fit([len(document) for document in documents], self.packing.length, self.packing.chunk_size)
        random.Random(f"packs {self.packing.seed} {self.epoch} {self.next_cursor}").shuffle(chosen)
        # Only now, so that a window that could not be read leaves a state that is good.
        self.cursor, self.next_cursor, self.counts_before = self.next_cursor, after, before
        self.packs, self.used = [[documents[number] for number in pack] for pack in chosen], 0
        self.broken, self.digest = broken, digest_of(records, broken)
        for pack in self.packs:
            self.count(pack)
        return True

    def documents_of(self, record: Record | BrokenRecord) -> list[Document] | None:
        """Return a record's documents, each short enough for a pack; None where it is broken."""
        self.counts.records += 1
        try:
            if isinstance(record, BrokenRecord):
                raise record
            whole = documents_of(record, self.tokenizer, self.packing.learn)
        except BrokenRecord as broken:
            if self.packing.broken == "fail":
                raise
            self.counts.broken += 1
            if self.epoch == 0:  # once is enough
                self.report(broken)
            return None
        length = self.packing.length
        self.counts.too_long += sum(len(document) > length for document in whole)
        return [part for document in whole for part in fitted(document, length, self.packing.too_long)]

    def count(self, pack: Pack) -> None:
        """Add a pack to the counts."""
        counts, size = self.counts, self.packing.chunk_size
        counts.packs += 1
        counts.columns += self.packing.length
        counts.documents += len(pack)
        counts.tokens += sum(map(len, pack))
        counts.supervised += sum(int(document.supervised[1:].sum()) for document in pack)
        counts.lost_to_grid += sum(-len(document) % size for document in pack[:-1])
        counts.beyond_first_chunk += sum(int(document.supervised[size:].sum()) for document in pack)

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands, as JSON; the same for all ranks."""
        return {
            "data": self.data,
            "epoch": self.epoch,
            "place": self.cursor,
            "used": self.used,
            "counts": asdict(self.counts_before),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stream stood, with the same bits.

        Raises:
            DataError: it is the state of other data, or of data packed in another way.
        """
        own = json.loads(json.dumps(self.data))
        changed = sorted(name for name, value in state["data"].items() if own.get(name) != value)
        if changed:
            raise DataError(f"the data is not the same as when the state was saved: {', '.join(changed)} differ")
        self.epoch, self.next_cursor = state["epoch"], state["place"]
        self.counts = Counts(**state["counts"])
        self.next_window(state.get("broken", ()))
        self.used = state["used"]


def digest_of(records: Sequence[Record | BrokenRecord], broken: Collection[int]) -> str:
    """Return a checksum of a window's records, but for those with these numbers; an empty text if others are broken."""
    digest = blake2b(digest_size=16)
    for number, record in enumerate(records):
        if number not in broken:
            if isinstance(record, BrokenRecord):
                return ""
            digest.update(record.fingerprint)
    return digest.hexdigest()


class Permuted:
    """The order that takes all records of an epoch at random. A cursor is how many of them are done."""

    def __init__(self, corpus: Corpus, packing: Packing):
        self.corpus, self.packing = corpus, packing
        self.epoch: int | None = None

    def window(self, epoch: int, cursor: Cursor) -> tuple[list[Record | BrokenRecord], Cursor]:
        """Read the records from this cursor on, none at the end; return them and the cursor after them."""
        if epoch != self.epoch:
            seed = random.Random(f"order {self.packing.seed} {epoch}").getrandbits(63)
            self.order = self.drawn(torch.Generator().manual_seed(seed))
            self.epoch = epoch
        (done,) = cursor or [0]
        chosen = self.order[done : done + self.packing.window].tolist()
        return [self.corpus.read(index) for index in chosen], [done + len(chosen)]

    def drawn(self, generator: torch.Generator) -> Tensor:
        """Draw the order of an epoch: the numbers of the records in it."""
        weights = self.packing.weights
        if weights is None:
            return torch.randperm(len(self.corpus), generator=generator)
        chosen, first = [], 0
        for weight, end in zip(weights, self.corpus.ends, strict=True):
            once = torch.arange(first, end)
            part = round((weight % 1) * len(once))
            chosen += [*[once] * int(weight), once[torch.randperm(len(once), generator=generator)[:part]]]
            first = end
        numbers = torch.cat(chosen)
        return numbers[torch.randperm(len(numbers), generator=generator)]


class Streamed:
    """The order that follows the files, shuffled within each window. A cursor is one in the files."""

    def __init__(self, corpus: Corpus, packing: Packing):
        self.corpus, self.packing = corpus, packing

    def window(self, epoch: int, cursor: Cursor) -> tuple[list[Record | BrokenRecord], Cursor]:
        """Read the records as `Permuted.window` does."""
        read = list(islice(self.corpus.stream(cursor), self.packing.window))
        records = [record for record, _ in read]
        random.Random(f"window {self.packing.seed} {epoch} {cursor}").shuffle(records)
        return records, read[-1][1] if read else cursor


def best_fit(lengths: Sequence[int], width: int, grid: int) -> list[list[int]]:
    """Choose which documents share a pack: the longest first, each where least room is left (best-fit decreasing).

    Args:
        lengths: of the documents, at most `width` each.
        width: of a pack.
        grid: every document begins on a multiple of it.

    Returns:
        For each pack the numbers of its documents, in their order.
    """
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # what is left in a pack, and its number, the least first
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        found = bisect_left(rooms, (lengths[number], 0))
        if found < len(rooms):
            room, pack = rooms.pop(found)
        else:
            room, pack = width, len(packs)
            packs.append([])
        packs[pack].append(number)
        room -= on_grid(lengths[number], grid)
        if room > 0:
            insort(rooms, (room, pack))
    return packs


def collate(packs: Sequence[Pack], packing: Packing) -> Batch:
    """Lay packs out as a batch, [packs, S]: S is the same for every batch, so that all ranks run the same chunks."""
    ids, mask, labels, starts = (torch.zeros(len(packs), packing.length, dtype=torch.long) for _ in range(4))
    labels.fill_(IGNORED)
    for i, pack in enumerate(packs):
        column = 0
        for document in pack:
            here = slice(column, column + len(document))
            ids[i, here], mask[i, here], starts[i, here] = document.tokens.long(), 1, column
            labels[i, here] = document.tokens.long().where(document.supervised, IGNORED)
            labels[i, column] = IGNORED
            column += on_grid(len(document), packing.chunk_size)
    return Batch(ids, mask, labels, document_starts=starts)
