"""What all commands share: words that become values, and errors in one line."""

import argparse
import sys
from collections.abc import Callable, Sequence


def at_least(least: int) -> Callable[[str], int]:
    """A parser of whole numbers that are not smaller."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


positive, whole = at_least(1), at_least(0)


def loop_list(text: str) -> list[int]:
    """Depths such as `1,2,4`."""
    return [positive(word) for word in text.split(",")]


def two_depths(text: str) -> tuple[int, int]:
    """Depths such as `1,8`."""
    depths = loop_list(text)
    if len(depths) != 2 or depths[0] >= depths[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not two depths, the smaller first")
    return depths[0], depths[1]


def threshold_list(text: str) -> list[float]:
    """Exit thresholds with commas between them."""
    try:
        thresholds = [float(word) for word in text.split(",")]
    except ValueError:
        thresholds = []
    if not thresholds or not all(0 < threshold <= 1 for threshold in thresholds):
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers above 0 and at most 1, with commas between them")
    return thresholds


def words_of(first: str, second: str) -> Callable[[str], list[str]]:
    """A parser of one or both of two words, such as `token,chunk`."""

    def word_list(text: str) -> list[str]:
        for word in text.split(","):
            if word not in (first, second):
                raise argparse.ArgumentTypeError(f"{word!r} is neither {first!r} nor {second!r}")
        return text.split(",")

    return word_list


def byte_count(text: str) -> int:
    """Bytes such as `4096`, `96M` or `2G`; K, M and G are powers of 1024."""
    digits, unit = (text[:-1], text[-1]) if text[-1:] in ("K", "M", "G") else (text, "")
    return positive(digits) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]


def fail(error: Exception | str, program: str = "melt-serve") -> int:
    """Say what went wrong in one line; the exit code of a failure."""
    print(f"{program}: error:", " ".join(str(error).split()), file=sys.stderr)
    return 1


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, the first column flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for first, *rest in lines:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        text.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(text)
