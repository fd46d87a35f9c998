"""`melt-serve serve` turns its words into vLLM's own command line."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from melt_serve import serve
from melt_serve.bundled import MELT
from melt_serve.cpu_start import PROCESSES
from melt_serve.serve import command, main, take_limits
from tests.container import in_shared_memory_of, may_mount
from tests.ouro_files import write_ouro

SERVER = [sys.executable, "-m", "melt_serve.api.server"]
SAFE = [
    "--host",
    "127.0.0.1",
    "--shutdown-timeout",
    "30",
    "--disable-uvicorn-access-log",
    "--enable-prompt-tokens-details",
]


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
    assert command(words) == [*SERVER, "--model", words[0], *SAFE, *words[1:]]
    name, left = "org/name", ["--load-format", "dummy"]  # and the name is vLLM's to fetch
    assert command([name, *left]) == [*SERVER, "--model", name, *SAFE, *left]
    assert command(["--model", "org/name"]) == [*SERVER, *SAFE, "--model", "org/name"]


def test_where_to_listen_is_the_users_choice():
    words = ["--host", "0.0.0.0", "--load-format", "dummy"]
    assert command(["org/name", *words]) == [*SERVER, "--model", "org/name", *SAFE[2:], *words]


def test_limits_are_taken_from_flags_and_the_environment(monkeypatch):
    monkeypatch.setenv("MELT_REQUEST_TIMEOUT", "9")
    monkeypatch.setenv("MELT_BODY_TIMEOUT", "8")
    limits, others = take_limits(["--max-body-bytes", "1000", "--port", "1", "--body-timeout=2.5"])
    assert limits == {"MELT_MAX_BODY_BYTES": "1000", "MELT_BODY_TIMEOUT": "2.5", "MELT_REQUEST_TIMEOUT": "9"}
    assert others == ["--port", "1"]


@pytest.mark.parametrize(
    "words", ["--max-body-bytes 1.5", "--max-body-bytes=0", "--body-timeout soon", "--body-timeout"]
)
def test_a_limit_is_a_positive_number(words, capsys):
    assert main(words.split()) == 2
    assert "must be a positive number" in capsys.readouterr().err


def test_default_and_max_loops_are_short_for_vllms_overrides():
    assert command(["--max-loops=6"])[-1] == "--hf-overrides.max_loops=6"
    assert command(["--default-loops", "2"])[-2:] == ["--hf-overrides.total_ut_steps", "2"]
    assert command(["--default-loops=2"])[-1] == "--hf-overrides.total_ut_steps=2"


def test_drafts_by_depth_are_short_for_vllms_options(capsys):
    words = command(["--draft-tokens", "3", "--draft-loops=2"])
    assert words[-3:] == [
        "--speculative-config.num_speculative_tokens",
        "3",
        "--additional-config.draft_loops=2",
    ]
    assert words[words.index("--speculative-config.model") + 1] == serve.DRAFTER
    assert main(["--draft-loops", "2"]) == 2
    assert "beside --draft-tokens only" in capsys.readouterr().err


def test_the_size_of_the_cache_is_said_once(monkeypatch, capsys):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert "--kv-cache-memory-bytes" not in command([])
    assert main(["--kv_cache_memory_bytes=1G"]) == 2
    error = capsys.readouterr().err
    assert "VLLM_CPU_KVCACHE_SPACE overrides --kv-cache-memory-bytes" in error and error.count("\n") == 1


def test_a_model_in_a_config_file_is_left_to_vllm():
    assert command(["--config", "serve.yaml"]) == [*SERVER, "--config", "serve.yaml"]


def test_a_path_after_the_flags_is_refused_not_ignored(tmp_path, capsys):
    (tmp_path / "config.json").touch()
    assert main(["--port", "9000", str(tmp_path)]) == 2
    assert "must come before the flags" in capsys.readouterr().err
    assert command(["--model", str(tmp_path)]) == [*SERVER, *SAFE, "--model", str(tmp_path)]


@pytest.mark.parametrize(("path", "says"), [("./nowhere", "does not exist"), (".", "no config.json")])
def test_a_wrong_path_is_one_clear_line(path, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([path]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize("path", ["x" * 5000, f"{'x' * 300}/{'y' * 300}", "--model=" + "x" * 5000])
def test_a_path_that_is_too_long_is_one_clear_line(path, capsys):
    assert main([path]) == 2
    error = capsys.readouterr().err
    assert "File name too long" in error and error.count("\n") == 1


def test_a_long_value_of_a_flag_is_no_path():
    assert command(["--hf-overrides", "x" * 5000])[-1] == "x" * 5000


def test_a_looped_folder_and_little_memory_are_one_clear_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serve, "free_memory", lambda: PROCESSES)
    assert main([str(write_ouro(tmp_path / "ouro", {}))]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "3.0 GiB of free memory leave 0.00 GiB for rows, which hold no request" in error


@pytest.mark.parametrize("before", [[], ["--model"]])
def test_weights_that_may_not_be_read_are_one_clear_line(before, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(serve.os, "access", lambda path, mode: path.name != "model.safetensors")  # root may read all
    assert main([*before, str(tmp_path)]) == 2
    assert "model.safetensors may not be read" in capsys.readouterr().err


def test_routes_of_ours_are_named_and_no_other_plugin_is_lost(monkeypatch):
    theirs = {"vllm.general_plugins": "other", "vllm.platform_plugins": "device", "vllm.endpoint_plugins": "routes"}
    monkeypatch.setattr(
        serve, "entry_points", lambda group: [EntryPoint(theirs[group], "m", group)] if group in theirs else []
    )
    assert serve.plugins() == ["device", "other"]
    monkeypatch.undo()
    assert "melt_serve" in serve.plugins()


@pytest.mark.skipif(not may_mount(), reason="no mount namespaces here")
def test_too_little_shared_memory_is_one_line_with_the_remedy():
    words = [*in_shared_memory_of("1m"), sys.executable, "-m", "melt_serve.cli", "serve"]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert "/dev/shm has 1024 KiB free" in ended.stderr and "--shm-size=64m" in ended.stderr
