"""What a command costs, whatever else the machine does."""

import resource
import subprocess
from collections.abc import Sequence


def least_cpu_seconds(command: Sequence[object]) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a command three times; return the last run, and the least CPU seconds of one."""
    seconds = []
    for _ in range(3):
        before = of_children()
        ran = subprocess.run([*map(str, command)], capture_output=True, text=True)
        seconds.append(of_children() - before)
    return ran, min(seconds)


def of_children() -> float:
    """Return the CPU seconds of all children that have ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
