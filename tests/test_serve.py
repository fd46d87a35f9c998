"""`melt-serve serve` turns its words into vLLM's own command line."""

import sys
from importlib.metadata import EntryPoint

import pytest

from melt_serve import serve
from melt_serve.bundled import MELT
from melt_serve.serve import command, main

SERVER = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]


def test_without_a_path_the_bundled_checkpoint_is_served():
    words = command(["--port", "9000"])
    assert words[:5] == [*SERVER, "--model", str(MELT)]
    assert words[-2:] == ["--port", "9000"]
    assert "--enforce-eager" in words


@pytest.mark.parametrize("flag", ["--no-enforce-eager", "--served_model_name=x", "--reasoning-parser=qwen3"])
def test_a_users_flag_replaces_the_default(flag):
    default = flag.split("=")[0].replace("--no-", "--").replace("_", "-")
    assert command([flag]).count(default) == 0


def test_a_path_and_vllms_flags_pass_through_untouched(tmp_path):
    (tmp_path / "config.json").touch()
    words = [str(tmp_path), "--hf-overrides", '{"total_ut_steps": 8}', "-tp", "2"]
    assert command(words) == [*SERVER, "--model", *words]
    assert command(["org/name"]) == [*SERVER, "--model", "org/name"]
    assert command(["--model", "org/name"]) == [*SERVER, "--model", "org/name"]


def test_default_loops_is_short_for_vllms_override():
    assert command(["org/name", "--default-loops", "2"])[-2:] == ["--hf-overrides.total_ut_steps", "2"]
    assert command(["org/name", "--default-loops=2"])[-1] == "--hf-overrides.total_ut_steps=2"


def test_a_model_in_a_config_file_is_left_to_vllm():
    assert command(["--config", "serve.yaml"]) == [*SERVER, "--config", "serve.yaml"]


def test_a_path_after_the_flags_is_refused_not_ignored(tmp_path, capsys):
    (tmp_path / "config.json").touch()
    assert main(["--port", "9000", str(tmp_path)]) == 2
    assert "must come before the flags" in capsys.readouterr().err
    assert command(["--model", str(tmp_path)]) == [*SERVER, "--model", str(tmp_path)]


@pytest.mark.parametrize(("path", "says"), [("./nowhere", "does not exist"), (".", "no config.json")])
def test_a_wrong_path_is_one_clear_line(path, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([path]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_routes_of_ours_are_named_and_no_other_plugin_is_lost(monkeypatch):
    theirs = {"vllm.general_plugins": "other", "vllm.platform_plugins": "device", "vllm.endpoint_plugins": "routes"}
    monkeypatch.setattr(
        serve, "entry_points", lambda group: [EntryPoint(theirs[group], "m", group)] if group in theirs else []
    )
    assert serve.plugins() == ["device", "other"]
    monkeypatch.undo()
    assert "melt_serve" in serve.plugins()
