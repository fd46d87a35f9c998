"""What a server on a CPU does where nobody says otherwise: dtype, rows, context, compiling and threads.

vLLM's own choices are a GPU's. Here they take minutes to start, or end in an error once the weights are loaded.
"""

import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from melt_serve.start_checks import (
    CGROUP_LIMITS,
    KV_SPACE,
    OTHER_CHECKPOINT,
    StartError,
    bytes_in,
    least_cache,
    value_of,
)

CGROUP_USAGE = ("memory.current", "memory.usage_in_bytes")
GIB = 1 << 30
PROCESSES = 3 * GIB
"""Memory that vLLM's processes take beside weights and rows."""
USUAL_CACHE = 4 * GIB
BLOCK = 128
"""Tokens in vLLM's largest block on a CPU; the context is cut to whole ones."""
VALUE_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
NATIVE = {"bfloat16": {"avx512_bf16", "amx_bf16", "bf16"}, "float16": {"avx512_fp16", "amx_fp16", "fphp"}}
"""The processor's flags, x86's and ARM's, one of which it needs to multiply a dtype without emulating it."""
SEVERAL_WORKERS = ("--tensor-parallel-size", "-tp", "--data-parallel-size", "-dp", "--data-parallel-size-local", "-dpl")
"""Flags with which memory is shared out in other ways than are counted here."""
COMPILING = re.compile(r"--(no-)?enforce[-_]eager|--compilation[-_]config|--optimization[-_]level|-O\d?|-cc")
ONE_SERVER = "\0melt-serve: bound to cores"
"""An abstract socket: its name belongs to one process on a host, and is free again when that ends."""

held: list[socket.socket] = []
"""That name, as long as this process lives."""


class Choices(NamedTuple):
    """Flags and variables of vLLM's, and what the user is told of them."""

    flags: dict[str, str | None]
    says: list[str]


