"""The loops that an answer's tokens ran: `usage.loops` in responses, and metrics of the server.

The worker reports how many loops each token ran (`cpu_worker.py`). The scheduler counts them for each request and
hands the count over with the request's last output (`depth_scheduler.py`), in vLLM's one field for facts about a
finished request, `kv_transfer_params`. A stop string is found here, after the engine, and any output may prove to be
the last: a request that has one hands its count over with every output. Here it is taken out again.
"""

import functools
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, NamedTuple

import prometheus_client
from vllm import SamplingParams
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse, AnthropicUsage
from vllm.outputs import RequestOutput
from vllm.v1.engine import EngineCoreOutput

LOOPS_RUN = "melt_loops_run"
"""In `kv_transfer_params`: generated tokens by the loops they ran."""
LOOPS = "melt_loops"
"""In `kv_transfer_params`: the most loops a token could run."""

REQUESTS = prometheus_client.Counter("melt_requests", "Requests, by the loops their tokens may run.", ["loops"])
TOKEN_LOOPS = prometheus_client.Histogram(
    "melt_token_loops",
    "Loops that a generated token ran, by the loops its request's tokens may run: where it is less, it exited early.",
    ["loops"],
    buckets=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
)


def count_accepted(params: SamplingParams | None) -> None:
    """Count a request, if it has a depth: one of another model in this process has none."""
    depth = (params and params.extra_args) or {}
    if {"loops", "exit_threshold"} <= depth.keys():
        REQUESTS.labels(depth["loops"]).inc()


class Run(NamedTuple):
    """What a request's tokens ran so far: the most loops that one could run, and tokens by the loops they ran."""

    most: int
    tokens: dict[int, int]


def take_runs(outputs: Iterable[EngineCoreOutput], states: dict[str, Any]) -> dict[str, Run]:
    """Return what the engine's outputs say of their requests' loops, by request id.

    Each of several answers to a prompt then hands on the sum over all of them.

    Args:
        outputs: what the engine returns of this step's requests.
        states: vLLM's states of running requests, by id.
    """
    runs = {}
    for output in outputs:
        params = output.kv_transfer_params or {}
        state = states.get(output.request_id)
        if LOOPS_RUN not in params or state is None:
            continue
        run = runs[output.request_id] = Run(params.pop(LOOPS), params[LOOPS_RUN])
        if (parent := state.parent_req) is not None:
            answers, total = vars(parent).setdefault(LOOPS_RUN, ({}, Counter()))
            total.subtract(answers.get(output.request_id, {}))
            total.update(run.tokens)
            answers[output.request_id] = run.tokens
            params[LOOPS_RUN] = dict(total)
    return runs


def observe(runs: Iterable[Run]) -> None:
    """Count the tokens of finished requests."""
    for run in runs:
        observed = TOKEN_LOOPS.labels(run.most)
        for loops, tokens in run.tokens.items():
            for _ in range(tokens):
                observed.observe(loops)


class LoopUsage:
    """Adds up the loops of one response's tokens, as its results come in."""

    def __init__(self) -> None:
        self.run: dict[int, Counter[int]] = {}

    def add(self, output: Any, prompt: int = 0) -> None:
        """Take the loops out of a result or a response; the last result of a prompt counts all its answers."""
        params = dict(output.kv_transfer_params or {})
        if run := params.pop(LOOPS_RUN, None):
            self.run[prompt] = Counter(run)
            output.kv_transfer_params = params or None

    async def watch(self, results: AsyncIterator[Any], prompt: int = 0) -> AsyncIterator[Any]:
        """Yield the same results, outputs of a prompt or pairs of a prompt's number and its output, and add each."""
        async for result in results:
            if isinstance(result, tuple):
                self.add(result[1], result[0])
            else:
                self.add(result, prompt)
            yield result

    @property
    def summary(self) -> dict[str, float] | None:
        """Mean and maximum over all generated tokens; None before they are known."""
        total: Counter[int] = sum(self.run.values(), Counter())
        if not total:
            return None
        return {"mean": sum(loops * tokens for loops, tokens in total.items()) / total.total(), "max": max(total)}


