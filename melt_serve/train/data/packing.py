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
from concurrent.futures import CancelledError, Future, wait
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import partial
from operator import add
from threading import Thread
from typing import Any, Literal, TypeVar

import torch
from transformers import PreTrainedTokenizerFast

from melt_serve.config import on_grid
from melt_serve.train.data.batch import IGNORED, Batch
from melt_serve.train.data.datasets import Corpus, Cursor
from melt_serve.train.data.documents import Document, Learn, TooLong, documents_of, fitted
from melt_serve.train.data.order import Permuted, Streamed, digest_of
from melt_serve.train.data.records import BrokenRecord, DataError, Record

logger = logging.getLogger(__name__)
Broken = Literal["fail", "skip"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Packing:
    """How documents become batches.

    Attributes:
        length: S, tokens of a pack.
        chunk_size: C, the model's: every document begins on a multiple of it in its pack.
        batch: packs a step, of all ranks together.
        seed: of the order.
        streaming: read the files in order, shuffled within windows, and never look ahead of them.
        window: records that are read and packed at once; two such windows are in memory.
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


@dataclass
class Window:
    """Some records that were read together, as packs.

    Attributes:
        after: the cursor behind them.
        counts: of this window alone.
        broken: which of the records were left out as broken, by their place; `said` are those that are so now.
        digest: a checksum of the others.
    """

    after: Cursor
    counts: Counts
    packs: list[Pack] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)
    said: list[BrokenRecord] = field(default_factory=list)
    digest: str = ""


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
        ahead: bool = False,
    ):
        """Stand before the first batch.

        Args:
            report: told of every record that is skipped, in the first epoch.
            ahead: read the next window in a thread while the present one is used.

        Raises:
            DataError: a batch cannot be shared evenly among the ranks.
        """
        if packing.batch % world_size:
            raise DataError(f"a batch of {packing.batch} packs cannot be shared evenly by {world_size} ranks")
        self.tokenizer, self.packing, self.report = tokenizer, packing, report
        self.rank, self.world_size = rank, world_size
        self.order: Streamed | Permuted = (
            Streamed(corpus, packing.window, packing.seed)
            if packing.streaming
            else Permuted(corpus, packing.window, packing.seed, packing.weights)
        )
        self.data = {"files": corpus.identity(), **asdict(replace(packing, batch=1, broken="skip"))}
        self.broken: list[int] = []
        self.digest = ""
        self.epoch = 0
        self.cursor: Cursor = []
        self.next_cursor: Cursor = []
        self.packs: list[Pack] = []
        self.used = 0
        self.counts = self.counts_before = Counts()
        self.ahead = ahead
        self.closed = False
        self.coming: Future[tuple[int, Window | None]] | None = None

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
        window = self.window_here(left_out)
        if window is None:
            self.epoch, self.next_cursor = self.epoch + 1, []
            return False
        if self.epoch == 0:  # once is enough
            for broken in window.said:
                self.report(broken)
        self.counts_before = self.counts
        self.counts = Counts(*map(add, astuple(self.counts), astuple(window.counts)))
        self.cursor, self.next_cursor = self.next_cursor, window.after
        self.packs, self.used, self.broken, self.digest = window.packs, 0, window.broken, window.digest
        if self.ahead:
            self.coming = in_thread(partial(self.read_coming, self.epoch, self.next_cursor))
        return True

    def window_here(self, left_out: Collection[int]) -> Window | None:
        """Return the window at the cursor, which may have been read ahead; None at the end of the epoch."""
        coming, self.coming = self.coming, None
        if coming is None:
            return self.read_window(self.epoch, self.next_cursor, left_out)
        epoch, window = coming.result()
        if epoch == self.epoch:
            return window
        self.coming = coming  # it is the next epoch's, which is asked for next
        return None

    def read_coming(self, epoch: int, cursor: Cursor) -> tuple[int, Window | None]:
        """Read the window at this place, or where there is none the first of the next epoch; return its epoch, too."""
        window = self.read_window(epoch, cursor)
        return (epoch, window) if window is not None else (epoch + 1, self.read_window(epoch + 1, []))

    def read_window(self, epoch: int, cursor: Cursor, left_out: Collection[int] = ()) -> Window | None:
        """Read and pack the window at this place; None at the end of the epoch. Nothing else of the stream changes.

        Raises:
            BrokenRecord: where records must not be broken.
        """
        records, after = self.order.window(epoch, cursor)
        if not records:
            return None
        window = Window(after, Counts(records=len(records)))
        documents: list[Document] = []
        for number, record in enumerate(records):
            if self.closed:
                raise CancelledError
            if number in left_out:
                window.broken.append(number)
                continue
            try:
                documents += self.documents_of(record, window.counts)
            except BrokenRecord as broken:
                if self.packing.broken == "fail":
                    raise
                window.broken.append(number)
                window.said.append(broken)
        window.counts.broken = len(window.broken)
        if self.packing.alone:
            chosen = [[number] for number in range(len(documents))]
        else:
            chosen = best_fit([len(document) for document in documents], self.packing.length, self.packing.chunk_size)
        random.Random(f"packs {self.packing.seed} {epoch} {cursor}").shuffle(chosen)
        window.packs = [[documents[number] for number in pack] for pack in chosen]
        window.digest = digest_of(records, window.broken)
        for pack in window.packs:
            count(pack, self.packing, window.counts)
        return window

    def close(self) -> None:
        """End the thread that reads ahead: at the end of a process, nothing may be in a tokenizer."""
        self.closed = True
        if self.coming is not None:
            wait([self.coming])

    def documents_of(self, record: Record | BrokenRecord, counts: Counts) -> list[Document]:
        """Return a record's documents, each short enough for a pack; count those that were too long.

        Raises:
            BrokenRecord: it cannot be learnt from.
        """
        if isinstance(record, BrokenRecord):
            raise record
        whole, length = documents_of(record, self.tokenizer, self.packing.learn), self.packing.length
        counts.too_long += sum(len(document) > length for document in whole)
        return [part for document in whole for part in fitted(document, length, self.packing.too_long)]

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
        if self.coming is not None:
            wait([self.coming])  # files are read by one thread at a time
            self.coming = None
        self.epoch, self.next_cursor = state["epoch"], state["place"]
        self.counts = Counts(**state["counts"])
        self.next_window(state.get("broken", ()))
        self.used = state["used"]


def count(pack: Pack, packing: Packing, counts: Counts) -> None:
    """Add a pack to the counts."""
    size = packing.chunk_size
    counts.packs += 1
    counts.columns += packing.length
    counts.documents += len(pack)
    counts.tokens += sum(map(len, pack))
    counts.supervised += sum(int(document.supervised[1:].sum()) for document in pack)
    counts.lost_to_grid += sum(-len(document) % size for document in pack[:-1])
    counts.beyond_first_chunk += sum(int(document.supervised[size:].sum()) for document in pack)


def in_thread(work: Callable[[], Result]) -> Future[Result]:
    """Do the work in a thread; its error is raised where the result is asked for."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run).start()
    return future


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
