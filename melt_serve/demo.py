"""`melt-serve demo`: start the server on the bundled checkpoint, ask it questions, show its depths and its cache."""

import argparse
import json
import re
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING

from melt_serve.bundled import MELT
from melt_serve.serve import command
from melt_serve.server_process import ServerError, own_server, tail
from melt_serve.task.who_is_where import SILENT_STEPS, Question, questions

if TYPE_CHECKING:
    from openai import OpenAI

SEED = 2026
PASS_SHARE = 0.9


class DemoError(RuntimeError):
    """A demo that could not be shown; the message says why."""


def main(argv: Sequence[str]) -> int:
    """Run the demo; return 0 if at least nine of ten answers are right, 1 otherwise."""
    parser = argparse.ArgumentParser(
        "melt-serve demo",
        description="Serve the bundled MELT checkpoint with vLLM on a free local port, ask it held-out questions "
        "through the OpenAI client, one of them with more and more loops, and compare its KV cache with a LoopLM's. "
        "Ends with exit code 1 if fewer than nine answers of ten are right.",
    )
    parser.add_argument("--questions", type=int, default=10, metavar="N", help="how many to ask (default: 10)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args(argv)
    if arguments.questions < 1:
        parser.error(f"--questions must be at least 1, not {arguments.questions}")
    try:
        with server() as url:
            correct = ask(url, list(islice(questions("heldout", SEED), arguments.questions)))
            deepen(url)
            melt, looplm = kv_costs(url)
    except DemoError as error:
        print(f"melt-serve demo: {error}", file=sys.stderr)
        return 1
    show_costs(melt, looplm)
    enough = correct >= PASS_SHARE * arguments.questions
    print(f"\n{correct} of {arguments.questions} answers right" + ("." if enough else ": too few."))
    if arguments.json:
        result = {"questions": arguments.questions, "correct": correct, "kv_bytes_per_token": melt}
        print(json.dumps({**result, "looplm_kv_bytes_per_token": looplm}))
    return 0 if enough else 1


@contextmanager
def server() -> Iterator[str]:
    """Yield the URL of vLLM's server on the bundled checkpoint, and stop it however the demo ends.

    Raises:
        DemoError: it did not start, or stopped to answer; with the last lines it wrote.
    """
    from openai import OpenAIError

    def words(port: int) -> list[str]:
        return command(["--host", "127.0.0.1", "--port", str(port)])

    try:
        with own_server(words, "the bundled checkpoint", sys.stdout) as server:
            try:
                yield server.url
            except (OpenAIError, OSError) as error:
                raise DemoError(f"the server failed: {error}; its last lines:\n{tail(server.log)}") from None
    except ServerError as error:
        raise DemoError(str(error)) from None


def ask(url: str, asked: Sequence[Question]) -> int:
    """Ask every question through the OpenAI client, the first one streamed; return how many were right."""
    client, model = connect(url)
    correct = 0
    for number, question in enumerate(asked, start=1):
        print(f"{number:2}. {question.prompt}")
        print("    -> ", end="", flush=True)
        reply = stream(client, model, question) if number == 1 else complete(client, model, question)
        right = question.check(reply)
        correct += right
        print("   right" if right else f"   wrong, it is: {question.answer}", flush=True)
    return correct


def connect(url: str) -> tuple["OpenAI", str]:
    """Return a client of the server and the name of its model."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    return client, client.models.list().data[0].id


def stream(client: "OpenAI", model: str, question: Question) -> str:
    """Ask with streaming, show reasoning and answer as they come, and return the answer."""
    reply, thinking = "", False
    for chunk in client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question.prompt}], temperature=0, max_tokens=64, stream=True
    ):
        if not chunk.choices:
            continue
        delta = chunk.choices[0].delta
        if thought := getattr(delta, "reasoning", None):
            print(thought, end="", flush=True)
            thinking = True
        if delta.content:
            print(" => " if thinking else "", delta.content, sep="", end="", flush=True)
            reply, thinking = reply + delta.content, False
    return reply


def deepen(url: str) -> None:
    """Ask the question that takes most loops with fewer loops too, and show each answer."""
    from melt_serve.config import MeltConfig

    question = next(
        each for each in questions("heldout", SEED, kinds=["silent"]) if len(each.steps) == SILENT_STEPS + 1
    )
    client, model = connect(url)
    print(f"\nThe same question with more loops: {question.prompt}")
    for loops in range(1, MeltConfig.from_pretrained(MELT).total_ut_steps + 1):
        print(f"{loops:>8} {'loop ' if loops == 1 else 'loops'} -> ", end="")
        complete(client, model, question, loops, max_tokens=12)
        print(flush=True)


def complete(client: "OpenAI", model: str, question: Question, loops: int | None = None, max_tokens: int = 64) -> str:
    """Ask in one piece, at the server's default depth or another; show and return the answer."""
    completion = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question.prompt}],
        temperature=0,
        max_tokens=max_tokens,
        extra_body=None if loops is None else {"vllm_xargs": {"loops": loops}},
    )
    reply = completion.choices[0].message.content or ""
    print(reply.strip(), end="")
    return reply


def kv_costs(url: str) -> tuple[int, dict[str, int]]:
    """Return KV bytes per token: MELT's as the running engine reports them, and a LoopLM's of the same shape by T."""
    from melt_serve.config import LoopLMConfig, MeltConfig, kv_bytes_per_token

    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        metrics = response.read().decode()
    line = re.search(r"^vllm:cache_config_info\{(.*)\}", metrics, re.MULTILINE)
    if line is None:
        raise DemoError("the server's /metrics has no vllm:cache_config_info")
    facts = dict(re.findall(r'(\w+)="([^"]*)"', line[1]))
    melt = int(facts["kv_cache_memory_bytes"]) // (int(facts["num_gpu_blocks"]) * int(facts["block_size"]))

    shape = MeltConfig.from_pretrained(MELT)
    looplm = LoopLMConfig(**{key: value for key, value in shape.to_dict().items() if key != "model_type"})
    bytes_per_value = melt // kv_bytes_per_token(shape, bytes_per_value=1)
    return melt, {str(loops): kv_bytes_per_token(looplm, bytes_per_value, loops) for loops in (1, 4, 16)}


def show_costs(melt: int, looplm: dict[str, int]) -> None:
    """Print a table of KV bytes per token over the loops."""
    print("\nKV cache, bytes per token")
    print(f"{'loops T':>8} {'LoopLM':>10} {'MELT':>10}")
    for loops, size in looplm.items():
        print(f"{loops:>8} {size:>10,} {melt:>10,}")
