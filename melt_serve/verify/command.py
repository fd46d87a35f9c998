"""`melt-serve verify`: its flags, and what it shows and leaves behind."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from melt_serve.bundled import LOOPLM, MELT
from melt_serve.checkpoint_path import CheckpointError, revision_of, shown_name
from melt_serve.server_process import exits_on_signals
from melt_serve.terminal import positive, words_of
from melt_serve.verify.record import Certificate, Check, VerifyError, line, table
from melt_serve.verify.report import markdown

DESCRIPTION = """\
Verify that this machine serves a checkpoint as the reference model computes it.

Checks the checkpoint's files, then starts `melt-serve serve` on the device there is, and checks: how the model runs;
answers and their log-probabilities against the reference model (PyTorch, float32, on the CPU) at several depths; in
chats, that answers end at the end marks, reasoning is apart from them, and efforts change loops and not the prompt;
the same requests alone, together, from the prefix cache and preempted; usage.loops, wrong depths; memory as planned;
on a GPU, that no step waits for the device. Of a MELT then the other decode mode, the LoopLM, and tokens a second
against it."""

EXAMPLES = """\
examples:
  melt-serve verify
      the bundled checkpoints, in full
  melt-serve verify --quick
      one server, no speed; a minute or so on 2 CPU cores
  melt-serve verify ./melt-1.6B --looplm ./Ouro-1.4B --text prompts.txt --json h100.json
      a checkpoint of your own, and a file to attach to an issue
  melt-serve verify ByteDance/Ouro-1.4B-Thinking --answer-tokens 4096 --json ouro.json
      a LoopLM from the hub, whose answers take as long
  melt-serve verify ./melt-1.6B --modes token -- --tensor-parallel-size 2
      one decode mode; words after -- are flags for the server
  melt-serve verify --report h100.json l40s.json
      show such files as one table, in Markdown

Exit code: 0 if nothing failed, 1 if something did, 2 if it cannot be verified."""


def main(argv: Sequence[str]) -> int:
    """Verify, or show files of verifications; return the exit code."""
    cut = list(argv).index("--") if "--" in argv else len(argv)
    arguments = parser().parse_args(argv[:cut])
    try:
        if arguments.report:
            if len(argv) > 1 + len(arguments.report):
                raise VerifyError("--report goes with files alone")
            print(markdown([Certificate.read(path) for path in arguments.report]))
            return 0
        return verify(arguments, argv[cut + 1 :], f"melt-serve verify {shlex.join(argv)}".strip())
    except (CheckpointError, VerifyError) as error:
        print("melt-serve verify: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """Return the parser of all words before `--`."""
    raw = argparse.RawDescriptionHelpFormatter
    command = argparse.ArgumentParser(
        "melt-serve verify",
        usage="melt-serve verify [CHECKPOINT] [flags] [-- flags of the server]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    add = command.add_argument
    add(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="?",
        help="folder, or OWNER/NAME on the hub (default: the bundled)",
    )
    add("--looplm", metavar="CHECKPOINT", help="a LoopLM to check beside it (default: the bundled MELT's)")
    add("--reference", metavar="CHECKPOINT", help="what the reference model reads (default: CHECKPOINT)")
    add("--modes", type=words_of("token", "chunk"), metavar="MODE,MODE", help="decode modes of a MELT (default: both)")
    add("--text", type=Path, metavar="FILE", help="text that prompts are cut out of (default: the bundled task's)")
    add(
        "--prompts",
        type=positive,
        metavar="N",
        help="how many the reference answers, too, at the default depth (default: 20; with --quick 3)",
    )
    add("--answer-tokens", type=positive, default=128, metavar="N", help="the most of a chat's answer (default: 128)")
    add("--quick", action="store_true", help="the checkpoint's own decode mode only, less of it, and no speed")
    add("--json", type=Path, metavar="FILE", help="also write all of it to a file")
    add("--report", type=Path, nargs="+", metavar="FILE", help="verify nothing; show such files as a table")
    return command


def verify(arguments: argparse.Namespace, words: Sequence[str], command: str) -> int:
    """Make all checks, show each as it is made and all in the end; return the exit code.

    Raises:
        CheckpointError: a checkpoint cannot be had.
        VerifyError: what was asked for cannot be verified.
    """
    if arguments.json and not arguments.json.parent.is_dir():
        raise VerifyError(f"--json {arguments.json}: {arguments.json.parent} is not a folder")
    text = read_text(arguments.text)
    try:
        from melt_serve.checkpoint_config import located_looped
        from melt_serve.verify import certify, start
    except ModuleNotFoundError as error:
        raise VerifyError(f"{error.name} is not installed: install vLLM, as the README says") from None

    named = (arguments.checkpoint, arguments.looplm, arguments.reference)
    given, other, reference = (None if each is None else located_looped(each) for each in named)
    checkpoint = given or MELT
    looplm = other or (LOOPLM if checkpoint == MELT and not arguments.quick else None)
    options = certify.Options(
        checkpoint,
        looplm,
        reference,
        arguments.modes,
        text,
        arguments.prompts,
        arguments.answer_tokens,
        arguments.quick,
        list(words),
    )
    found = certify.targets(options)
    made: list[Check] = []
    try:
        with exits_on_signals(), closing(certify.checks(options, found, certify.show_start)) as checks:
            for check in checks:
                made.append(check)
                print(("\r" if sys.stdout.isatty() else "") + line(check), flush=True)
    except (KeyboardInterrupt, SystemExit):
        shown = f"\n{table(made)}" if made else ""
        print(f"{shown}\n\nStopped before the end: {len(made)} checks were made, the server is stopped.", flush=True)
        raise
    kind = next((str(check.numbers["device"]) for check in made if "device" in check.numbers), "")
    date = datetime.now(UTC).date().isoformat()
    name = start.device_name(kind)
    certificate = Certificate(
        command,
        date,
        name,
        kind,
        start.versions(),
        shown_name(arguments.checkpoint or str(MELT)).partition("@")[0],
        made,
        revision=revision_of(checkpoint),
    )
    print(f"\n{certificate.device}, {certificate.named}, {date}\n\n{table(made)}\n\n{certificate.counts}")
    if arguments.json:
        certificate.write(arguments.json)
    return 0 if certificate.passed else 1


def read_text(path: Path | None) -> str | None:
    """Read the text that prompts are made of.

    Raises:
        VerifyError: it cannot be read.
    """
    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise VerifyError(f"--text {path}: {error}") from None
