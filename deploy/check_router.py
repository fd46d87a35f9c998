"""What a router before two servers does for their prefix caches: conversations at two depths, policy by policy.

    pip install vllm-router==0.1.17
    python deploy/check_router.py

Two melt-serve servers stand behind vllm-router (https://github.com/vllm-project/router). The same conversations are
held once with each policy, with words of its own at the front, so that nothing is found that another one has left;
then all of it again. Found is a token of a prompt whose rows the server had in its prefix cache.
"""

import argparse
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import openai

from melt_serve.bundled import MELT
from melt_serve.server_process import ServerError, free_port, running
from melt_serve.task.who_is_where import questions
from melt_serve.terminal import positive

DEPTHS = (2, 4)
"""Every conversation is held at each of them: the same words, and other rows."""
CLIENTS = 4
"""Conversations that are held at the same time."""


@dataclass(frozen=True)
class Policy:
    """A way to route, by the router's name for it.

    Attributes:
        session: whether clients name a conversation at its depth in `X-Session-ID`.
        salt: whether they name its depth in `cache_salt`, which the router takes for a part of the prompt.
        servers: that the router knows of.
    """

    name: str
    session: bool = False
    salt: bool = False
    servers: int = 2

    @property
    def label(self) -> str:
        """The policy, and what is sent for it."""
        if self.servers == 1:
            return "one server alone"
        return self.name + self.session * ", depth in X-Session-ID" + self.salt * ", depth in cache_salt"


POLICIES = (
    Policy("round_robin", servers=1),
    Policy("round_robin"),
    Policy("cache_aware"),
    Policy("cache_aware", salt=True),
    Policy("consistent_hash", session=True),
)


@dataclass(frozen=True)
class Conversation:
    """A conversation at one depth, with its messages so far."""

    number: int
    depth: int
    messages: list[dict[str, Any]]


@dataclass(frozen=True)
class Result:
    """What came of all conversations under one policy.

    Attributes:
        seen: tokens of prompts that each server was asked for, those of later turns with all turns before.
        found: of these, tokens whose rows were in its prefix cache.
        requests: that each server answered.
        seconds: for all of them.
    """

    seen: tuple[float, ...]
    found: tuple[float, ...]
    requests: tuple[float, ...]
    seconds: float

    @property
    def rate(self) -> float:
        """The share of prompts' tokens that was found."""
        return sum(self.found) / sum(self.seen)


def main() -> None:
    """Hold the conversations under each policy, check that depth comes through, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--router", default="vllm-router", help="the router's program")
    parser.add_argument("--conversations", type=positive, default=8, help="of which each is held at two depths")
    parser.add_argument("--turns", type=positive, default=6, help="of each conversation")
    parser.add_argument("--rounds", type=positive, default=3, help="how often each policy has its turn")
    options = parser.parse_args()
    if shutil.which(options.router) is None:
        sys.exit(f"there is no {options.router}: pip install vllm-router==0.1.17, or name it with --router")
    results: dict[Policy, list[Result]] = {policy: [] for policy in POLICIES}
    try:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
            urls = [servers.enter_context(served(Path(folder), number)) for number in range(2)]
            for turn in range(options.rounds):
                for policy in POLICIES:
                    with routed(options.router, policy, urls, Path(folder)) as url:
                        results[policy].append(hold(url, urls, policy, turn, options.conversations, options.turns))
                    print(f"{policy.label}: {results[policy][-1].rate:.1%}", file=sys.stderr, flush=True)
    except (AssertionError, ServerError, openai.OpenAIError, OSError) as error:
        sys.exit(f"FAILED: {error}")
    print_table(results)


@contextmanager
def served(folder: Path, number: int) -> Iterator[str]:
    """Start a server whose conversations find their own answers again, and yield its address."""
    port = free_port()
    words = [sys.executable, "-m", "melt_serve.cli", "serve", "--port", str(port), "--kv-cache-memory-bytes", "64M"]
    # With the last flag a server tells the router a prompt's tokens, at /v1/chat/completions/render: for cache_aware.
    words += ["--hf-overrides.decode_mode", "chunk", "--enable-scale-out"]
    with running(words, port, folder / f"server-{number}.txt", ready="/melt/ready") as server:
        yield server.url


@contextmanager
def routed(program: str, policy: Policy, urls: list[str], folder: Path) -> Iterator[str]:
    """Start the router with nothing learnt yet, and yield its address."""
    port, metrics = free_port(), free_port()
    words = [program, "--policy", policy.name, "--port", str(port), "--prometheus-port", str(metrics)]
    words += ["--worker-startup-check-interval", "1", "--worker-urls", *urls[: policy.servers]]
    with running(words, port, folder / "router.txt") as router:
        yield router.url


def hold(url: str, urls: list[str], policy: Policy, turn: int, number: int, turns: int) -> Result:
    """Hold all conversations through the router, turn by turn and in another order each time."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    draw = random.Random(turn)  # the same order for every policy
    conversations = [
        Conversation(each, depth, [{"role": "system", "content": f"{each} {turn} {POLICIES.index(policy)}"}])
        for each in range(number)
        for depth in DEPTHS
    ]
    asked = list(islice(questions("heldout", turn), number * turns))
    before, started = [counters(each) for each in urls], time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as crowd:
        for at in range(turns):
            draw.shuffle(conversations)
            for each in conversations:
                each.messages.append({"role": "user", "content": asked[each.number * turns + at].prompt})
            list(crowd.map(lambda each: answer(client, policy, each), conversations))
    seconds = time.monotonic() - started
    after = [counters(each) for each in urls]
    seen, found, requests = (
        tuple(late[name] - early[name] for early, late in zip(before, after, strict=True))
        for name in ("queries", "hits", "requests")
    )
    return Result(seen, found, requests, seconds)


