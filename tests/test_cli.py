"""The `melt-serve` command, run as a user runs it."""

import importlib.metadata
import resource
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import get_args

from melt_serve import cli
from melt_serve.config import DecodeMode, GateType, InitialState
from melt_serve.modeling import MeltForCausalLM
from tests.tiny_models import tiny_looplm

COMMAND = Path(sysconfig.get_path("scripts")) / "melt-serve"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, words)], capture_output=True, text=True)


def processor_seconds() -> float:
    """Of all children so far: unlike a clock's, those of a command do not depend on what else runs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_instant_and_teaches_by_example():
    times = []
    for _ in range(3):
        start = processor_seconds()
        help_text = run("--help")
        times.append(processor_seconds() - start)
    assert help_text.returncode == 0
    assert "examples:" in help_text.stdout
    assert all(command in help_text.stdout for command in ("convert", "serve", "demo"))
    assert min(times) < 0.3


def test_help_imports_nothing_heavy():
    script = "import sys, melt_serve.cli as c\ntry: c.main(['convert', '--help'])\nexcept SystemExit: pass\n"
    script += "print(sorted({'torch', 'transformers', 'vllm', 'safetensors'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.endswith("[]\n")


def test_serve_has_a_help_of_its_own_that_leads_to_vllms():
    help_text = run("serve", "--help")
    assert help_text.returncode == 0
    assert "examples:" in help_text.stdout and "--help=all" in help_text.stdout


def test_words_after_serve_and_demo_are_their_own(tmp_path):
    refused = run("serve", tmp_path / "nowhere", "--version", "-tp=2")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1 and "nowhere does not exist" in refused.stderr
    assert run("demo", "--help").stdout.startswith("usage: melt-serve demo")


def test_version():
    assert run("--version").stdout == f"melt-serve {importlib.metadata.version('melt_serve')}\n"


def test_usage_errors_end_with_code_2():
    for words in ((), ("fly",), ("convert",), ("convert", "a", "b", "--gate-type", "fancy")):
        refused = run(*words)
        assert refused.returncode == 2
        assert refused.stderr.startswith("usage: melt-serve")


def test_convert_writes_a_checkpoint_and_says_what_is_next(tmp_path):
    tiny_looplm().save_pretrained(tmp_path / "ouro")
    done = run(
        *("convert", tmp_path / "ouro", tmp_path / "melt", "--gate-type", "scalar", "--initial-state", "zeros"),
        *("--chunk-size", 32, "--decode-mode", "chunk", "--max-loops", 6, "--seed", 5),
    )
    assert done.returncode == 0
    assert f"to serve it: melt-serve serve {tmp_path}" in done.stdout
    assert "100%" in done.stderr
    config = MeltForCausalLM.from_pretrained(tmp_path / "melt").config
    assert (config.kv_gate_type, config.kv_gate_initial_state) == ("scalar", "zeros")
    assert (config.chunk_size, config.decode_mode, config.max_loops) == (32, "chunk", 6)


def test_a_convertible_checkpoint_is_one_command_from_being_served(tmp_path):
    tiny_looplm().save_pretrained(tmp_path / "ouro")
    done = run("convert", tmp_path / "ouro", tmp_path / "melt", "--quiet")
    assert done.stdout.endswith(f"melt-serve serve {tmp_path / 'melt'}\n") and done.stderr == ""


def test_our_errors_are_one_line_without_a_traceback(tmp_path):
    failed = run("convert", tmp_path / "nowhere", tmp_path / "melt")
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith("melt-serve: error: the source ")
    assert failed.stderr.count("\n") == 1


def test_errors_of_the_file_system_are_one_line_too(tmp_path, capsys):
    tiny_looplm().save_pretrained(tmp_path / "ouro")
    too_long = tmp_path / ("x" * 300)
    assert cli.main(["convert", str(tmp_path / "ouro"), str(too_long), "--quiet"]) == 1
    assert "File name too long" in capsys.readouterr().err.splitlines()[-1]


def test_the_choices_offered_are_the_configs():
    help_text = run("convert", "--help").stdout
    for choices in (GateType, InitialState, DecodeMode):
        assert "{" + ",".join(get_args(choices)) + "}" in help_text
