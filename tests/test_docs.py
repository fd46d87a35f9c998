"""What documents say is so: the README is short, commands are understood, errors are printed as they stand there."""

import ast
import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

from melt_serve import cli
from melt_serve.serve import SKIP_CHECKS, take_limits, with_vllms_name
from melt_serve.train.__main__ import parsed
from melt_serve.train.recipe_files import load_recipe
from melt_serve.verify.command import parser as verify_parser
from tests.test_links import DOCUMENTS

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"^(?:```\w*\n(?P<fenced>.*?)^```|(?P<indented>(?:^(?: {4,}|\t).*\n)(?:(?:^(?: {4,}|\t).*)?\n)*))", re.M | re.S
)
OF_CODE = re.compile(r"(?<!`)`((?:\.venv/bin/)?(?:melt-serve|vllm serve|python -m melt_serve\.train)(?: [^`]*)?)`(?!`)")
COMMAND = re.compile(r"^(?:sudo )?(?:\.venv/bin/)?(melt-serve|vllm serve|python -m melt_serve\.train|make)\b(.*)$")
OURS = "teacher=./teacher", "data.files=a.jsonl", "output=./out"
"""What a recipe of one's own states."""


def test_the_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def code_lines(text: str) -> Iterator[str]:
    """Yield the lines of code in a document, continued ones as one, and commands inside its sentences."""
    for block in BLOCK.finditer(text):
        yield from (block["fenced"] or block["indented"]).replace("\\\n", " ").splitlines()
    yield from (" ".join(inline.split()) for inline in OF_CODE.findall(BLOCK.sub("", text)))


def commands_of(text: str) -> list[tuple[str, list[str]]]:
    """Return a document's commands of ours, each with its words; `...`, which stands for any, left out."""
    found = [match for line in code_lines(text) if (match := COMMAND.match(line.strip()))]
    split = [(match[1], re.split(r" &&? ?| \| ", match[2] + " ")[0]) for match in found]
    return [(program, [word for word in shlex.split(rest, comments=True) if word != "..."]) for program, rest in split]


@cache
def vllms_parser():
    """Make the parser of vLLM's server."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser("vllm serve"))


def understand_serve(words: Sequence[str]) -> None:
    """Parse the words after `serve` as our command and then vLLM's server do, without looking for the checkpoint."""
    _, others = take_limits(words)
    if others and not others[0].startswith("-"):
        others = ["--model", *others]
    others = [with_vllms_name(word) for word in others if word not in (SKIP_CHECKS, "--help=all")]
    if any(word.startswith("-") for word in others):
        vllms_parser().parse_args(others)


def understand(program: str, words: list[str]) -> None:
    """Parse a command's words with the parsers that it has, and start nothing.

    Raises:
        SystemExit: a parser's, which does not know a word.
        ValueError: a field of a recipe, or a limit, that there is not.
    """
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        if unknown := [word for word in words if "=" not in word and word not in targets]:
            raise ValueError(f"make {unknown[0]}: no such target")
    elif program == "vllm serve":
        understand_serve(words)
    elif program == "python -m melt_serve.train" or words[:1] == ["train"]:
        words = words[1:] if program == "melt-serve" else words
        arguments = parsed(words) if words else None
        if named := getattr(arguments, "recipe", None):
            at_once = [] if "=" not in named else [named]
            recipe = named if named in ("demo", "melt-1.6b", "melt-1.6b-paper") else "melt-1.6b"
            load_recipe(recipe, [*(() if recipe == "demo" else OURS), *at_once, *arguments.overrides])
    elif words[:1] == ["serve"]:
        understand_serve(words[1:])
    elif words[:1] == ["verify"]:
        cut = words.index("--") if "--" in words else len(words)
        verify_parser().parse_args(words[1:cut])
        understand_serve(words[cut + 1 :])
    elif len(words) > 1:
        cli.parser().parse_args(words)
    elif words and words[0] not in cli.parser().format_help():
        raise ValueError(f"melt-serve {words[0]}: no such command")


@pytest.mark.parametrize(
    "document",
    [path for path in DOCUMENTS if path.name != "CHANGELOG.md"],  # which names what has gone
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_command_in_the_documents_is_understood(document, capsys):
    faults = []
    for program, words in commands_of(document.read_text()):
        try:
            understand(program, words)
        except SystemExit as ended:
            if ended.code:
                faults.append(f"{shlex.join([program, *words])}: {capsys.readouterr().err.strip().splitlines()[-1]}")
        except ValueError as error:
            faults.append(f"{shlex.join([program, *words])}: {error}")
    assert not faults, "\n".join(["", *faults])


@pytest.mark.parametrize(
    "text",
    [
        "    melt-serve serve ./x --max-lops 3\n",
        "    melt-serve convert --chek ./x\n",
        "    melt-serve nothing\n",
        "```\nmelt-serve bench memroy\n```\n",
        "Say `melt-serve train run ./mine.toml transition.step=3`.\n",
        "Say `melt-serve train\ncost melt-1.6b --procesess 8`.\n",
        "    melt-serve verify ./x -- --tensor-parallel-sizes 2\n",
        "    vllm serve ./x --nothing\n",
        "    make nothing     # at all\n",
    ],
)
def test_a_wrong_command_is_seen(text, capsys):
    (command,) = commands_of(text)
    with pytest.raises((SystemExit, ValueError)):
        understand(*command)


def test_commands_are_found():
    assert commands_of(
        "    melt-serve serve ./x \\\n        --port 1  # or `melt-serve a`\n    vllm serve x && docker run y\n"
    ) == [
        ("melt-serve", ["serve", "./x", "--port", "1"]),
        ("vllm serve", ["x"]),
    ]
    assert len(commands_of((ROOT / "README.md").read_text())) >= 10


LEAST = 15
"""Letters of an error's template that are the error's own; with fewer, it would match anything."""
AROUND = 30
"""Letters that an error may have before and after its template: a field's name, a value, a hint."""


@cache
def templates() -> list[re.Pattern[str]]:
    """Return every text in the package's source, what an f-string fills in standing for anything."""
    patterns = []
    for path in (ROOT / "melt_serve").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            own = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            if sum(map(len, own)) >= LEAST:
                said = [re.escape(part.value) if isinstance(part, ast.Constant) else ".+?" for part in parts]
                patterns.append(re.compile(rf".{{0,{AROUND}}}{''.join(said)}.{{0,{AROUND}}}"))
    return patterns


def in_the_source(error: str) -> bool:
    """Tell whether the package can print this error."""
    return any(pattern.fullmatch(error) for pattern in templates())


def test_every_error_of_troubleshooting_is_in_the_source():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    errors = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    assert len(errors) >= 20
    missing = [error for error in errors if not in_the_source(error)]
    assert not missing, "\n".join(["", *missing])


def test_an_error_that_nobody_prints_is_seen():
    assert in_the_source("--port=80 is in use: name another one, or stop who listens there")
    assert not in_the_source("--port=80 is in use: name another one, or stop it")
    assert not in_the_source("the port is in use, so name a port that is free, or stop the program that listens there")
