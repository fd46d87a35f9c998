"""Records to learn from, in JSONL files and Hugging Face datasets on disk, read at random or as a stream.

A record holds `messages`, a chat with optional `tools`, or `text`; `messages` wins where it holds both.
"""

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from tqdm import tqdm

Cursor = list[int]
"""Where a stream goes on: the file's number, and what the file needs to find its next record. JSON."""


class DataError(ValueError):
    """The data cannot be used as asked; the message says why."""


class BrokenRecord(DataError):
    """One record cannot be learnt from; the message says which, by file and line, and why."""


class Message(BaseModel):
    """A message of a chat; what else it holds is the chat template's business."""

    model_config = ConfigDict(extra="allow")
    role: str


class Record(BaseModel):
    """A chat or a text.

    Attributes:
        place: file and line, or number in the table.
    """

    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    place: str = ""

    @model_validator(mode="after")
    def check(self) -> "Record":
        """See that the record holds something to learn from."""
        if not self.messages and not self.text:
            raise ValueError("it has neither messages nor text")
        return self

    @property
    def chat(self) -> list[dict[str, Any]] | None:
        """The messages as chat templates take them: fields that a table had to fill with None are left out."""
        return [message.model_dump(exclude_none=True) for message in self.messages] if self.messages else None


class Source(Protocol):
    """A file or a folder of records."""

    path: Path

    def __len__(self) -> int:
        """Count the records, broken ones included."""

    def read(self, index: int) -> Record:
        """Read one record.

        Raises:
            BrokenRecord: it is none.
        """

    def stream(self, cursor: Cursor) -> Iterator[tuple[Record | BrokenRecord, Cursor]]:
        """Yield the file's records in order from `cursor` on ([] is the beginning), each with the cursor after it."""

    def identity(self) -> list[str | int]:
        """Return what tells it from other data, without reading it."""


class Corpus:
    """The records of several sources, one source after another.

    Raises:
        DataError: a file of an unknown kind.
        OSError: one that cannot be read.
    """

    def __init__(self, paths: Sequence[Path | str]):
        if not paths:
            raise DataError("no data files were given")
        self.sources = [open_source(Path(path)) for path in paths]

    @cached_property
    def ends(self) -> list[int]:
        """The number of records up to the end of each source."""
        return list(accumulate(map(len, self.sources)))

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, index: int) -> Record | BrokenRecord:
        """Read one record of all, or return what is wrong with it."""
        number = bisect_right(self.ends, index)
        try:
            return self.sources[number].read(index - (self.ends[number - 1] if number else 0))
        except BrokenRecord as broken:
            return broken

    def stream(self, cursor: Cursor) -> Iterator[tuple[Record | BrokenRecord, Cursor]]:
        """Yield the records of all sources, one source after another; see `Source.stream`."""
        first, *inside = cursor or [0]
        for number, source in enumerate(self.sources[first:], first):
            for record, after in source.stream(inside):
                yield record, [number, *after]
            inside = []

    def identity(self) -> list[list[str | int]]:
        """Return what tells the corpus from other data."""
        return [source.identity() for source in self.sources]


def open_source(path: Path) -> Source:
    """Open the source that a path names, by its kind.

    Raises:
        DataError: of an unknown kind.
        OSError: it is not there.
    """
    if path.is_dir():
        return Table(path)
    path.open("rb").close()  # says that it is not there, or not to be read
    match path.suffix:
        case ".jsonl":
            return JsonLines(path)
        case ".parquet":
            return Table(path)
    raise DataError(f"{path} is none of: a .jsonl or .parquet file, a folder that a Hugging Face dataset was saved to")


class JsonLines:
    """A file with a JSON object a line, blank lines left out. At most where its lines begin is kept in memory."""

    def __init__(self, path: Path):
        self.path = path
        self.file = path.open("rb")

    @cached_property
    def lines(self) -> tuple[array, array]:
        """Where each record's line begins, and its number, counted from 1; found in one pass over the file."""
        begins, numbers, offset = array("q"), array("q"), 0
        size = self.path.stat().st_size
        with (
            self.path.open("rb") as file,
            tqdm(total=size, desc=f"finding lines of {self.path.name}", unit="B", unit_scale=True, delay=2) as bar,
        ):
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    begins.append(offset)
                    numbers.append(number)
                offset += len(line)
                if number % 10_000 == 0:
                    bar.update(offset - bar.n)
        return begins, numbers

    def __len__(self) -> int:
        return len(self.lines[0])

    def read(self, index: int) -> Record:
        """Read one record, as `Source` says."""
        begins, numbers = self.lines
        self.file.seek(begins[index])
        return self.parse(self.file.readline(), numbers[index])

    def stream(self, cursor: Cursor) -> Iterator[tuple[Record | BrokenRecord, Cursor]]:
        """Yield records as `Source` says; a cursor is the byte it begins at and the number of lines before it."""
        offset, number = cursor or (0, 0)
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                offset, number = offset + len(line), number + 1
                if line.isspace():
                    continue
                try:
                    yield self.parse(line, number), [offset, number]
                except BrokenRecord as broken:
                    yield broken, [offset, number]

    def parse(self, line: bytes, number: int) -> Record:
        """Parse one line.

        Raises:
            BrokenRecord: it is not JSON, or holds no record.
        """
        place = f"{self.path}:{number}"
        try:
            fields = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            raise BrokenRecord(f"{place}: not JSON: {error}") from None
        return checked(fields, place)

    def identity(self) -> list[str | int]:
        """Return what tells it from other data, as `Source` says."""
        return [self.path.name, self.path.stat().st_size]


class Table:
    """A Hugging Face dataset on disk: a folder it was saved to, or a Parquet file. Memory-mapped, so never all read."""

    def __init__(self, path: Path):
        self.path = path
        try:
            import datasets
        except ModuleNotFoundError:
            raise DataError(f"{path} needs the `datasets` package: pip install datasets") from None
        try:
            if path.is_dir():
                self.table = datasets.load_from_disk(str(path))
            else:
                self.table = datasets.Dataset.from_parquet(str(path))
        except Exception as error:  # of many kinds, pyarrow's among them
            raise DataError(f"{path} cannot be read as a Hugging Face dataset: {error}") from None
        if isinstance(self.table, dict):
            raise DataError(f"{path} holds the splits {', '.join(self.table)}: name one, such as {path / 'train'}")

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> Record:
        """Read one record, as `Source` says."""
        return checked(self.table[index], f"{self.path}: row {index}")

    def stream(self, cursor: Cursor) -> Iterator[tuple[Record | BrokenRecord, Cursor]]:
        """Yield records as `Source` says; a cursor is the number of the next record."""
        (first,) = cursor or [0]
        for index in range(first, len(self.table)):
            try:
                yield self.read(index), [index + 1]
            except BrokenRecord as broken:
                yield broken, [index + 1]

    def identity(self) -> list[str | int]:
        """Return what tells it from other data, as `Source` says."""
        return [self.path.name, len(self.table)]


def checked(fields: object, place: str) -> Record:
    """Validate one record.

    Raises:
        BrokenRecord: says in one line what it lacks.
    """
    if not isinstance(fields, dict):
        raise BrokenRecord(f"{place}: not a JSON object")
    try:
        return Record.model_validate({**fields, "place": place})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        says = first["msg"].removeprefix("Value error, ")
        raise BrokenRecord(f"{place}: {where + ': ' if where else ''}{says}") from None
