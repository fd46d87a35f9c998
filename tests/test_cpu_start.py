"""What a server on a CPU takes where nobody says otherwise: what the processor can do, and what fits."""

import json
import os
import subprocess
import sys

import pytest

from melt_serve import cpu_start
from melt_serve.cpu_start import NATIVE, choose, free_memory, threads
from melt_serve.start_checks import StartError, on_cpu
from tests.ouro_files import PUBLISHED_OURO

GIB = 1 << 30
ALL = set().union(*NATIVE.values())
PLAIN = {"avx512f", "avx2"}
ROW = 2 * 24 * 2048 * 4
"""Values that a token of Ouro-1.4B keeps."""


@pytest.fixture
def ouro(tmp_path):
    """Its published shape; its weights are a hole in a file."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_OURO))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2 * 1_430_000_000)
    return tmp_path


def test_the_published_context_is_cut_to_what_fits(ouro):
    flags, says = choose(ouro, [], {}, 24 * GIB, ALL)
    cache = int(flags["--kv-cache-memory-bytes"])
    tokens = int(flags["--max-model-len"])
    assert tokens % 128 == 0 and tokens * ROW * 2 < cache < (24 * GIB - 2 * 1_430_000_000) / 2
    assert (tokens + 4 * 128) * ROW * 2 > cache
    assert "--dtype" not in flags and "--enforce-eager" in flags
    assert any(f"a context of {tokens:,} of 65,536 tokens" in each for each in says)


def test_with_room_for_it_the_context_is_whole(ouro):
    flags, _ = choose(ouro, [], {}, 400 * GIB, ALL)
    assert "--max-model-len" not in flags and int(flags["--kv-cache-memory-bytes"]) >= 65_536 * ROW * 2


def test_an_open_chunks_rows_and_more_loops_than_the_usual_ones_are_counted(ouro, tmp_path):
    def context(cache, *words, **fields):
        (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED_OURO, **fields}))
        return choose(tmp_path, [*words, *cache], {}, 400 * GIB, ALL).flags.get("--max-model-len")

    melt = {"model_type": "melt", "decode_mode": "chunk", "chunk_size": 512, "max_loops": 4}
    assert context([], **melt) is None, "there is room for the whole context and an open chunk"
    two, four = ["--kv-cache-memory-bytes", "2G"], ["--kv-cache-memory-bytes", "4G"]
    once = int(context(two))
    assert once == int(context([*two, "--dtype", "bfloat16"])) > int(context([*two, "--dtype", "float"]))
    assert once == int(context(four, "--hf-overrides.max_loops=8"))
    assert context(four, max_loops=8) == context(four, "--hf-overrides.max_loops=8")
    assert context(two, "--hf-overrides.total_ut_steps=2", max_loops=4) == str(once)


def test_float32_where_the_processor_emulates_bfloat16_and_memory_is_enough(ouro):
    flags, says = choose(ouro, [], {}, 24 * GIB, PLAIN)
    assert flags["--dtype"] == "float32" and "only emulates bfloat16" in says[0]
    assert int(flags["--max-model-len"]) * ROW * 4 < int(flags["--kv-cache-memory-bytes"])
    assert "--dtype" not in choose(ouro, [], {}, 8 * GIB, PLAIN).flags
    assert "--dtype" not in choose(ouro, ["--dtype=bfloat16"], {}, 24 * GIB, PLAIN).flags


def test_what_the_user_says_stays(ouro):
    words = ["--max-model-len=4096", "--kv-cache-memory-bytes", "1G", "--dtype", "bfloat16", "--no-enforce-eager"]
    assert choose(ouro, words, {}, 24 * GIB, PLAIN) == ({}, [])
    flags, _ = choose(ouro, [], {"VLLM_CPU_KVCACHE_SPACE": "2"}, 24 * GIB, ALL)
    assert "--kv-cache-memory-bytes" not in flags and int(flags["--max-model-len"]) * ROW * 2 < 2 * GIB
    for word in ("--gpu-memory-utilization", "--data-parallel-size", "-dp", "-tp"):
        assert set(choose(ouro, [word, "2"], {}, 24 * GIB, ALL).flags) == {"--enforce-eager"}


def test_fewer_loops_hold_a_longer_context(ouro):
    four, one = (
        int(choose(ouro, [*words, "--kv-cache-memory-bytes", "2G"], {}, 24 * GIB, ALL).flags["--max-model-len"])
        for words in ([], ["--hf-overrides.total_ut_steps=1"])
    )
    assert one > 4 * four


def test_no_room_for_any_context_is_one_line(ouro):
    with pytest.raises(StartError, match="hold no request of 128 tokens, at 786,432 bytes a token: raise --kv-cache"):
        choose(ouro, ["--kv-cache-memory-bytes", "96M"], {}, 24 * GIB, ALL)


def test_a_second_server_on_a_host_is_bound_to_no_core():
    """Each asks in a process of its own, which is what frees the name."""
    words = [sys.executable, "-c", "from melt_serve.cpu_start import threads; print(threads({})); input()"]
    first = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    first.stdout.readline()  # bound, or another server of this host is
    cores = str(max(1, len(os.sched_getaffinity(0)) - 1))
    assert threads({}) == {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": cores}
    assert threads({"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"
    assert threads({"VLLM_CPU_OMP_THREADS_BIND": "0"}) == {}
    first.communicate("\n")


@pytest.mark.parametrize(
    ("limit", "usage", "cached"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_of_a_containers_memory_only_what_is_not_used_is_free(tmp_path, monkeypatch, limit, usage, cached):
    """Pages of files that nobody looks at count as used, but are free for whoever needs them."""
    monkeypatch.setattr(cpu_start, "CGROUP_LIMITS", (tmp_path / "none", tmp_path / limit))
    (tmp_path / limit).write_text(f"{200 << 20}\n")
    (tmp_path / usage).write_text(f"{150 << 20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\n{cached} {30 << 20}\n")
    assert free_memory() == 80 << 20
    (tmp_path / usage).write_text(f"{290 << 20}\n")
    assert free_memory() == 0
    (tmp_path / limit).write_text("max\n")
    assert free_memory() > 80 << 20


def test_this_machine_is_read():
    assert free_memory() > 0
    assert on_cpu() or os.path.exists("/dev/nvidiactl")
