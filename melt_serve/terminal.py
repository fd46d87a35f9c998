"""What every command shares: subcommands, words that become values, and results, tables and errors on the screen."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from urllib.parse import urlsplit

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that would steer the terminal, were a model or a server to say them."""
Subcommands = argparse._SubParsersAction  # argparse gives the type of `add_subparsers` no public name


def add_command(
    commands: "Subcommands[argparse.ArgumentParser]", name: str, help: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """Add a subcommand whose help shows description and examples as they are written."""
    raw = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(name, help=help, description=description, epilog=examples, formatter_class=raw)


def at_least(least: int) -> Callable[[str], int]:
    """Return a parser of whole numbers that are not smaller."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


positive, whole = at_least(1), at_least(0)


def loop_list(text: str) -> list[int]:
    """Parse depths such as `1,2,4`."""
    return [positive(word) for word in text.split(",")]


def two_depths(text: str) -> tuple[int, int]:
    """Parse two depths such as `1,8`, the smaller first."""
    depths = loop_list(text)
    if len(depths) != 2 or depths[0] >= depths[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not two depths, the smaller first")
    return depths[0], depths[1]


def threshold_list(text: str) -> list[float]:
    """Parse exit thresholds such as `0.5,1`."""
    try:
        thresholds = [float(word) for word in text.split(",")]
    except ValueError:
        thresholds = []
    if not thresholds or not all(0 < threshold <= 1 for threshold in thresholds):
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers above 0 and at most 1, with commas between them")
    return thresholds


def contrast_list(text: str) -> list[float]:
    """Parse weights of a contrast such as `0,0.5,1`."""
    try:
        weights = [float(word) for word in text.split(",")]
    except ValueError:
        weights = []
    if not weights or not all(0 <= weight <= 10 for weight in weights):
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers from 0 to 10, with commas between them")
    return weights


def words_of(first: str, second: str) -> Callable[[str], list[str]]:
    """Return a parser of one or both of two words, such as `token,chunk`."""

    def word_list(text: str) -> list[str]:
        for word in text.split(","):
            if word not in (first, second):
                raise argparse.ArgumentTypeError(f"{word!r} is neither {first!r} nor {second!r}")
        return text.split(",")

    return word_list


def byte_count(text: str) -> int:
    """Parse bytes such as `4096`, `96M` or `2G`; K, M and G are powers of 1024."""
    digits, unit = (text[:-1], text[-1]) if text[-1:] in ("K", "M", "G") else (text, "")
    return positive(digits) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]


def server_url(text: str) -> str:
    """Parse the URL of a server, such as `http://localhost:8000/v1`."""
    try:
        parts = urlsplit(text)
        whole = parts.scheme in ("http", "https") and parts.port != 0 and (parts.hostname or "").encode("idna")
    except ValueError:  # of the port, the brackets, or the host's name
        whole = False
    if not whole or not text.isprintable() or " " in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a URL such as http://localhost:8000/v1")
    return text


def columns(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Align lines of cells, the first `left` columns flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def print_json(results: object) -> None:
    """Print one line of JSON: of a dataclass its fields and properties, of a list of them `{"results": [...]}`."""
    print(json.dumps(plain({"results": results} if isinstance(results, list) else results)))


def plain(value: object) -> object:
    """Turn dataclasses, also those inside, into dicts of their fields and properties."""
    if is_dataclass(value):
        names = [field.name for field in fields(value)]
        names += [name for name, member in vars(type(value)).items() if isinstance(member, property)]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def fail(error: Exception | str, program: str = "melt-serve", code: int = 1) -> int:
    """Print in one line what went wrong; return the exit code, 2 where what was asked for cannot be."""
    print(f"{program}: error:", CONTROLS.sub("", " ".join(str(error).split())), file=sys.stderr)
    return code
