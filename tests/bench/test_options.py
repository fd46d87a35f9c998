"""Options of the benches: a field of a dataclass is a flag, and `--help` waits for nothing."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from melt_serve.bench.command import MEASUREMENTS
from melt_serve.bench.options import add_flags, flag, options_from
from melt_serve.terminal import loop_list, positive


@dataclass(frozen=True)
class Options:
    loops: Sequence[int] = flag((1, 2), "depths", loop_list, "T,T")
    context: int | None = flag(None, "tokens (default: the shape's)", positive, "N")
    decode_mode: str = flag("token", "the MELT's", choices=("token", "chunk"))
    caches: str = flag("scarce", "which", name="--cache")
    profile: bool = flag(False, "show where the time goes")
    compiled: bool = flag(True, "leave out torch.compile", name="--no-compile")


def parser(options=Options):
    command = argparse.ArgumentParser()
    add_flags(command, options)
    return command


def parsed(*words):
    return options_from(parser().parse_args(words), Options)


def test_no_words_are_the_defaults():
    assert parsed() == Options()


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_no_words_are_the_defaults_of_every_bench(name):
    options = MEASUREMENTS[name].Options
    assert options_from(parser(options).parse_args([]), options) == options()


def test_every_flag_fills_its_field():
    words = "--loops 4,8 --context 16 --decode-mode chunk --cache plentiful --profile --no-compile".split()
    assert parsed(*words) == Options([4, 8], 16, "chunk", "plentiful", True, False)


def test_help_shows_a_default_as_it_would_be_typed():
    text = parser().format_help()
    assert "depths (default: 1,2)" in text and "the MELT's (default: token)" in text
    assert "None" not in text and "False" not in text


def test_help_of_a_bench_imports_nothing_heavy():
    script = "import sys, melt_serve.cli as c\ntry: c.main(['bench', 'kernels', '--help'])\nexcept SystemExit: pass\n"
    script += "print(sorted({'torch', 'transformers', 'vllm', 'safetensors', 'matplotlib'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "--no-compile" in output and output.endswith("[]\n")
