"""What keeps a server from starting is one line at once, with the remedy, and exit code 2."""

import json
import resource
import shutil
import socket
import subprocess
import sys
import time

import pytest

from melt_serve import start_checks
from melt_serve.bundled import MELT
from melt_serve.serve import main
from melt_serve.server_process import free_port
from melt_serve.start_checks import StartError, check_max_loops, check_memory, check_start, value_of
from tests.certificates import self_signed
from tests.test_checkpoint_check import flip_bit, state, weights_of, without

SERVE = [sys.executable, "-m", "melt_serve.cli", "serve"]


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "melt"
    shutil.copytree(MELT, folder)
    return folder


def refusal(capsys, *words):
    """Return the one line that `melt-serve serve` ends with."""
    assert main([*map(str, words), "--port", str(free_port())]) == 2
    error = capsys.readouterr().err
    assert error.startswith("melt-serve: error: ") and error.count("\n") == 1, error
    return error


def test_a_library_that_small_images_lack_is_named(capsys, monkeypatch):
    monkeypatch.setattr(start_checks, "NUMA", "libnuma.so.0")
    assert "libnuma.so.0 is missing, which vLLM's CPU build loads: apt-get install libnuma1" in refusal(capsys)
    monkeypatch.setattr(start_checks, "on_cpu", lambda: False)
    start_checks.check_library()


def test_a_port_that_is_taken_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port)]) == 2
    assert f"--port={port} is in use: name another one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--port=99999"], "--port=99999 is not a port"),
        (["--port", "http"], "--port=http is not a port"),
        (["--host", "203.0.113.7"], "--host=203.0.113.7 is no address of this machine"),
        (["--host", "no such host"], "--host=no such host is no address of this machine"),
        (["--kv-cache-memory-bytes", "1"], "--kv-cache-memory-bytes=1 is less than 6,144 bytes"),
        (["--kv_cache_memory_bytes=5K"], "--kv-cache-memory-bytes=5K is less than 6,144 bytes"),
    ],
)
def test_flags_that_cannot_work_are_named(words, says, capsys):
    assert main(["--port", str(free_port()), *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without("kv_gate"), "lacks the tensor model.layers.0.self_attn.kv_gate.input_proj.weight and 2 more"),
        (state(rms_norm_eps=-1.0), "config.json cannot be used: rms_norm_eps must be above 0 and below 1, not -1.0"),
        (weights_of(lambda content: content[:-1]), "model.safetensors is truncated or no safetensors file"),
    ],
    ids=["no gate", "eps", "truncated"],
)
def test_a_checkpoint_that_cannot_be_served_is_refused_before_vllm_starts(spoil, says, checkpoint, capsys):
    spoil(checkpoint)
    assert says in refusal(capsys, checkpoint)


def test_other_loops_than_a_gate_has_biases_for_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"kv_gate_bias": "loop", "max_loops": 4}))
    for loops in ("2", "8"):
        with pytest.raises(
            StartError, match=f"--max-loops={loops}: this checkpoint's gate has a bias for each of its 4"
        ):
            check_max_loops(tmp_path, loops)
    check_max_loops(tmp_path, "4")
    check_max_loops(tmp_path, None)
    (tmp_path / "config.json").write_text(json.dumps({"max_loops": 4}))
    check_max_loops(tmp_path, "8")


def test_flags_that_change_what_the_folder_says_leave_it_to_vllm(checkpoint):
    weights_of(flip_bit)(checkpoint)
    state(num_hidden_layers=2)(checkpoint)
    words = ["--model", str(checkpoint), "--port", str(free_port()), "--kv-cache-memory-bytes", "1G"]
    for flags in (["--hf-overrides", "{}"], ["--load-format=dummy"], ["-q", "fp8"]):
        check_start([*words, *flags], {})
    with pytest.raises(StartError, match="lacks the tensor"):
        check_start(words, {})


def test_the_last_word_on_a_flag_counts():
    assert value_of(["--port", "1", "--kv_cache=2", "--port=3"], "--port") == "3"
    assert value_of(["--kv_cache=2"], "--kv-cache") == "2"
    assert value_of(["--portal", "1"], "--port") is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("VLLM_PORT", "here"), ("VLLM_CPU_KVCACHE_SPACE", "abc"), ("VLLM_LOGGING_LEVEL", "loud")],
)
def test_a_variable_that_vllm_cannot_take_is_named(name, value):
    with pytest.raises(StartError, match=f"{name}='{value}' .*; correct it in the environment"):
        check_start(["--port", str(free_port())], {name: value})


def test_what_kubernetes_says_of_a_service_named_vllm_is_left_out(capsys):
    environment = {"VLLM_PORT": "tcp://10.0.0.1:8000", "VLLM_LOGGING_LEVEL": "debug"}
    check_start(["--port", str(free_port()), "--kv-cache-memory-bytes", "1G"], environment)
    assert environment == {"VLLM_LOGGING_LEVEL": "debug"} and "left out" in capsys.readouterr().err


