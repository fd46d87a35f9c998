"""`melt-serve chat`: its flags."""

import argparse
import math

from melt_serve.terminal import Subcommands, add_command, fail, server_url

DESCRIPTION = """\
Talk to a model in the terminal. Without --server, a server of its own is started, and stopped at the end.

Reasoning is dimmed. Under each answer: its tokens, tokens a second, the loops that they ran, and how much of
the KV cache the conversation fills. /loops, /effort and /threshold choose how deep the model
thinks from the next question on; /help lists all commands. Ctrl-C stops an answer, and at the prompt the chat.

Where input or output is no terminal, each line is answered in turn, without reasoning. They are one conversation, in
which the same commands work. It ends at the first error."""

EXAMPLES = """\
examples:
  melt-serve chat
      with the bundled checkpoint
  melt-serve chat ./my-melt
      with another one; or OWNER/NAME on the hub
  melt-serve chat --server http://localhost:8000/v1
      with whatever is served there
  OPENAI_API_KEY=... melt-serve chat --server https://example.com/v1 --model some-model
      with a model of somebody else's
  printf '/loops 2\\nFind everybody. Ann is in Rome. Bob is with Ann. Where is Bob?\\n' | melt-serve chat
      one question at two loops, from a script

Exit code: 0 at the end of the chat, 1 after an error that ended it, 2 if there is nothing to start."""


def add_chat(commands: "Subcommands[argparse.ArgumentParser]") -> None:
    """Add `chat` to the commands of `melt-serve`."""
    command = add_command(commands, "chat", "talk to a model in the terminal", DESCRIPTION, EXAMPLES)
    command.set_defaults(run=run)
    add = command.add_argument
    add(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="?",
        help="what to serve: a folder, or OWNER/NAME on the hub (default: the bundled one)",
    )
    add(
        "--server",
        type=server_url,
        metavar="URL",
        help="ask this OpenAI-compatible server instead, such as http://localhost:8000/v1",
    )
    add("--model", metavar="NAME", help="of the server's (default: the first it lists)")
    add(
        "--api-key",
        metavar="KEY",
        help="for the server (default: OPENAI_API_KEY or VLLM_API_KEY, which other users cannot see)",
    )
    add("--temperature", type=temperature, metavar="T", help="0 takes the likeliest token (default: the model's own)")


def run(arguments: argparse.Namespace) -> int:
    """Chat; return the exit code."""
    if arguments.server and arguments.checkpoint:
        return fail("--server names a server that runs, CHECKPOINT one to start: leave one out", code=2)
    if not arguments.server and (arguments.model or arguments.api_key):
        return fail("--model and --api-key go with --server", code=2)
    try:
        from melt_serve import chat
    except ModuleNotFoundError as error:
        return fail(f"{error.name} is not installed: pip install openai prompt_toolkit", code=2)
    if arguments.server:
        return chat.chat_with(arguments.server, arguments.api_key, arguments.model, arguments.temperature)
    return chat.chat_alone(arguments.checkpoint, arguments.temperature)


def temperature(text: str) -> float:
    """Parse a temperature: a number that is not negative."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return value
