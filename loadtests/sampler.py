"""Once a second: what the server's /metrics say, and what its processes hold, on the clock of the requests."""

import time
import urllib.error
import urllib.request
from collections import defaultdict
from pathlib import Path

import gevent
import psutil
from prometheus_client.parser import text_string_to_metric_families

from loadtests.seen import Sample

SECONDS = 1.0


def read(url: str) -> dict[str, float]:
    """Read the server's metrics; return them by name, summed over their labels.

    Raises:
        OSError: the server does not answer.
    """
    totals: dict[str, float] = defaultdict(float)
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        for family in text_string_to_metric_families(answer.read().decode()):
            for sample in family.samples:
                totals[sample.name] += sample.value
    return totals


def memory_of(server: psutil.Process) -> int:
    """Return the bytes that a process and all that it has started have written; pages that they share count once.

    Mapped files are left out: how much of a library is a process's share depends on who else on the machine has it.
    """
    total = 0
    for process in [server, *server.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        sizes = {name: size for name, _, size in (line.partition(":") for line in lines)}
        total += sum(1024 * int(sizes[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem") if name in sizes)
    return total


class Sampler:
    """Samples until it is stopped.

    Attributes:
        missed: moments when the server did not answer.
    """

    def __init__(self, url: str, server: psutil.Process):
        self.url, self.server, self.begun = url, server, time.monotonic()
        self.step, self.users = 0, 0
        self.samples: list[Sample] = []
        self.missed = 0

    def run(self) -> None:
        """Take a sample every second until killed; runs in a greenlet of its own."""
        while True:
            began = time.monotonic()
            try:
                self.samples.append(self.look())
            except (urllib.error.URLError, OSError, psutil.Error):
                self.missed += 1
            gevent.sleep(max(0.1, SECONDS - (time.monotonic() - began)))

    def look(self) -> Sample:
        """Take one sample."""
        metrics = read(self.url)
        row = metrics["melt_kv_bytes_per_token"]
        return Sample(
            at=time.monotonic() - self.begun,
            step=self.step,
            users=self.users,
            memory=memory_of(self.server),
            kv_in_use=metrics["vllm:kv_cache_usage_perc"] * metrics["melt_kv_capacity_tokens"] * row,
            kv_looplm=metrics["melt_kv_looplm_bytes"],
            kv_bytes_per_token=row,
            running=metrics["vllm:num_requests_running"],
            waiting=metrics["vllm:num_requests_waiting"],
            generated=metrics["vllm:generation_tokens_total"],
            preemptions=metrics["vllm:num_preemptions_total"],
        )
