"""Checksums of the files of a folder, in the file that `sha256sum` writes and reads: `sha256sum -c SHA256SUMS`."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

SUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
EDITED = ("README.md",)
"""Files that people go on writing, and that no model reads."""


class ChecksumError(ValueError):
    """A file is not the one that was written; the message names it and the remedy."""


def write_sums(folder: Path) -> None:
    """Write down the checksums of all files in a folder that is whole."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{sum_of(folder / name)}  {name}\n" for name in names if name not in (SUMS, *EDITED)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def verify_sums(folder: Path, of: Callable[[str], bool] = lambda name: True) -> int | None:
    """Compare files with their checksums; return how many were compared, None where the folder has no checksums.

    Args:
        of: which files, by name.

    Raises:
        ChecksumError: a file is missing or another one, or the checksums cannot be read.
    """
    if not (folder / SUMS).is_file():
        return None
    compared = 0
    for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        expected, name = (match[1].lower(), match[2]) if match else ("", "/")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ChecksumError(f"{folder / SUMS} is damaged at {line[:80]!r}; copy the folder again from its source")
        if not of(name):
            continue
        if not (folder / name).is_file():
            raise ChecksumError(f"{folder / name} is missing; copy the folder again from its source")
        if sum_of(folder / name) != expected:
            raise ChecksumError(
                f"{folder / name} is not as it was written: it is damaged, or was changed since. Copy it again from "
                f"its source; if you meant to change it, delete {SUMS}"
            )
        compared += 1
    return compared


def sum_of(path: Path) -> str:
    """Return a file's SHA-256, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