def wrap_response(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap vLLM's chat responses and answers in tokens, (self, request, results, ...) -> response."""

    @functools.wraps(original)
    async def respond(self: Any, request: Any, results: AsyncIterator[RequestOutput], *args: Any, **kwargs: Any) -> Any:
        loops = LoopUsage()
        response = await original(self, request, loops.watch(results), *args, **kwargs)
        return add_usage(response, loops)

    return respond


def wrap_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap vLLM's responses to several chats at once, (self, request, results of each chat, ...) -> response."""

    @functools.wraps(original)
    async def respond(
        self: Any, request: Any, results: Sequence[AsyncIterator[RequestOutput]], *args: Any, **kwargs: Any
    ) -> Any:
        loops = LoopUsage()
        watched = [loops.watch(each, prompt) for prompt, each in enumerate(results)]
        return add_usage(await original(self, request, watched, *args, **kwargs), loops)

    return respond


class MessageUsage(AnthropicUsage):
    """The usage of an answer in Anthropic's API, whose model takes no more fields."""

    loops: dict[str, int | float]


class Message(AnthropicMessagesResponse):
    """An answer in Anthropic's API that tells its loops."""

    usage: MessageUsage | None = None


def wrap_message(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what makes an answer of Anthropic's API from a chat response, (self, response) -> answer."""

    @functools.wraps(original)
    def convert(self: Any, response: Any) -> Any:
        answer = original(self, response)
        loops = getattr(response.usage, "loops", None)
        if loops is None or answer.usage is None:
            return answer
        usage = MessageUsage(**dict(answer.usage), loops=loops)
        return Message.model_construct(**{**dict(answer), "usage": usage})

    return convert


def wrap_message_stream(original: Callable[..., AsyncIterator[str]]) -> Callable[..., AsyncIterator[str]]:
    """Wrap what makes a stream of Anthropic's API from a chat's, (self, events or chunks) -> events."""

    @functools.wraps(original)
    async def convert(self: Any, events: AsyncIterator[Any]) -> AsyncIterator[str]:
        loops = None

        async def watch() -> AsyncIterator[Any]:
            nonlocal loops
            async for event in events:
                if not isinstance(event, str):
                    loops = getattr(getattr(event, "usage", None), "loops", loops)
                elif '"loops": {' in event:
                    loops = json.loads(event.removeprefix("data: "))["usage"]["loops"]
                yield event

        async for event in original(self, watch()):
            yield add_to_event(event, loops) if loops else event

    return convert


def wrap_completions(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap vLLM's completions, (self, outputs, ...) -> response."""

    @functools.wraps(original)
    def respond(self: Any, outputs: list[RequestOutput], *args: Any, **kwargs: Any) -> Any:
        loops = LoopUsage()
        for prompt, output in enumerate(outputs):
            loops.add(output, prompt)
        return add_usage(original(self, outputs, *args, **kwargs), loops)

    return respond


def wrap_responses(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap vLLM's Responses API, streamed or not, (self, ...) -> response, which repeats what its last result said."""

    @functools.wraps(original)
    async def respond(self: Any, *args: Any, **kwargs: Any) -> Any:
        loops = LoopUsage()
        response = await original(self, *args, **kwargs)
        if getattr(response, "kv_transfer_params", None):  # an error has none
            loops.add(response)
        return add_usage(response, loops)

    return respond


def add_usage(response: Any, loops: LoopUsage) -> Any:
    """Set `usage.loops`, if the response has a usage (an error has none), and return the response."""
    if loops.summary and getattr(response, "usage", None) is not None:
        response.usage.loops = loops.summary
    return response


def add_to_event(event: Any, loops: dict[str, float]) -> Any:
    """Set `usage.loops` in a part of a stream that has a usage, a server-sent event or vLLM's chunk, and return it."""
    if not isinstance(event, str):
        if getattr(event, "usage", None) is not None:
            event.usage.loops = loops
        return event
    if '"usage":{' not in event:
        return event
    head, _, data = event.partition("data: ")
    body = json.loads(data)
    if "usage" not in body:  # a part of it has one: Anthropic's message, as it begins
        return event
    body["usage"]["loops"] = loops
    return f"{head}data: {json.dumps(body, ensure_ascii=False)}\n\n"


def wrap_stream(results_at: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a wrapper of vLLM's streams, of server-sent events or chunks, which adds the loops to what has the usage.

    Args:
        results_at: the index, among the arguments after self, of the results.
    """

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        async def stream(self: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            loops = LoopUsage()
            arguments = list(args)
            arguments[results_at] = loops.watch(arguments[results_at])
            async for event in original(self, *arguments, **kwargs):
                yield add_to_event(event, loops.summary) if loops.summary else event

        return stream

    return wrap
