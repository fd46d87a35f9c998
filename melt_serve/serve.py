"""`melt-serve serve`: vLLM's own OpenAI-compatible server, with good defaults and nothing in between."""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from melt_serve.bundled import MELT

HELP = f"""\
usage: melt-serve serve [PATH] [any flag of vLLM's server]

Start vLLM's OpenAI-compatible server on a MELT checkpoint. PATH is a folder or a model's name;
without it the bundled demo checkpoint is served as "{MELT.name}", with its parsers for
reasoning and tool calls switched on. Every flag goes to vLLM as it is; these matter for MELT
(--default-loops N is ours, and short for --hf-overrides.total_ut_steps N):

  --default-loops N                        loops of requests that ask for none, from 1 to the checkpoint's max_loops
  --hf-overrides '{{"effort_loops": {{"low": 1}}}}'   what OpenAI's reasoning_effort means in loops
  --max-num-batched-tokens N               tokens a step; at least the checkpoint's chunk_size
  --kv-cache-memory-bytes N                memory for the KV cache, for example 4G
  --port N, --api-key KEY                  where to listen, and who may ask
  --help=all                               every flag of vLLM's server

examples:
  melt-serve serve
  melt-serve serve --default-loops 2
  melt-serve serve ./melt-1.6B --port 8000 --dtype bfloat16
"""

# The demo checkpoint is tiny: compiling it would take longer than all it will ever compute, and where
# JSON may hold any white space, it likes to write nothing else.
BUNDLED_DEFAULTS = {
    "--served-model-name": MELT.name,
    "--kv-cache-memory-bytes": str(256 << 20),
    "--reasoning-parser": "qwen3",
    "--enable-auto-tool-choice": None,
    "--tool-call-parser": "hermes",
    "--structured-outputs-config": '{"backend": "xgrammar", "disable_any_whitespace": true}',
    "--enforce-eager": None,
}


def main(argv: Sequence[str]) -> int:
    """Become vLLM's server; signals, output and exit code are its own. Returns only without one."""
    if any(word in ("-h", "--help") for word in argv):
        print(HELP, end="")
        return 0
    try:
        words = command(argv)
    except ValueError as error:
        print(f"melt-serve: error: {error}", file=sys.stderr)
        return 2
    os.environ.setdefault("VLLM_PLUGINS", ",".join(plugins()))
    os.execv(words[0], words)


def plugins() -> list[str]:
    """Every plugin that vLLM would load by itself, and our own routes: those it loads only where they are named."""
    groups = ("general", "platform", "io_processor", "stat_logger")
    return sorted({point.name for group in groups for point in entry_points(group=f"vllm.{group}_plugins")})


def command(argv: Sequence[str]) -> list[str]:
    """The command line that starts vLLM's server.

    Args:
        argv: `[PATH] [flags]`, as after `melt-serve serve`.

    Raises:
        ValueError: PATH is a folder without a checkpoint, names a path that does not exist, or does not come first.
    """
    words = list(argv)
    model = words.pop(0) if words and not words[0].startswith("-") else None
    if model is not None:
        check_path(model)
    elif words and (Path(words[-1]) / "config.json").is_file() and words[-2:-1] != ["--model"]:
        raise ValueError(f"{words[-1]} must come before the flags: melt-serve serve {words[-1]} ...")
    # A module of vLLM's, not its `vllm` command: that one does not start with the CPU build.
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    if model is None and not any(names(words, flag) for flag in ("--model", "--config")) and "--help=all" not in words:
        server += ["--model", str(MELT)]
        for flag, value in BUNDLED_DEFAULTS.items():
            if not names(words, flag):
                server += [flag] if value is None else [flag, value]
    elif model is not None:
        server += ["--model", model]
    return server + [with_vllms_name(word) for word in words]


def with_vllms_name(word: str) -> str:
    """The one flag of ours, as vLLM knows it."""
    flag, equals, value = word.partition("=")
    return f"--hf-overrides.total_ut_steps{equals}{value}" if flag == "--default-loops" else word


def check_path(model: str) -> None:
    """Refuse at once what vLLM would take half a minute to refuse."""
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{model} has no config.json: name the folder of a checkpoint")
    if not path.exists() and (path.is_absolute() or model.startswith((".", "~"))):
        raise ValueError(f"{model} does not exist: name a checkpoint's folder, or leave it out for the bundled one")


def names(words: Sequence[str], flag: str) -> bool:
    """Whether the user's words set this flag, in any of the ways vLLM's parser takes it."""
    spellings = (flag, flag.replace("--", "--no-", 1))
    return any(word.split("=")[0].replace("_", "-") in spellings for word in words)
