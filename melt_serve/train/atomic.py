"""Files and folders that are written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; what is there at the end takes the place of `path`.

    A file replaces a file in one step. A folder replaces a folder in two, so a crash may leave none, but never half of
    one. After an exception `path` is as it was and nothing else is left.
    """
    part = path.with_name(f".{path.name}.partial")
    remove(part)  # what a killed process left
    try:
        yield part
        if part.is_dir():
            remove(path)
        os.replace(part, path)
    finally:
        remove(part)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
