"""`melt-serve bench`: its measurements, each a subcommand, and what each leaves behind."""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from melt_serve.bench import depth, kernels, memory, reference, scheduler, speculation, throughput
from melt_serve.bench.engine import BenchError
from melt_serve.bench.options import add_flags, options_from
from melt_serve.bench.report import refuse_plot
from melt_serve.terminal import Subcommands, add_command, fail, print_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Measurement(Protocol):
    """What a file offers to be a subcommand of `bench`. What it measures is a dataclass, or a list of them."""

    HELP: str
    DESCRIPTION: str
    EXAMPLES: str
    Options: type[Any]

    def measure(self, options: Any, /) -> Any:
        """Measure what the options say."""

    def table(self, measured: Any, /) -> str:
        """Show what was measured, and the goals."""

    def figure(self, measured: Any, /) -> "Figure":
        """Draw what was measured."""


MEASUREMENTS: Mapping[str, Measurement] = {
    "memory": memory,
    "throughput": throughput,
    "depth": depth,
    "speculation": speculation,
    "scheduler": scheduler,
    "kernels": kernels,
    "reference": reference,
}


def add_bench(commands: "Subcommands[argparse.ArgumentParser]") -> None:
    """Add `bench` to the commands of `melt-serve`."""
    bench = commands.add_parser("bench", help="measure MELT on real engines, against LoopLM and by depth")
    benches = bench.add_subparsers(metavar="WHAT", required=True)
    for name, measurement in MEASUREMENTS.items():
        command = add_command(benches, name, measurement.HELP, measurement.DESCRIPTION, measurement.EXAMPLES)
        command.set_defaults(run=partial(run, measurement))
        add_flags(command, measurement.Options)
        command.add_argument("--plot", type=Path, metavar="FILE", help="also draw it, as .png, .svg or .pdf")
        command.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(measurement: Measurement, arguments: argparse.Namespace) -> int:
    """Measure, then show it in every way that was asked for; return the exit code."""
    from melt_serve.device import DeviceError

    try:
        if arguments.plot:
            refuse_plot(arguments.plot)
        measured = measurement.measure(options_from(arguments, measurement.Options))
    except (BenchError, DeviceError) as error:
        return fail(error)
    print(measurement.table(measured))
    if arguments.plot:
        measurement.figure(measured).savefig(arguments.plot, dpi=150)
    if arguments.json:
        print_json(measured)
    return 0
