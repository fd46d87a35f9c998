"""What documents say is so: the README is short, commands are understood, errors are printed as they stand there."""

import ast
import re
import shlex
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TypeAlias

import pytest

from melt_serve import cli
from melt_serve.serve import SKIP_CHECKS, take_limits, with_vllms_name
from melt_serve.train.__main__ import parsed
from melt_serve.train.recipe_files import load_recipe
from tests.test_links import DOCUMENTS

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"^```.*?^```|^ {4,}\S[^\n]*", re.MULTILINE | re.DOTALL)
MENTIONED = re.compile(r"(?<!`)`((?:melt-serve|vllm serve|python -m melt_serve\.train)(?: [^`]*|\n[^`]*)?)`(?!`)")
COMMAND = re.compile(r"^(?:\.venv/bin/)?(melt-serve|vllm serve|python -m melt_serve\.train|make)\b(.*)$")
UNFINISHED = re.compile(r"arguments are required|expected (one|at least one) argument")
"""What a parser says of a command that a sentence only mentions, such as `melt-serve convert --check`."""
Command: TypeAlias = "tuple[str, list[str]]"
OURS = "teacher=./teacher", "data.files=a.jsonl", "output=./out"
"""What a recipe of one's own states."""


def test_the_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def commands_of(text: str) -> tuple[list[Command], list[Command]]:
    """Return the commands of ours in a document's code, and those that its sentences mention."""
    code = "\n".join(CODE.findall(text)).replace("\\\n", " ").splitlines()
    mentioned = [" ".join(found.split()) for found in MENTIONED.findall(CODE.sub("", text))]
    return [split(line) for line in code if COMMAND.match(line.strip())], [split(line) for line in mentioned]


def split(line: str) -> Command:
    """Return a line's command and its words, without comments, what follows it, and `...`, which stands for any."""
    match = COMMAND.match(line.strip())
    assert match is not None
    alone = re.split(r" &&? ?| \| ", match[2] + " ")[0]
    return match[1], [word for word in shlex.split(alone, comments=True) if word != "..."]


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
    elif words:
        named = cli.PASSED_THROUGH.get(words[0])
        own = getattr(import_module(named[0]), "parser", None) if named else None
        cut = words.index("--") if "--" in words else len(words)
        (own or cli.parser)().parse_args(words[1:cut] if own else words[:cut])
        understand_serve(words[cut + 1 :])


@pytest.mark.parametrize(
    "document",
    [path for path in DOCUMENTS if path.name != "CHANGELOG.md"],  # which names what has gone
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_command_in_the_documents_is_understood(document, capsys):
    in_code, mentioned = commands_of(document.read_text())
    if document.name == "troubleshooting.md":
        in_code = []  # its code is errors
    faults = []
    for program, words in in_code + mentioned:
        try:
            understand(program, words)
        except SystemExit as ended:
            said = capsys.readouterr().err
            if ended.code and not ((program, words) in mentioned and UNFINISHED.search(said)):
                faults.append(f"{shlex.join([program, *words])}: {said.strip().splitlines()[-1]}")
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
    in_code, mentioned = commands_of(text)
    (command,) = in_code + mentioned
    with pytest.raises((SystemExit, ValueError)):
        understand(*command)
    assert not UNFINISHED.search(capsys.readouterr().err)


def test_commands_are_found():
    text = (
        "    melt-serve serve ./x \\\n        --port 1  # or not\n    vllm serve x && ls\n\nSay `melt-serve\nplan`.\n"
    )
    assert commands_of(text) == (
        [("melt-serve", ["serve", "./x", "--port", "1"]), ("vllm serve", ["x"])],
        [("melt-serve", ["plan"])],
    )
    assert len(commands_of((ROOT / "README.md").read_text())[0]) >= 10


LEAST = 15
"""Letters of an error's template that are the error's own; with fewer, it would match anything."""
AROUND = 30
"""Letters that an error may have before and after its template: a field's name, a value, a hint."""


@cache
def templates() -> list[re.Pattern[str]]:
    """Return every text in the package's source, what an f-string fills in standing for anything."""
    patterns = []
    for path in (ROOT / "melt_serve").rglob("*.py"):
        tree = ast.parse(path.read_text())
        said_to_readers = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in said_to_readers:  # a docstring
                continue
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