def choose(
    folder: Path, words: Sequence[str], environment: Mapping[str, str], memory: int, processor: set[str]
) -> Choices:
    """Choose for a looped model's folder what the user's words leave open.

    Args:
        words: the user's flags for vLLM.
        memory: bytes that are free.
        processor: its flags, see `flags_of_processor`.

    Raises:
        StartError: there is no room for the rows of any context.
    """
    flags: dict[str, str | None] = {}
    says: list[str] = []
    if not any(COMPILING.match(word) for word in words):
        flags["--enforce-eager"] = None
        says.append("no compiling (--no-enforce-eager: minutes at the start, some 10% faster after)")
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stored = str(fields.get("torch_dtype") or fields.get("dtype") or "bfloat16")
        values = sum(path.stat().st_size for path in folder.glob("*.safetensors")) // VALUE_BYTES.get(stored, 2)
        per_token, published = values_of_a_token(fields, words), int(fields["max_position_embeddings"])
    except (OSError, ValueError, LookupError, TypeError):
        return Choices(flags, says)  # the checks that follow say what is wrong with it
    quantized = fields.get("quantization_config") is not None
    dtype = value_of(words, "--dtype")
    if dtype in (None, "auto"):
        dtype = "bfloat16" if stored == "float32" else stored  # vLLM's own choice
        fits = 4 * values + PROCESSES < memory
        if not quantized and dtype in NATIVE and not NATIVE[dtype] & processor and fits:
            says.insert(0, f"float32, as this processor only emulates {dtype} (--dtype)")
            dtype = flags["--dtype"] = "float32"
    elsewhere = any(value_of(words, flag) is not None for flag in (*OTHER_CHECKPOINT, *SEVERAL_WORKERS))
    if elsewhere or value_of(words, "--gpu-memory-utilization") or value_of(words, "--kv-cache-dtype"):
        return Choices(flags, says)
    given = (environment.get(KV_SPACE) and f"{environment[KV_SPACE]}G") or value_of(words, "--kv-cache-memory-bytes")
    row = per_token * VALUE_BYTES.get(dtype, 2)
    cache = bytes_in(given) if given else None
    if cache is not None and cache < least_cache(folder):
        return Choices(flags, says)  # the checks that follow name it
    if given is None:
        left = max(0, memory - PROCESSES - values * VALUE_BYTES.get(dtype, 2))
        cache = min(left // 2, max(USUAL_CACHE, (published + 2 * BLOCK + open_rows(fields)) * row))
        flags["--kv-cache-memory-bytes"] = str(cache)
        says.append(f"{cache / GIB:.1f} GiB of rows (--kv-cache-memory-bytes)")
    if cache is not None and value_of(words, "--max-model-len") is None:
        tokens = (cache // (row * BLOCK) - 2) * BLOCK - open_rows(fields)
        if tokens < BLOCK:
            room = f"{cache / GIB:.2f} GiB for rows"
            raise StartError(
                f"{room if given else f'{memory / GIB:.1f} GiB of free memory leave {room}, which'} hold no request "
                f"of {BLOCK} tokens, at {row:,} bytes a token: raise --kv-cache-memory-bytes, or serve a smaller model"
            )
        if tokens < published:
            flags["--max-model-len"] = str(tokens)
            says.append(
                f"a context of {tokens:,} of {published:,} tokens, which is what the rows hold (--max-model-len)"
            )
    return Choices(flags, says)


def values_of_a_token(fields: dict[str, int], words: Sequence[str]) -> int:
    """Count the values of K and V that a token keeps: over all layers, and of a LoopLM over all loops."""
    heads = fields["num_attention_heads"]
    head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
    values = 2 * fields["num_hidden_layers"] * (fields.get("num_key_value_heads") or heads) * head_dim
    if fields["model_type"] == "melt":
        return values
    usual = value_of(words, "--hf-overrides.total-ut-steps") or fields.get("total_ut_steps") or 4
    most = value_of(words, "--hf-overrides.max-loops") or fields.get("max_loops") or usual
    return values * int(most)


def open_rows(fields: dict[str, int | str]) -> int:
    """Count the tokens whose rows an open chunk takes, in whole blocks: see `decode_mode`."""
    if fields.get("decode_mode") != "chunk":
        return 0
    loops = int(fields.get("max_loops") or fields.get("total_ut_steps") or 4)
    return (loops - 1) * -(-int(fields.get("chunk_size") or 512) // BLOCK) * BLOCK


def threads(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a server's threads: those of the first on a host are bound to cores, of others to none.

    vLLM binds each server to the same cores, as none knows of the others.
    """
    if "VLLM_CPU_OMP_THREADS_BIND" in environment or not hasattr(os, "sched_getaffinity"):
        return {}
    name = socket.socket(socket.AF_UNIX)
    try:
        name.bind(ONE_SERVER)
    except OSError:
        name.close()
        cores = max(1, len(os.sched_getaffinity(0)) - 1)  # as many as vLLM binds; one is left to the scheduler
        return {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", str(cores)),
        }
    held.append(name)
    return {}


def free_memory() -> int:
    """Return the bytes that are free on this machine, or in this control group (a container)."""
    available = psutil.virtual_memory().available
    limit = next((path for path in CGROUP_LIMITS if path.is_file()), None)
    if limit is None or not (stated := limit.read_text().strip()).isdecimal():
        return available
    return max(0, min(available, int(stated) - used_in_group(limit.parent)))


def used_in_group(folder: Path) -> int:
    """Return the bytes that a control group uses, without the files' pages that are dropped when room is needed."""
    used = next((path for name in CGROUP_USAGE if (path := folder / name).is_file()), None)
    if used is None:
        return 0
    counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(used.read_text()) - int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))


def flags_of_processor() -> set[str]:
    """Return what Linux says that the processor can do; all that is asked for where it says nothing."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.is_file() else ""
    found = re.search(r"^(flags|Features)\s*: (.*)$", text, re.MULTILINE)
    return set(found[2].split()) if found else set().union(*NATIVE.values())
