"""The long campaign: `make faults`, or `python -m tests.faults --help`. It writes a report, and judges."""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.faults.fuzz import bodies, fields_of_routes
from tests.faults.kills import kill_one
from tests.faults.servers import MODES, Attacked, serving
from tests.faults.storm import settle, storm

REPORT = Path("docs/results/faults.md")
GROWTH = 1.2
"""How much an API process may grow while it refuses bodies and loses clients."""


@dataclass
class Findings:
    """What came out, and what of it must not be.

    Attributes:
        statuses: answers by decode mode, route and status; status 0 is a client that left.
        clients: of the storms, by decode mode and by what became of them.
        memory: MiB of the API process before and after, by decode mode.
        kills: how many, and...
        faults: ...each thing that is wrong, in a line.
    """

    statuses: dict[str, Counter[tuple[str, int]]] = field(default_factory=dict)
    clients: dict[str, Counter[str]] = field(default_factory=dict)
    memory: dict[str, tuple[int, int]] = field(default_factory=dict)
    kills: int = 0
    faults: list[str] = field(default_factory=list)


def main() -> int:
    """Run the campaign; return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--bodies", type=int, default=30_000, help="random bodies, half for each decode mode")
    parser.add_argument("--kills", type=int, default=200, help="servers of which one process is killed under load")
    parser.add_argument("--minutes", type=float, default=60, help="of storms, half for each decode mode")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other bodies and other clients")
    parser.add_argument("--report", type=Path, default=REPORT, help="where the report goes")
    options = parser.parse_args()
    started, findings = time.monotonic(), Findings()
    with tempfile.TemporaryDirectory() as folder:
        for mode in MODES:
            with serving(mode, Path(folder) / f"{mode}.log") as attacked:
                attack(attacked, mode, options, findings)
        for number in range(options.kills):
            findings.kills += 1
            if fault := kill_one(options.seed + number, Path(folder) / "killed.log"):
                findings.faults.append(f"kill {number}: {fault}")
    options.report.write_text(report(options, findings, time.monotonic() - started))
    print(options.report.read_text())
    return bool(findings.faults)


def attack(attacked: Attacked, mode: str, options: argparse.Namespace, findings: Findings) -> None:
    """Send random bodies, then clients of all kinds; note what is wrong."""
    faults, said, before = findings.faults, attacked.says(), attacked.memory()
    statuses = findings.statuses.setdefault(mode, Counter())
    routes = fields_of_routes(json.loads(attacked.get("/openapi.json")))

    @seed(options.seed)
    @settings(
        max_examples=max(1, options.bodies // 2),
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(bodies(routes))
    def send(request: tuple[str, bytes]) -> None:
        path, body = request
        status, text = attacked.post(path, body)
        statuses[path, status] += 1
        if status >= 500:
            faults.append(f"{mode}: {path} {body[:300]!r}: {status} {text[:200]!r}")

    send()
    findings.clients[mode] = storm(attacked, 60 * options.minutes / 2, options.seed)
    if left := settle(attacked):
        faults.append(f"{mode}: after all clients have left, there still are {left}")
    if attacked.says() != said:
        faults.append(f"{mode}: another answer than before")
    if tracebacks := attacked.tracebacks():
        faults.append(f"{mode}: {tracebacks} tracebacks in the log")
    findings.memory[mode] = (before >> 20, (after := attacked.memory()) >> 20)
    if after > GROWTH * before:
        faults.append(f"{mode}: the API process grew from {before >> 20} to {after >> 20} MiB")


def report(options: argparse.Namespace, findings: Findings, seconds: float) -> str:
    """Write down what was done, how it was answered, and the verdict."""
    words = f"--bodies {options.bodies} --kills {options.kills} --minutes {options.minutes:g} --seed {options.seed}"
    lines = [
        "# Faults",
        "",
        f"`python -m tests.faults {words}`, {date.today()}, {seconds / 60:.0f} minutes. What is done is said in "
        "[tests/README.md](../../tests/README.md#faults).",
        "",
        f"**{'Failed' if findings.faults else 'Passed'}**: {len(findings.faults)} faults.",
        "",
        *(f"- {fault}" for fault in findings.faults[:50]),
        *([""] if findings.faults else []),
        "| mode | API process before, MiB | after |",
        "|---|---|---|",
        *(f"| {mode} | {before} | {after} |" for mode, (before, after) in findings.memory.items()),
        "",
        "Answers to random bodies, by route and status (0: the client left after 30 s):",
        "",
        "| mode | route | status | answers |",
        "|---|---|---|---|",
    ]
    for mode, statuses in findings.statuses.items():
        lines += [f"| {mode} | `{path}` | {status} | {count} |" for (path, status), count in sorted(statuses.items())]
    lines += ["", "Clients of the storms:", "", "| mode | client | times |", "|---|---|---|"]
    for mode, clients in findings.clients.items():
        lines += [f"| {mode} | {kind} | {count} |" for kind, count in sorted(clients.items())]
    return "\n".join([*lines, "", f"Processes killed under load: {findings.kills}.", ""])


if __name__ == "__main__":
    sys.exit(main())
