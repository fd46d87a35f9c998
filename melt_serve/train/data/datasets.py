"""Records to learn from, in JSON files and Hugging Face datasets, on disk or the hub, read at random or as a stream."""

import gzip
import json
import re
import shutil
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import ModuleType
from typing import BinaryIO, Protocol, cast

from tqdm import tqdm

from melt_serve.train.data.records import BrokenRecord, DataError, Record, checked

Cursor = list[int]
"""Where a stream goes on: the file's number, and what the file needs to find its next record. JSON."""
DAMAGED = (gzip.BadGzipFile, zlib.error, EOFError)
"""What unpacking a damaged file raises."""
SUFFIXES = (".jsonl", ".json", ".gz", ".parquet")
ON_HUB = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?(:(?P<split>[\w.-]+(\[[\d:%]+\])?))?"
)
"""`OWNER/NAME`, and what may follow: `/CONFIG`, `@REVISION`, `:SPLIT` (`train` by default), `:train[:5%]`."""


class SizedRows(Protocol):
    """Rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> object: ...


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

    def __init__(self, paths: Sequence[Path | str] = (), sources: Sequence[Source] = ()):
        if not paths and not sources:
            raise DataError("no data files were given")
        self.sources = [*sources, *(open_source(path) for path in paths)]

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


def open_source(named: Path | str) -> Source:
    """Open the source that a path names, by its kind, or a dataset on the hub where there is no such path.

    Raises:
        DataError: of an unknown kind.
        OSError: it is not there.
    """
    path = Path(named)
    if path.is_dir() or (path.suffix == ".parquet" and path.exists()):
        return Rows(path, saved_table(path))
    if not path.exists() and path.suffix not in SUFFIXES and (on_hub := ON_HUB.fullmatch(str(named))):
        return Rows(path, hub_table(**on_hub.groupdict()))
    path.open("rb").close()  # says that it is not there, or not to be read
    match path.suffixes:
        case [*_, ".jsonl"] | [*_, ".jsonl", ".gz"]:
            return JsonLines(path)
        case [*_, ".json"] | [*_, ".json", ".gz"]:
            return Rows(path, array_of(path)) if begins_an_array(path) else JsonLines(path)
    raise DataError(
        f"{path} is none of: a .jsonl or .parquet file, a .json file, one of JSON in .gz, a folder that a Hugging Face "
        "dataset was saved to, OWNER/NAME:SPLIT on the hub"
    )


def opened(path: Path) -> BinaryIO:
    """Open a file of JSON, compressed or not."""
    return cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def begins_an_array(path: Path) -> bool:
    """Return whether a file is one JSON array, and not an object a line.

    Raises:
        DataError: it cannot be unpacked.
    """
    try:
        with opened(path) as file:
            return file.read(4096).lstrip().startswith(b"[")
    except DAMAGED as error:
        raise DataError(f"{path} cannot be unpacked: {error}") from error


def array_of(path: Path) -> list[object]:
    """Read a file that is one JSON array; all of it is in memory then.

    Raises:
        DataError: it is not JSON.
    """
    try:
        with opened(path) as file:
            return json.load(file)
    except (ValueError, *DAMAGED) as error:
        raise DataError(f"{path} is not JSON: {error}") from None


def saved_table(path: Path) -> SizedRows:
    """Open a folder that a dataset was saved to, or a Parquet file; memory-mapped, so never all read.

    Raises:
        DataError: it is neither, or several splits.
    """
    datasets = hugging_face(path)
    try:
        table = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # of many kinds, pyarrow's among them
        raise DataError(f"{path} cannot be read as a Hugging Face dataset: {error}") from None
    if isinstance(table, dict):
        raise DataError(f"{path} holds the splits {', '.join(table)}: name one, such as {path / 'train'}")
    return table


def hub_table(name: str, config: str | None, revision: str | None, split: str | None) -> SizedRows:
    """Fetch a split of a dataset on the hub into the hub's cache, if it is not there; code of a dataset is not run.

    Raises:
        DataError: it cannot be fetched; the message says why.
    """
    datasets = hugging_face(name)
    try:
        return datasets.load_dataset(name, config, revision=revision, split=split or "train")
    except Exception as error:  # of the network's, the disk's and the formats' many
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{name} is no file here, and as a dataset on the hub it cannot be had: {reason}") from error


def hugging_face(wanted: Path | str) -> ModuleType:
    """Import Hugging Face's `datasets`, which reads what is not plain JSON.

    Raises:
        DataError: it is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise DataError(f"{wanted} needs the `datasets` package: pip install datasets") from None
    return datasets


class JsonLines:
    """A file with a JSON object a line, blank lines left out. At most where its lines begin is kept in memory.

    What is compressed is unpacked into a file that is there as long as this object.

    Raises:
        DataError: it cannot be unpacked.
    """

    def __init__(self, path: Path):
        self.path = self.content = path
        if path.suffix == ".gz":
            self.unpacked = NamedTemporaryFile(suffix=path.stem)  # noqa: SIM115 (it lives as long as we do)
            try:
                with opened(path) as packed:
                    shutil.copyfileobj(packed, self.unpacked)
            except DAMAGED as error:
                raise DataError(f"{path} cannot be unpacked: {error}") from error
            self.unpacked.flush()
            self.content = Path(self.unpacked.name)
        self.file = self.content.open("rb")

    @cached_property
    def lines(self) -> tuple[array, array]:
        """Where each record's line begins, and its number, counted from 1; found in one pass over the file."""
        begins, numbers, offset = array("q"), array("q"), 0
        size = self.content.stat().st_size
        with (
            self.content.open("rb") as file,
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
        with self.content.open("rb") as file:
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


class Rows:
    """Records that are indexed by number: a Hugging Face dataset's, or those of a JSON array."""

    def __init__(self, path: Path, rows: SizedRows):
        self.path, self.rows = path, rows

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Record:
        """Read one record, as `Source` says."""
        return checked(self.rows[index], f"{self.path}: row {index}")

    def stream(self, cursor: Cursor) -> Iterator[tuple[Record | BrokenRecord, Cursor]]:
        """Yield records as `Source` says; a cursor is the number of the next record."""
        (first,) = cursor or [0]
        for index in range(first, len(self.rows)):
            try:
                yield self.read(index), [index + 1]
            except BrokenRecord as broken:
                yield broken, [index + 1]

    def identity(self) -> list[str | int]:
        """Return what tells it from other data, as `Source` says."""
        return [self.path.name, len(self.rows)]
