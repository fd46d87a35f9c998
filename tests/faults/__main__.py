"""The long campaign: `make faults`, or `python -m tests.faults --help`. It judges, and writes a report.

It takes hours. What is done is kept, a decode mode or a kill at a time: after Ctrl-C, the same command goes on.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from melt_serve.train.atomic import replacing
from tests.faults.fuzz import bodies, fields_of_routes
from tests.faults.kills import kill_all
from tests.faults.servers import MODES, Attacked, serving
from tests.faults.storm import settle, storm

REPORT = Path("docs/results/faults.md")
KEPT = Path("runs/faults.json")
GROWTH = 1.2
"""How much an API process may grow while it refuses bodies and loses clients."""


@dataclass
class Findings:
    """What came out, and what of it must not be.

    Attributes:
        words: the options that it came out for.
        statuses: answers by decode mode, and by status and route; status 0 is a client that left.
        clients: of the storms, by decode mode and by what became of them.
        memory: MiB of the API process before and after, by decode mode. A mode that is here is done.
        kills: how many, and...
        faults: ...each thing that is wrong, in a line.
        seconds: that it took, in all sittings.
        sittings: how often the command was run for it.
    """

    words: str
    statuses: dict[str, dict[str, int]] = field(default_factory=dict)
    clients: dict[str, dict[str, int]] = field(default_factory=dict)
    memory: dict[str, tuple[int, int]] = field(default_factory=dict)
    kills: int = 0
    faults: list[str] = field(default_factory=list)
    seconds: float = 0
    sittings: int = 0

    @classmethod
    def load(cls, words: str) -> "Findings":
        """Return what earlier sittings with these options left unfinished, or nothing yet."""
        kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        return cls(**kept) if kept.get("words") == words else cls(words)

    def keep(self, started: float) -> float:
        """Write to the file what was found, with the seconds since `started`; return the time."""
        now = time.monotonic()
        self.seconds += now - started
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        with replacing(KEPT) as part:
            part.write_text(json.dumps(asdict(self)))
        return now


def main() -> int:
    """Run the campaign; return 1 if anything is wrong, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--bodies", type=int, default=30_000, help="random bodies, half for each decode mode")
    parser.add_argument("--kills", type=int, default=200, help="servers of which one process is killed under load")
    parser.add_argument("--minutes", type=float, default=60, help="of storms, half for each decode mode")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other bodies and other clients")
    parser.add_argument("--report", type=Path, default=REPORT, help="where the report goes")
    options = parser.parse_args()
    findings = Findings.load(
        f"--bodies {options.bodies} --kills {options.kills} --minutes {options.minutes:g} --seed {options.seed}"
    )
    findings.sittings += 1
    try:
        run(options, findings)
    except KeyboardInterrupt:
        done = f"{' and '.join(findings.memory) or 'no'} mode and {findings.kills} of {options.kills} kills"
        print(f"\n{KEPT} has what is done, {done}; the same command goes on", file=sys.stderr)
        return 130
    options.report.write_text(report(findings))
    print(options.report.read_text())
    KEPT.unlink()
    return bool(findings.faults)


def run(options: argparse.Namespace, findings: Findings) -> None:
    """Do what has not been done."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for mode in (each for each in MODES if each not in findings.memory):
            print(
                f"{mode} mode: {options.bodies // 2} bodies, then {options.minutes / 2:g} minutes of storm", flush=True
            )
            with serving(mode, Path(folder) / f"{mode}.log") as attacked:
                attack(attacked, mode, options, findings)
            started = findings.keep(started)
        for fault in kill_all(range(options.seed + findings.kills, options.seed + options.kills), Path(folder)):
            if fault:
                findings.faults.append(f"kill {findings.kills}: {fault}")
            findings.kills += 1
            print(f"\rkill {findings.kills} of {options.kills}, {len(findings.faults)} faults", end="", flush=True)
            started = findings.keep(started)
    print()


def attack(attacked: Attacked, mode: str, options: argparse.Namespace, findings: Findings) -> None:
    """Send random bodies, then clients of all kinds; note what is wrong."""
    faults: list[str] = []
    statuses: Counter[str] = Counter()
    said, before = attacked.says(), attacked.memory()
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
        statuses[f"{status} {path}"] += 1
        if status >= 500:
            faults.append(f"{mode}: {path} {body[:300]!r}: {status} {text[:200]!r}")

    send()
    clients = storm(attacked, 60 * options.minutes / 2, options.seed)
    faults += [f"{mode}: {count} times a client: {how}" for how, count in clients.items() if ": 5" in how]
    if left := settle(attacked):
        faults.append(f"{mode}: after all clients have left, there still are {left}")
    if attacked.says() != said:
        faults.append(f"{mode}: another answer than before")
    if tracebacks := attacked.tracebacks():
        faults.append(f"{mode}: {tracebacks} tracebacks in the log")
    after = attacked.memory()
    if after > GROWTH * before:
        faults.append(f"{mode}: the API process grew from {before >> 20} to {after >> 20} MiB")
    findings.statuses[mode], findings.clients[mode] = dict(statuses), dict(clients)
    findings.memory[mode] = (before >> 20, after >> 20)
    findings.faults += faults


def report(findings: Findings) -> str:
    """Write down what was done, how it was answered, and the verdict."""
    sittings = f" in {findings.sittings} sittings" if findings.sittings > 1 else ""
    lines = [
        "# Faults",
        "",
        f"`python -m tests.faults {findings.words}`, {date.today()}, {findings.seconds / 60:.0f} minutes{sittings}. "
        "What is done is said in [tests/README.md](../../tests/README.md#faults).",
        "",
        f"**{'Failed' if findings.faults else 'Passed'}**: {len(findings.faults)} faults.",
        "",
        *(f"- {fault}" for fault in findings.faults[:50]),
        *([""] if findings.faults else []),
        "| mode | API process before, MiB | after |",
        "|---|---|---|",
        *(f"| {mode} | {before} | {after} |" for mode, (before, after) in findings.memory.items()),
        "",
        "Answers to random bodies, by status and route (0: the client left after 30 s):",
        "",
        "| mode | status and route | answers |",
        "|---|---|---|",
    ]
    for mode, statuses in findings.statuses.items():
        lines += [f"| {mode} | `{which}` | {count} |" for which, count in sorted(statuses.items())]
    lines += ["", "Clients of the storms:", "", "| mode | client | times |", "|---|---|---|"]
    for mode, clients in findings.clients.items():
        lines += [f"| {mode} | {kind} | {count} |" for kind, count in sorted(clients.items())]
    return "\n".join([*lines, "", f"Processes killed under load: {findings.kills}.", ""])


if __name__ == "__main__":
    sys.exit(main())