def test_a_container_that_is_too_small_is_named(tmp_path, capsys):
    limit = tmp_path / "memory.max"
    for stated in ("max", str(4 << 30)):
        limit.write_text(stated)
        check_memory(MELT, limit)
    assert capsys.readouterr().err == ""
    limit.write_text(str(1 << 30))
    check_memory(MELT, limit)
    assert "warning: this control group may use 1.1 GB of memory" in capsys.readouterr().err
    limit.write_text(str(1 << 29))
    with pytest.raises(StartError, match=r"may use 0\.5 GB of memory .* needs up to 1\.1 GB: give it more"):
        check_memory(MELT, limit)


@pytest.fixture
def little_free(tmp_path):
    """What the kernel says of a node of which three quarters are free, a part of it only when it is asked for."""
    node = tmp_path / "node0"
    node.mkdir()
    kilobytes = {"MemTotal": 8000000, "MemFree": 2000000, "Active(file)": 1000000, "Inactive(file)": 2000000}
    kilobytes |= {"Active(anon)": 1000000, "SReclaimable": 1000000, "HugePages_Free": 0}
    (node / "meminfo").write_text("".join(f"Node 0 {name}: {number:8} kB\n" for name, number in kilobytes.items()))
    return node / "meminfo"


def test_a_cpu_without_the_memory_that_vllm_takes_is_named(little_free, tmp_path):
    start_checks.check_free_memory("0.74", None, little_free)
    with pytest.raises(StartError, match=r"6\.1 of 8\.2 GB .* vLLM wants 7\.5 .*0\.92.*--kv-cache-memory-bytes 1G"):
        start_checks.check_free_memory(None, None, little_free)
    limit = tmp_path / "memory.max"
    for stated in ("max", str(1 << 60)):
        limit.write_text(stated)
        with pytest.raises(StartError, match=r"--gpu-memory-utilization=0\.76"):
            start_checks.check_free_memory("0.76", limit, little_free)
    start_checks.check_free_memory("much", None, little_free)
    limit.write_text(str(1 << 30))
    start_checks.check_free_memory(None, limit, little_free)
    (little_free.parent.parent / "node1").mkdir()
    start_checks.check_free_memory(None, None, little_free)


def test_only_where_vllm_would_want_it(little_free, monkeypatch):
    monkeypatch.setattr(start_checks.check_free_memory, "__defaults__", (little_free,))
    monkeypatch.setattr(start_checks, "CGROUP_LIMITS", ())
    monkeypatch.setattr(start_checks, "on_cpu", lambda: True)
    port = ["--port", str(free_port())]
    with pytest.raises(StartError, match="of memory are free"):
        check_start([*port, "--model", "somebody/a-model"], {})
    for words, environment in (
        (["--kv-cache-memory-bytes", "1G"], {}),
        (["--gpu_memory_utilization=0.5"], {}),
        (["--config", "flags.yaml"], {}),
        ([], {"VLLM_CPU_KVCACHE_SPACE": "1"}),
    ):
        check_start([*port, *words], environment)
    monkeypatch.setattr(start_checks, "on_cpu", lambda: False)
    check_start(port, {})


@pytest.mark.parametrize("wrong", ["missing", "no PEM", "another's key", "no certificate"])
def test_a_certificate_that_is_none_is_named(wrong, tmp_path, capsys):
    certificate, key = self_signed(tmp_path)
    start_checks.check_certificate(str(certificate), str(key))
    words = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
    if wrong == "missing":
        certificate.unlink()
    elif wrong == "no PEM":
        certificate.write_text("certainly")
    elif wrong == "another's key":
        (tmp_path / "other").mkdir()
        shutil.copy(self_signed(tmp_path / "other")[1], key)
    else:
        words = words[2:]
    says = "nothing without --ssl-certfile" if wrong == "no certificate" else f"--ssl-certfile={certificate} and"
    assert says in refusal(capsys, MELT, *words)


def test_a_process_that_may_open_few_files_is_told_so():
    limits = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))}
    ended = subprocess.run([*SERVE, "--port", str(free_port())], capture_output=True, text=True, **limits)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "may open 64 files" in ended.stderr


def test_a_soft_limit_of_open_files_is_raised(monkeypatch):
    limits = [(64, 4096)]
    monkeypatch.setattr(start_checks.resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(start_checks.resource, "setrlimit", lambda which, both: limits.append(both))
    start_checks.check_open_files()
    assert limits[-1] == (4096, 4096)


def test_no_place_for_temporary_files_is_named(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(start_checks.tempfile, "NamedTemporaryFile", full)
    with pytest.raises(StartError, match=r"no temporary file can be written \(No space left on device\): set TMPDIR"):
        start_checks.check_temporary_folder()


def test_checks_can_be_left_out(monkeypatch, checkpoint):
    """Words reach vLLM as without the flag; nothing is looked at."""
    started = []
    monkeypatch.setattr("melt_serve.supervisor.supervise", lambda words, *_: started.extend(words) or 0)
    without("kv_gate")(checkpoint)
    assert main([str(checkpoint), "--skip-checks"]) == 0
    assert str(checkpoint) in started and "--skip-checks" not in started


def test_what_is_bundled_costs_no_time():
    started = time.process_time()
    check_start(["--model", str(MELT), "--port", str(free_port()), "--kv-cache-memory-bytes", "1G"], {})
    assert time.process_time() - started < 0.2
