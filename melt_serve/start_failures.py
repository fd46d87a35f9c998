"""What vLLM said when it did not start, in one sentence: the root cause among hundreds of lines of traceback."""

import os
import re
from collections.abc import Iterator, Mapping

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
PREFIX = re.compile(r"^(\([\w-]+ pid=\d+\) ?)?((ERROR|WARNING|INFO|CRITICAL) [\d-]+ [\d:]+ \[[^]]*\] ?)?")
"""What vLLM puts before a line of its log: process, level, time and place."""
EXCEPTION = re.compile(r"^(?:[\w]+\.)*\w*(?:Error|Exception|Exit|Interrupt|Timeout|Full|Empty): (?P<message>.+)")
CHAINED = ("The above exception was the direct cause", "During handling of the above exception")
POINTERS = ("Engine core initialization failed", "WorkerProc initialization failed", "Worker failed with error")
"""Exceptions that only say that there is another one."""
USAGE = re.compile(r"^\S+: error: (?P<message>.+)")
KILLED = re.compile(r"died unexpectedly \(exit code: -(9|7)\)")
REMEDIES = {
    r"Address already in use": "the port is in use; choose another one with --port",
    r"Cannot assign requested address": "this machine does not have the address of --host",
    r"Too many open files": "raise the limit of open files: ulimit -n 65536",
    r"No space left on device": "a disk is full: free some space in the temporary folder (TMPDIR) and in ~/.cache",
    r"Read-only file system|No usable temporary directory": "set TMPDIR to a folder that can be written",
    r"No available memory for the cache blocks": "raise --kv-cache-memory-bytes",
    r"To serve at least one request": "raise --kv-cache-memory-bytes, or lower --max-model-len",
    r"Not enough allowed NUMA nodes": "name the cores of each rank, such as VLLM_CPU_OMP_THREADS_BIND='0|1'",
    r"Failed to import Ray": "on a CPU leave Ray's flags out: vLLM cannot place its workers there",
    r"SafetensorError|deserializing header": "a weight file is damaged; melt-serve convert --check FOLDER names it",
}
"""What to do, where vLLM does not say it in terms of our flags."""


def explain(text: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the last useful sentence of vLLM's output, with a remedy where we know one; None if there is none.

    Args:
        text: all that a server wrote which then ended by itself.
        environment: the server's, to name the variable that holds a value which vLLM could not take.
    """
    lines = [PREFIX.sub("", line) for line in COLOUR.sub("", text).splitlines()]
    cause = next((each for each in causes(lines) if not each.startswith(POINTERS)), None)
    usage = [match["message"] for line in lines if (match := USAGE.match(line))]
    if cause is None and usage:
        return usage[-1]
    if cause is None and KILLED.search(text):
        return "a process of vLLM was killed, most likely for want of memory; give it more, or serve a smaller model"
    if cause is None:
        return None
    named = [
        f"{name}={value}"
        for name, value in environment.items()
        if name.startswith("VLLM_") and value and name not in cause and repr(value).lower() in cause.lower()
    ]
    remedies = [remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, cause)]
    return "; ".join([cause.rstrip("."), *(f"look at {each} in the environment" for each in named), *remedies])


def causes(lines: list[str]) -> Iterator[str]:
    """Yield the message of every exception, in order; of a chain only its last, with the first in brackets."""
    chain: list[str] = []
    continues = False
    for number, line in enumerate(lines):
        if line.startswith(CHAINED):
            continues = True
        elif match := EXCEPTION.match(line):
            if chain and not continues:
                yield joined(chain)
                chain = []
            chain.append(whole_message(match["message"], lines[number + 1 :]))
            continues = False
    if chain:
        yield joined(chain)


def whole_message(message: str, following: list[str]) -> str:
    """Return an exception's message without pydantic's frame; where its first line only announces, with the next."""
    if re.match(r"\d+ validation errors? for ", message) or message.endswith(":"):
        more = following[0].strip() if following else ""
        message = more if more.startswith("Value error, ") else f"{message} {more}"
    return " ".join(message.removeprefix("Value error, ").split(" [type=")[0].split())


def joined(chain: list[str]) -> str:
    """Return a chain's last message, and its first where that says something else."""
    first, last = chain[0], chain[-1]
    return last if first in last else f"{last.rstrip('.')} ({first.rstrip('.')})"
