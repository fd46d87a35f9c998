"""`python -m loadtests SCENARIO`: put load on a server, watch it, and report whether it does what it should."""

# locust comes first: it makes sockets and threads cooperative.
import locust  # noqa: F401  # isort: skip

import argparse
import json
import logging
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import gevent
import psutil
from locust.env import Environment
from locust.runners import LocalRunner
from tqdm import tqdm

from loadtests.report import Run, write
from loadtests.sampler import Sampler
from loadtests.scenarios import SCENARIOS, Options, Scenario, Step
from loadtests.servers import listener, started
from loadtests.users import Asker, MeltUser
from melt_serve.bundled import LOOPLM, MELT
from melt_serve.server_process import ServerError
from melt_serve.terminal import loop_list, positive

WARM_UP_SECONDS = 10
SCARCE = ["--kv-cache-memory-bytes", str(8 << 20), "--max-model-len", "512", "--block-size", "32"]
"""For deep_loops: sixteen requests need a quarter of it as a MELT, and four times as much as a LoopLM of 16 loops."""
PLENTY = ["--kv-cache-memory-bytes", str(64 << 20)]

DESCRIPTION = "Put load on a server on this machine, watch it, and write a report with a verdict."
EPILOG = """\
scenarios:
{scenarios}

examples:
  python -m loadtests deep_loops                       a quarter of an hour; the report is runs/load/deep_loops.html
  python -m loadtests mixed_depth --seconds 20         quicker
  python -m loadtests soak --minutes 120
  python -m loadtests burst --server http://127.0.0.1:8000

Exit code: 0 if every verdict holds, 1 if one does not, 2 if it could not be run. After Ctrl-C the report is of what
there is until then."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a scenario; return the exit code."""
    options = parse(argv)
    scenario = SCENARIOS[options.scenario]
    seconds = 60 * options.minutes if options.minutes else options.seconds or scenario.seconds
    plan = Options(seconds, options.users or scenario.users, options.loops or scenario.loops)
    options.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("locust").setLevel(logging.WARNING)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.default_int_handler)
    runs: list[Run] = []
    code = 0
    try:
        run_all(scenario, plan, options, runs)
    except ServerError as error:
        print(f"loadtests: error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("stopped; the report is of what there is", file=sys.stderr)
        code = 130
    if not any(run.asked for run in runs):
        return code or 2
    path = options.out / f"{options.scenario}.html"
    raw = [{**asdict(run), "asked": [asdict(each) for each in run.asked]} for run in runs]
    path.with_suffix(".json").write_text(json.dumps(raw))
    verdicts = write(path, options.scenario, runs)
    for verdict in verdicts:
        print(f"{'ok    ' if verdict.holds else 'FAILED'}  {verdict.what}: {verdict.found} ({verdict.bound})")
    print(f"report: {path}")
    return code or (0 if all(verdict.holds for verdict in verdicts) else 1)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; end the program where it makes no sense."""
    names = "\n".join(f"  {name:<13} {scenario.about}" for name, scenario in SCENARIOS.items())
    parser = argparse.ArgumentParser(
        "python -m loadtests",
        description=DESCRIPTION,
        epilog=EPILOG.format(scenarios=names),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--users", type=positive, help="concurrent users")
    parser.add_argument("--seconds", type=positive, help="seconds per step")
    parser.add_argument("--minutes", type=positive, help="minutes per step, instead of --seconds")
    parser.add_argument("--loops", type=loop_list, help="depths, for example 1,2,4,8")
    parser.add_argument("--server", help="URL of a server that runs on this machine; without it one is started")
    parser.add_argument("--pid", type=int, help="process id of --server (default: looked up by port)")
    parser.add_argument("--model", default="melt-demo", help="the name it serves (%(default)s)")
    parser.add_argument("--key", default="none", help="its API key")
    parser.add_argument("--no-looplm", action="store_true", help="deep_loops: leave the LoopLM out")
    parser.add_argument("--out", type=Path, default=Path("runs/load"), help="folder of reports and logs (%(default)s)")
    return parser.parse_args(argv)


def run_all(scenario: Scenario, plan: Options, options: argparse.Namespace, runs: list[Run]) -> None:
    """Put the load on every server that the scenario needs, one after the other; add to `runs` as it goes."""
    steps = scenario.steps(plan)
    if options.server:
        server = psutil.Process(options.pid) if options.pid else listener(options.server)
        run_on(options.server, server, options.model, options.key, steps, None, runs)
        return
    deepest = max(plan.loops)
    room = SCARCE if scenario.beside_looplm else PLENTY
    words = [*room, *(["--hf-overrides.max_loops", str(deepest)] if deepest > 8 else [])]
    say(f"a MELT ({MELT.name}) starts")
    with started(words, options.out / "melt.log") as (url, server):
        run_on(url, server, MELT.name, "none", steps, None, runs)
    if not scenario.beside_looplm or options.no_looplm:
        return
    for step in steps:
        (loops,) = step.loops
        say(f"a LoopLM ({LOOPLM.name}) of {loops} loops starts")
        words = [
            str(LOOPLM),
            *room,
            "--served-model-name",
            LOOPLM.name,
            "--enforce-eager",
            "--reasoning-parser",
            "qwen3",
        ]
        words += ["--hf-overrides.total_ut_steps", str(loops)]
        with started(words, options.out / f"looplm-{loops}.log") as (url, server):
            run_on(url, server, LOOPLM.name, "none", [step], loops, runs)


def run_on(
    url: str, server: psutil.Process, model: str, key: str, steps: list[Step], fixed_loops: int | None, runs: list[Run]
) -> None:
    """Put the steps' load on one server; add what is seen to `runs`, also if it is interrupted."""
    environment = Environment(user_classes=[MeltUser])
    runner = environment.create_local_runner()
    MeltUser.asker = asker = Asker(url, model, key, fixed_loops)
    sampler = Sampler(url, server)
    run = Run(model, fixed_loops, steps, [], sampler.samples)
    runs.append(run)
    every_depth = tuple({loops for step in steps for loops in step.loops})
    watching = None
    try:
        last(replace(steps[0], seconds=WARM_UP_SECONDS, loops=every_depth), "warm-up", asker, runner, leave=False)
        asker.step = None
        while asker.open:
            gevent.sleep(0.1)
        asker.begun = sampler.begun = time.monotonic()
        asker.asked = run.asked
        for number, step in enumerate(steps):
            sampler.step, sampler.users = number, step.users
            watching = watching or gevent.spawn(sampler.run)
            depth = ",".join(map(str, sorted(step.loops)))
            last(step, f"step {number + 1} of {len(steps)}: {step.users} users, loops {depth}", asker, runner)
    finally:
        asker.step = None
        runner.stop()
        runner.quit()
        if watching is not None:
            watching.kill()
        run.missed = sampler.missed


def last(step: Step, label: str, asker: Asker, runner: LocalRunner, leave: bool = True) -> None:
    """Keep the step's users asking for as long as the step says."""
    asker.step = step
    runner.start(step.users, spawn_rate=step.users)
    begun = time.monotonic()
    for second in tqdm(range(round(step.seconds)), desc=label, unit="s", leave=leave, disable=None):
        gevent.sleep(max(0, begun + second + 1 - time.monotonic()))


def say(text: str) -> None:
    """Print progress, beside the bars."""
    print(f"{text} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
