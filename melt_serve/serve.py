"""`melt-serve serve`: vLLM's own OpenAI-compatible server, with good defaults and nothing in between."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from melt_serve.answers import END_THINK, THINK
from melt_serve.bundled import MELT
from melt_serve.checkpoint_path import CONFIG, WHOLE, is_there, located
from melt_serve.cpu_start import choose, flags_of_processor, free_memory, threads
from melt_serve.start_checks import KV_SPACE, check_start, on_cpu, value_of
from melt_serve.start_failures import explain

HELP = f"""\
usage: melt-serve serve [PATH] [any flag of vLLM's server]

Start vLLM's OpenAI-compatible server on a MELT or LoopLM checkpoint. PATH is a folder, or a name
on the hub, OWNER/NAME[@REVISION]; without it the bundled demo checkpoint is served as
"{MELT.name}", with its parsers for reasoning and tool calls switched on. Every flag goes to vLLM as
it is; these matter for looped models (those marked * are ours):

* --default-loops N                        loops of requests that ask for none, from 1 to the checkpoint's max_loops
* --max-loops N                            the most that a request may ask for; a LoopLM's cache must hold one such
* --draft-tokens N, --draft-loops K        verify N tokens at a time that the first K loops have guessed; on a CPU, not
                                           in token mode (K: a quarter of the checkpoint's loops)
  --hf-overrides '{{"effort_loops": {{"low": 1}}}}'   what OpenAI's reasoning_effort means in loops
  --max-num-batched-tokens N               tokens a step; at least the checkpoint's chunk_size
  --kv-cache-memory-bytes N                memory for the KV cache, for example 4G
  --host 0.0.0.0, --port N                 where to listen; without --host (or MELT_HOST), on this machine only
  --api-key KEY                            who may ask; better by the environment, as VLLM_API_KEY
  --allowed-origins '["https://a.org"]'    whose web pages may ask; by default no other server's
* --max-body-bytes N                       of a request, 4194304 by default; larger ones get a 413
* --body-timeout S, --request-timeout S    seconds for a request to arrive (30), for its answer to be taken (600)
* --max-header-bytes N, --header-timeout S of a request's headers (32768), seconds for them to arrive (10)
* --max-connections N                      open at a time (4096)
* --max-n N                                answers to one prompt, OpenAI's n (128)
* --max-items N                            prompts times n of a request; messages, tools, stop strings (2048)
* --allowed-hosts a.org,b.org              more names for a server on this machine without a key; * for any
* --step-timeout S                         seconds without a step, requests waiting, until /melt/ready says 503 (60)
  --shutdown-timeout S                     seconds that running requests have to end after SIGTERM or Ctrl-C (30)
* --skip-checks                            start at once, without a look at port, limits and checkpoint
  --help=all                               every flag of vLLM's server

examples:
  melt-serve serve
  melt-serve serve --default-loops 2
  melt-serve serve ByteDance/Ouro-1.4B-Thinking
  melt-serve serve ./melt-1.6B --port 8000 --dtype bfloat16
"""

# vLLM listens on all addresses and aborts running requests when it is told to stop. The guard of ours writes a line for
# each request, with its id. How many tokens of a prompt the prefix cache had is told.
SAFE_DEFAULTS: dict[str, str | None] = {
    "--host": os.environ.get("MELT_HOST", "127.0.0.1"),  # in a container, that is nobody
    "--shutdown-timeout": "30",
    "--disable-uvicorn-access-log": None,
    "--enable-prompt-tokens-details": None,
}

SKIP_CHECKS = "--skip-checks"
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY = 4 << 20
"""Bytes of it that vLLM's processes need to talk to each other."""

# Flags of ours that reach the API server (api/limits.py, api/health.py), and --max-n vLLM, by the environment.
LIMITS: dict[str, tuple[str, type[int] | type[float] | type[str]]] = {
    "--max-body-bytes": ("MELT_MAX_BODY_BYTES", int),
    "--max-items": ("MELT_MAX_ITEMS", int),
    "--body-timeout": ("MELT_BODY_TIMEOUT", float),
    "--request-timeout": ("MELT_REQUEST_TIMEOUT", float),
    "--step-timeout": ("MELT_STEP_TIMEOUT", float),
    "--max-header-bytes": ("MELT_MAX_HEADER_BYTES", int),
    "--header-timeout": ("MELT_HEADER_TIMEOUT", float),
    "--max-connections": ("MELT_MAX_CONNECTIONS", int),
    "--max-n": ("VLLM_MAX_N_SEQUENCES", int),
    "--allowed-hosts": ("MELT_ALLOWED_HOSTS", str),
}
DEFAULT_MAX_N = "128"
"""OpenAI's own; vLLM's is 16,384, which holds the server for half a minute."""

KEEP_ALIVE = "20"
"""Seconds that an idle connection is kept. vLLM's 5 are also those after which many clients give theirs up: such a one
could use a connection at the moment in which it is closed."""

DRAFTER = "melt_serve.engine.depth_drafts.DepthDrafter"
"""The name by which vLLM finds what drafts by depth."""

NAMES = {
    "--default-loops": "--hf-overrides.total_ut_steps",
    "--max-loops": "--hf-overrides.max_loops",
    "--draft-tokens": "--speculative-config.num_speculative_tokens",
    "--draft-loops": "--additional-config.draft_loops",
}
"""Flags of ours that vLLM knows by another name."""

# The demo checkpoint is tiny: compiling it would take longer than all it will ever compute, and where
# JSON may hold any white space, it likes to write nothing else.
BUNDLED_DEFAULTS: dict[str, str | None] = {
    "--served-model-name": MELT.name,
    "--kv-cache-memory-bytes": str(256 << 20),
    "--reasoning-parser": "qwen3",
    "--enable-auto-tool-choice": None,
    "--tool-call-parser": "hermes",
    "--structured-outputs-config": '{"backend": "xgrammar", "disable_any_whitespace": true}',
    "--enforce-eager": None,
}


def main(argv: Sequence[str]) -> int:
    """Run vLLM's server, and return its exit code."""
    if any(word in ("-h", "--help") for word in argv):
        print(HELP, end="")
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):  # until the supervisor has its own; a container's first process
        if signal.getsignal(number) is signal.SIG_DFL:  # has none to end it
            signal.signal(number, lambda signum, _: sys.exit(128 + signum))
    try:
        check_shared_memory()
        limits, words = take_limits(argv)
        checked = SKIP_CHECKS not in words and "--help=all" not in words
        words = command([word for word in words if word != SKIP_CHECKS])
        chosen_words, says = chosen_for_cpu(words) if on_cpu() else ([], [])
        words += chosen_words
        if checked:
            check_start(words, os.environ)
    except ValueError as error:
        print(f"melt-serve: error: {error}", file=sys.stderr)
        return 2
    if says:
        print(f"melt-serve: on this CPU: {'; '.join(says)}", file=sys.stderr)
    from melt_serve.supervisor import supervise  # needs what comes with vLLM

    defaults = {
        "VLLM_PLUGINS": ",".join(plugins()),
        "VLLM_MAX_N_SEQUENCES": DEFAULT_MAX_N,
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": KEEP_ALIVE,
    }
    chosen = {name: os.environ.get(name, value) for name, value in defaults.items()}
    chosen |= threads(os.environ) if on_cpu() else {}
    return supervise(words, {**chosen, **limits}, explain)


def chosen_for_cpu(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the flags that a looped model is served with on this CPU beside the user's, and what they mean.

    Raises:
        StartError: no context fits.
    """
    folder = Path(value_of(words, "--model") or "")
    if names(words, "--config") or not looped(folder):
        return [], []
    flags, says = choose(folder, words, os.environ, free_memory(), flags_of_processor())
    chosen = [(flag, value) for flag, value in flags.items() if not names(words, flag)]
    return [word for flag, value in chosen for word in ((flag,) if value is None else (flag, value))], says


def plugins() -> list[str]:
    """Return the plugins that vLLM would load by itself, and our routes, which it loads only where they are named."""
    groups = ("general", "platform", "io_processor", "stat_logger")
    return sorted({point.name for group in groups for point in entry_points(group=f"vllm.{group}_plugins")})


def take_limits(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the environment that our own limits make, set by flags or already there, and all other words.

    Raises:
        ValueError: a limit is no positive number.
    """
    limits = {variable: os.environ[variable] for variable, _ in LIMITS.values() if variable in os.environ}
    others: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in LIMITS:
            limits[LIMITS[flag][0]] = value if equals else next(words, "")
        else:
            others.append(word)
    for flag, (variable, number) in LIMITS.items():
        try:
            positive = number is str or float(number(limits.get(variable, "1"))) > 0
        except ValueError:
            positive = False
        if not positive:
            raise ValueError(f"{flag} ({variable}) must be a positive number, got {limits[variable]!r}")
    return limits, others


def command(argv: Sequence[str]) -> list[str]:
    """Return the command line that starts vLLM's server.

    Args:
        argv: `[PATH] [flags]`, as after `melt-serve serve`.

    Raises:
        ValueError: PATH names a path that does not exist, or does not come first; the size of the KV cache is said
            twice; or drafts have loops and no number.
    """
    words = list(argv)
    model = words.pop(0) if words and not words[0].startswith("-") else None
    name = None
    if model is not None:
        name, model = on_hub(model, words)
    if model is not None:
        check_path(model)
    elif words and os.path.isfile(Path(words[-1]) / "config.json") and words[-2:-1] != ["--model"]:
        raise ValueError(f"{words[-1]} must come before the flags: melt-serve serve {words[-1]} ...")
    server = [sys.executable, "-m", "melt_serve.api.server"]
    defaults = {} if names(words, "--config") else dict(SAFE_DEFAULTS)  # the file may say otherwise
    if model is None and not any(names(words, flag) for flag in ("--model", "--config")) and "--help=all" not in words:
        server += ["--model", str(MELT)]
        defaults |= BUNDLED_DEFAULTS
    elif model is not None:
        server += ["--model", model]
    elif named := value_of(words, "--model"):
        check_path(named)
    if os.environ.get(KV_SPACE):
        if names(words, "--kv-cache-memory-bytes"):
            raise ValueError(f"on a CPU {KV_SPACE} overrides --kv-cache-memory-bytes: unset the variable")
        defaults.pop("--kv-cache-memory-bytes", None)
    if name is not None:
        defaults["--served-model-name"] = name
    if names(words, "--draft-tokens"):
        defaults["--speculative-config.model"] = DRAFTER
    elif names(words, "--draft-loops"):
        raise ValueError("--draft-loops is of use beside --draft-tokens only: say how many tokens to draft")
    if model is not None and thinks(Path(model)):
        defaults["--reasoning-parser"] = "loops"
    for flag, value in defaults.items():
        if not names(words, flag):
            server += [flag] if value is None else [flag, value]
    return server + [with_vllms_name(word) for word in words]


def on_hub(model: str, words: Sequence[str]) -> tuple[str | None, str]:
    """Return a looped model's name on the hub and the folder it was fetched to; of all else None and what it was.

    Other models are vLLM's to fetch, and so are all with `--download-dir`, `--hf-token` or a `--load-format`.

    Raises:
        CheckpointError: it cannot be fetched.
    """
    theirs = any(names(words, flag) for flag in ("--download-dir", "--hf-token", "--load-format"))
    if is_there(model) or theirs or os.environ.get("VLLM_USE_MODELSCOPE"):
        return None, model
    revision = value_of(words, "--revision")
    folder = located(model, CONFIG, revision)
    if folder == Path(model) or not looped(folder):
        return None, model
    return model.partition("@")[0], str(located(model, WHOLE, revision))


def looped(checkpoint: Path) -> bool:
    """Return whether a folder's config is a looped model's."""
    try:
        return json.loads((checkpoint / "config.json").read_text())["model_type"] in ("melt", "ouro")
    except (OSError, ValueError, LookupError, TypeError):  # vLLM will say what is wrong with it
        return False


def thinks(checkpoint: Path) -> bool:
    """Return whether a folder holds a looped model whose tokenizer has tags for reasoning, as Ouro's do."""
    try:
        return looped(checkpoint) and {THINK, END_THINK} <= {
            token["content"] for token in json.loads((checkpoint / "tokenizer.json").read_text())["added_tokens"]
        }
    except (OSError, ValueError, LookupError, TypeError):  # vLLM will say what is wrong with it
        return False


def with_vllms_name(word: str) -> str:
    """Return the word, with a flag of `NAMES` turned into the one that vLLM knows."""
    flag, equals, value = word.partition("=")
    return f"{NAMES.get(flag, flag)}{equals}{value}"


def check_shared_memory() -> None:
    """Refuse at once a machine whose shared memory is full, or too small.

    Raises:
        ValueError: less than `LEAST_SHARED_MEMORY` is free.
    """
    if SHARED_MEMORY.is_dir() and (free := shutil.disk_usage(SHARED_MEMORY).free) < LEAST_SHARED_MEMORY:
        raise ValueError(
            f"{SHARED_MEMORY} has {free >> 10} KiB free, and vLLM needs {LEAST_SHARED_MEMORY >> 10}: empty it, or "
            "give the container more (docker run --shm-size=64m)"
        )


def check_path(model: str) -> None:
    """Refuse at once what vLLM would take half a minute to refuse.

    Raises:
        ValueError: the path does not exist, or has weights that may not be read.
    """
    path, there = Path(model), is_there(model)
    for weights in path.glob("*.safetensors"):
        if not os.access(weights, os.R_OK):
            raise ValueError(f"{weights} may not be read by user {os.getuid()}: chmod a+r {weights.name}")
    if not there and (path.is_absolute() or model.startswith((".", "~"))):
        raise ValueError(f"{model} does not exist: name a checkpoint's folder, or leave it out for the bundled one")


def names(words: Sequence[str], flag: str) -> bool:
    """Return whether the user's words set this flag, in any of the ways vLLM's parser takes it."""
    spellings = (flag, flag.replace("--", "--no-", 1))
    return any(word.split("=")[0].replace("_", "-") in spellings for word in words)
