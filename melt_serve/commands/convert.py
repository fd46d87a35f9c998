"""`melt-serve convert`: its flags."""

import argparse
from pathlib import Path

from melt_serve.terminal import Subcommands, add_command, fail

DESCRIPTION = """\
Turn an Ouro-format looped checkpoint (safetensors, one file or shards) into a MELT checkpoint.

The weights are verified and copied; a fresh KV gate is added in the same dtype. The new gate is
untrained: post-train the result before you judge its answers. Memory stays near one shard.

With --check nothing is converted: the checkpoint at SRC, a MELT or a LoopLM, is read whole, and the first thing that
keeps it from being served as it is is named."""

EXAMPLES = """\
examples:
  melt-serve convert ./Ouro-1.4B ./melt-1.6B
      the paper's element-wise gate; chunks of 512 tokens, tokens decoded one at a time
  melt-serve convert ./Ouro-1.4B ./melt-64 --chunk-size 64 --decode-mode chunk --max-loops 8
      small chunks, decoded on the same grid they are trained on, run with up to 8 loops
  melt-serve convert --check ./melt-1.6B
      is it whole: config, every tensor and value, token ids, chat template, checksums?
  melt-serve convert ./Ouro-1.4B ./last --gate-type last
      no gate to learn: the row of the last loop stays; the starting point of the ablations"""


def add_convert(commands: "Subcommands[argparse.ArgumentParser]") -> None:
    """Add `convert` to the commands of `melt-serve`. Its flags are named as the parameters of `convert.convert`."""
    command = add_command(commands, "convert", "give an Ouro-format checkpoint MELT's gate", DESCRIPTION, EXAMPLES)
    command.set_defaults(run=run)
    add = command.add_argument
    add(
        "source",
        metavar="SRC",
        help="folder of the Ouro-format checkpoint, or OWNER/NAME[@REVISION] on the hub",
    )
    add("target", metavar="DST", type=Path, nargs="?", help="folder to write; must not exist or be empty")
    add("--check", action="store_true", help="check the checkpoint at SRC, a MELT or a LoopLM, and write nothing")
    add(
        "--gate-type",
        choices=("elementwise", "scalar", "mean", "ema", "last"),
        default="elementwise",
        help="how a token's state is carried from loop to loop (default: elementwise, the paper's)",
    )
    add(
        "--initial-state",
        choices=("input", "zeros"),
        default="input",
        help="the state before loop 1: the first loop's input, or zeros (default: input)",
    )
    add("--chunk-size", type=int, default=512, metavar="C", help="tokens that run their loops together (default: 512)")
    add(
        "--decode-mode",
        choices=("token", "chunk"),
        default="token",
        help="generated tokens are chunks of their own, or fill the grid like a prompt's (default: token)",
    )
    add("--max-loops", type=int, metavar="T", help="the most loops it may be run with (default: the source's)")
    add("--seed", type=int, default=0, help="seed of the fresh gate's weights (default: 0)")
    add("--quiet", dest="show_progress", action="store_false", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Convert, or check, and say what is next; return the exit code."""
    from melt_serve.checkpoint_config import located_looped
    from melt_serve.checkpoint_path import CheckpointError, shown_name
    from melt_serve.convert import convert

    options = {name: value for name, value in vars(arguments).items() if name not in ("run", "check")}
    try:
        if arguments.check:
            return check(located_looped(arguments.source), arguments.target, arguments.show_progress)
        if arguments.target is None:
            return fail("convert needs DST, the folder to write; to check SRC alone, add --check", code=2)
        convert(**{**options, "source": located_looped(arguments.source), "shown_as": shown_name(arguments.source)})
    except CheckpointError as error:
        return fail(error, code=2)
    print(f"Wrote {arguments.target}. The gate is untrained; to serve it: melt-serve serve {arguments.target}")
    return 0


def check(source: Path, target: Path | None, show_progress: bool) -> int:
    """Check the checkpoint and say what was found; return the exit code.

    Raises:
        CheckpointError: it cannot be served as it is.
    """
    from melt_serve.checkpoint_check import check_checkpoint

    if target is not None:
        return fail(f"--check writes nothing: leave out {target}", code=2)
    checked = check_checkpoint(source, show_progress=show_progress)
    if checked is None:
        return fail(
            f"{source} is neither a MELT nor an Ouro-format LoopLM; look at model_type in its config.json", code=2
        )
    sums = f"{checked.compared} checksums match" if checked.compared is not None else "it has no checksums (SHA256SUMS)"
    print(f"{source} is whole: {checked.model_type}, {checked.tensors} tensors, {checked.nbytes / 1e9:.3f} GB; {sums}.")
    return 0
