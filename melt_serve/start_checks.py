"""What can be known before vLLM starts: port, limits and environment of this process, and the checkpoint.

The checkpoint is read in a process of its own, which takes the memory of the libraries that read it when it ends.
"""

import ctypes
import json
import os
import re
import resource
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import MutableMapping, Sequence
from errno import EACCES, EADDRINUSE, EADDRNOTAVAIL
from importlib.metadata import distributions
from pathlib import Path

from melt_serve.bundled import CHECKPOINTS

DEFAULT_PORT = 8000
NUMA = "libnuma.so.1"
"""What vLLM's CPU build loads, and small images lack."""
LEAST_OPEN_FILES = 256
"""vLLM's three processes were seen to take more than 64, and connections come on top."""
ENOUGH_OPEN_FILES = 65_535
LEAST_MEMORY = 1 << 30
"""Bytes that vLLM's processes take at least beside the weights."""
KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
"""An older way to say how large the KV cache is, in GiB; vLLM prefers it to the flag without a word."""
NUMBERS = ("VLLM_PORT", KV_SPACE, "VLLM_CPU_NUM_OF_RESERVED_CPU")
"""Variables of vLLM's that hold whole numbers, and that it reads late."""
LEVELS = ("NOTSET", "DEBUG", "INFO", "WARN", "WARNING", "ERROR", "FATAL", "CRITICAL")
OTHER_CHECKPOINT = ("--hf-overrides", "--hf-config-path", "--config", "--load-format", "--quantization", "-q")
"""Flags with which the folder's files do not say what is served."""
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
MEMORY = Path("/sys/devices/system/node/node0/meminfo")
DEFAULT_SHARE = "0.92"
"""vLLM's own `--gpu-memory-utilization`."""
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


class StartError(ValueError):
    """The server cannot start; the message says why, and what to do."""


def check_start(words: Sequence[str], environment: MutableMapping[str, str]) -> None:
    """Refuse at once what vLLM would refuse after a minute, or serve without a word.

    Args:
        words: vLLM's flags.
        environment: the server's, from which variables go that others meant for something else.

    Raises:
        StartError: the first thing that cannot work.
    """
    check_environment(environment)
    check_open_files()
    check_temporary_folder()
    check_library()
    if value_of(words, "--uds") is None and value_of(words, "--config") is None:
        check_port(value_of(words, "--host"), value_of(words, "--port") or str(DEFAULT_PORT))
    check_certificate(value_of(words, "--ssl-certfile"), value_of(words, "--ssl-keyfile"))
    model = Path(value_of(words, "--model") or "")
    limit = next((path for path in CGROUP_LIMITS if path.is_file()), None)
    if value_of(words, "--model") and os.path.exists(model):  # of a name too long, too, vLLM says what it thinks
        check_memory(model, limit)
        if all(value_of(words, flag) is None for flag in OTHER_CHECKPOINT):
            check_model(model, words)
    sized = environment.get("VLLM_CPU_KVCACHE_SPACE") or value_of(words, "--kv-cache-memory-bytes") is not None
    if not sized and value_of(words, "--config") is None and on_cpu():
        check_free_memory(value_of(words, "--gpu-memory-utilization"), limit)


def value_of(words: Sequence[str], flag: str) -> str | None:
    """Return what the words set a flag to, the last time they do; None where they do not."""
    value = None
    for word, following in zip(words, [*words, ""][1:], strict=True):
        name, equals, inside = word.partition("=")
        if (name.replace("_", "-") if name.startswith("--") else name) == flag:
            value = inside if equals else following
    return value


def check_environment(environment: MutableMapping[str, str]) -> None:
    """Drop what Kubernetes says of a service that is named vllm, and refuse values that vLLM cannot take.

    Raises:
        StartError: a variable has such a value.
    """
    if environment.get("VLLM_PORT", "").startswith(("tcp://", "udp://")):
        value = environment.pop("VLLM_PORT")
        print(f"melt-serve: VLLM_PORT={value} is Kubernetes', of a service named vllm: left out", file=sys.stderr)
    for name in NUMBERS:
        if name in environment and not environment[name].strip().isdecimal():
            raise StartError(f"{name}={environment[name]!r} must be a whole number; correct it in the environment")
    level = environment.get("VLLM_LOGGING_LEVEL", "INFO")
    if level.upper() not in LEVELS:
        raise StartError(f"VLLM_LOGGING_LEVEL={level!r} is none of {', '.join(LEVELS)}; correct it in the environment")