def answer(client: openai.OpenAI, policy: Policy, conversation: Conversation) -> None:
    """Take a conversation's turn, and keep what was said and thought: a later turn finds the rows of both.

    Raises:
        AssertionError: the answer was given at another depth.
    """
    session = {"X-Session-ID": f"{conversation.number}-{conversation.depth}"} if policy.session else {}
    salt = {"cache_salt": f"loops={conversation.depth}"} if policy.salt else {}
    said = client.chat.completions.create(
        model=MELT.name,
        messages=conversation.messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=64,
        extra_headers=session,
        extra_body={"vllm_xargs": {"loops": conversation.depth}, **salt},
    )
    loops = said.usage and said.usage.model_extra and said.usage.model_extra.get("loops")
    if loops != {"mean": conversation.depth, "max": conversation.depth}:
        raise AssertionError(f"asked for {conversation.depth} loops through the router, got {loops}")
    message = said.choices[0].message
    reasoning = (message.model_extra or {}).get("reasoning")
    conversation.messages.append({"role": "assistant", "content": message.content, "reasoning": reasoning})


def counters(url: str) -> dict[str, float]:
    """Read what a server has counted: tokens looked up in its prefix cache, tokens found, requests answered."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    names = {
        "queries": r"vllm:prefix_cache_queries_total",
        "hits": r"vllm:prefix_cache_hits_total",
        "requests": r"vllm:request_success_total",
    }
    return {
        name: sum(float(value) for value in re.findall(rf"^{counter}\{{.*\}} (\S+)$", text, re.MULTILINE))
        for name, counter in names.items()
    }


def print_table(results: Mapping[Policy, list[Result]]) -> None:
    """Print a line for each policy: medians over the rounds, with the least and the most of the hit rate."""
    print(
        "| policy | found | least, most | tokens computed | requests, server by server | s |\n|---|---|---|---|---|---|"
    )
    for policy, rounds in results.items():
        rates = sorted(each.rate for each in rounds)
        computed = statistics.median(sum(each.seen) - sum(each.found) for each in rounds)
        shares = ", ".join("/".join(f"{count:.0f}" for count in each.requests) for each in rounds)
        seconds = statistics.median(each.seconds for each in rounds)
        print(
            f"| {policy.label} | {statistics.median(rates):.1%} | {rates[0]:.1%}, {rates[-1]:.1%} | {computed:,.0f} "
            f"| {shares} | {seconds:.1f} |"
        )


if __name__ == "__main__":
    main()