def check_open_files() -> None:
    """Raise the limit of open files, as far as this process may.

    Raises:
        StartError: that is too little.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if hard != resource.RLIM_INFINITY and hard < LEAST_OPEN_FILES:
        raise StartError(
            f"this process may open {hard} files, and a server needs {LEAST_OPEN_FILES} or more: raise the limit "
            "(ulimit -n 65536, docker run --ulimit nofile=65536, LimitNOFILE= of systemd)"
        )


def check_temporary_folder() -> None:
    """Refuse a machine that has no place for vLLM's sockets.

    Raises:
        StartError: there is no folder that can be written, or its disk is full.
    """
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(bytes(1 << 16))
            file.flush()
    except OSError as error:
        raise StartError(
            f"no temporary file can be written ({error.strerror or error}): set TMPDIR to a folder with free space "
            "that can be written, or mount one at /tmp"
        ) from error


def check_library() -> None:
    """Refuse a machine that lacks what vLLM's CPU build loads: without its operators it fails a minute later."""
    if on_cpu():
        try:
            ctypes.CDLL(NUMA)
        except OSError:
            raise StartError(f"{NUMA} is missing, which vLLM's CPU build loads: apt-get install libnuma1") from None


def check_port(host: str | None, port: str) -> None:
    """Refuse a port that is taken, or an address that this machine does not have.

    Raises:
        StartError: it is.
    """
    if not port.isdecimal() or not 0 <= int(port) < 1 << 16:
        raise StartError(f"--port={port} is not a port: name a number from 1 to {(1 << 16) - 1}")
    try:
        found = socket.getaddrinfo(host or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartError(f"--host={host} is no address of this machine ({error.strerror}); 0.0.0.0 is all") from error
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(address)
        except OSError as error:
            reasons = {
                EADDRINUSE: f"--port={port} is in use: name another one, or stop who listens there",
                EADDRNOTAVAIL: f"--host={host} is no address of this machine; 0.0.0.0 is all of them",
                EACCES: f"--port={port} may not be opened by this user: name one above 1023",
            }
            if error.errno in reasons:
                raise StartError(reasons[error.errno]) from error


def check_memory(model: Path, limit: Path | None) -> None:
    """Refuse a control group (a container) that is smaller than vLLM's processes; warn of one without room for weights.

    How much of their files' size the weights take depends on `--dtype`, and on a GPU they are not in this memory.

    Raises:
        StartError: it is smaller.
    """
    stated = limit.read_text().strip() if limit is not None else "max"
    needed = sum(path.stat().st_size for path in model.glob("*.safetensors")) + LEAST_MEMORY
    if stated.isdecimal() and int(stated) < needed:
        says = (
            f"this control group may use {int(stated) / 1e9:.1f} GB of memory ({limit}), and {model} needs up to "
            f"{needed / 1e9:.1f} GB: give it more (docker run --memory, resources.limits.memory, MemoryMax=)"
        )
        if int(stated) < LEAST_MEMORY:
            raise StartError(says)
        print(f"melt-serve: warning: {says}", file=sys.stderr)


def on_cpu() -> bool:
    """Return whether the vLLM that is installed is its CPU build."""
    installed = {f"{each.name}=={each.version}" for each in distributions() if each.name in ("vllm", "vllm-cpu")}
    return any("cpu" in each for each in installed)


def check_free_memory(share: str | None, limit: Path | None, memory: Path = MEMORY) -> None:
    """Refuse a machine with less free memory than vLLM wants on a CPU where nobody says how large the KV cache is.

    It is counted as vLLM does. Where the memory has several nodes, or a container has less of it, it is left to vLLM.

    Args:
        share: of the memory that vLLM takes, `--gpu-memory-utilization`.
        limit: the file with the control group's limit.
        memory: what the kernel says of the only node.

    Raises:
        StartError: it is not.
    """
    if not memory.is_file() or len(list(memory.parent.parent.glob("node[0-9]*"))) > 1:
        return
    stated = dict(re.findall(r"^Node \d+ (\S+):\s+(\d+) kB$", memory.read_text(), re.MULTILINE))
    total = int(stated["MemTotal"]) << 10
    most = limit.read_text().strip() if limit is not None else "max"
    if most.isdecimal() and int(most) < total:
        return
    free = sum(int(stated[name]) for name in ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")) << 10
    try:
        wanted = total * float(share or DEFAULT_SHARE)
    except ValueError:  # vLLM's parser will say it
        return
    if free < wanted:
        raise StartError(
            f"{free / 1e9:.1f} of {total / 1e9:.1f} GB of memory are free, and vLLM wants {wanted / 1e9:.1f} "
            f"(--gpu-memory-utilization={share or DEFAULT_SHARE}, on a CPU, too): say how large the KV cache shall be, "
            "such as --kv-cache-memory-bytes 1G"
        )


def check_certificate(certificate: str | None, key: str | None) -> None:
    """Refuse files of `--ssl-certfile` and `--ssl-keyfile` with which there is no TLS.

    Raises:
        StartError: a file is missing or unreadable, the key is another certificate's, or has a password.
    """
    if certificate is None:
        if key is not None:
            raise StartError("--ssl-keyfile is nothing without --ssl-certfile: name both, or none for plain HTTP")
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, password="")
    except OSError as error:  # SSLError is one
        raise StartError(
            f"--ssl-certfile={certificate} and --ssl-keyfile={key} are no certificate with its key in PEM, without a "
            f"password ({error.strerror or error}): correct the files, or leave both flags out"
        ) from error


def check_model(model: Path, words: Sequence[str]) -> None:
    """Refuse a folder that cannot be served as it is, and a KV cache that holds no whole request.

    What comes with the package is right, and 3 s of imports are a tenth of its start.

    Raises:
        StartError: it cannot; the message names file, field and remedy.
    """
    if model.resolve().parent == CHECKPOINTS.resolve():
        checked = None
    else:
        chat_template = value_of(words, "--chat-template")
        command = [sys.executable, "-m", "melt_serve.checkpoint_check", str(model)]
        command += [chat_template] if chat_template is not None else []
        checked = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if checked is not None and checked.returncode == 2:
        raise StartError(checked.stderr.strip().rpartition("melt-serve: error: ")[2])
    if checked is not None:
        print(checked.stderr, end="", file=sys.stderr)
    check_max_loops(model, value_of(words, "--hf-overrides.max-loops"))
    given = value_of(words, "--kv-cache-memory-bytes")
    if given is not None and (size := bytes_in(given)) is not None and size < (least := least_cache(model)):
        raise StartError(
            f"--kv-cache-memory-bytes={given} is less than {least:,} bytes, which the rows of one block take: name "
            "more, such as 1G"
        )


def check_max_loops(model: Path, given: str | None) -> None:
    """Refuse other loops than the checkpoint's as the most, where its gate has a bias for each.

    Raises:
        StartError: they are others.
    """
    try:
        fields = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if given is not None and fields.get("kv_gate_bias") == "loop" and given != str(fields.get("max_loops")):
        raise StartError(
            f"--max-loops={given}: this checkpoint's gate has a bias for each of its {fields.get('max_loops')} loops; "
            "leave it out, and choose the loops of requests that ask for none by --default-loops"
        )


def bytes_in(text: str) -> int | None:
    """Return what vLLM's parser makes of a size such as 4G; None where it is not that simple."""
    size = re.fullmatch(r"([\d.]+)([KMGTkmgt]?)", text)
    return int(float(size[1]) * UNITS[size[2]]) if size and size[1].count(".") < 2 and size[1] != "." else None


def least_cache(model: Path) -> int:
    """Return the bytes that the smallest block of rows takes: 16 tokens, one byte a value; 0 where it is not known."""
    try:
        fields = json.loads((model / "config.json").read_text(encoding="utf-8"))
        return 2 * 16 * fields["num_hidden_layers"] * fields["num_key_value_heads"] * fields["head_dim"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
