"""The loops that an answer's tokens ran: `usage.loops` in responses, each token's where asked, and metrics.

The worker reports how many loops each token ran (`cpu_worker.py`). The scheduler counts them for each request and
hands the count over with the request's last output (`depth_scheduler.py`), in vLLM's one field for facts about a
finished request, `kv_transfer_params`. A stop string is found here, after the engine, and any output may prove to be
the last: a request that has one hands its count over with every output. Here it is taken out again.

A request with `return_loops` hands over with every output what its token ran. vLLM merges and cuts outputs on their way
to the client, so each has the list of all its answer's tokens so far, and what it states is counted off by its tokens.
"""

import functools
import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import prometheus_client
from vllm import SamplingParams
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesResponse, AnthropicUsage
from vllm.outputs import RequestOutput
from vllm.v1.engine import EngineCoreOutput

LOOPS_RUN = "melt_loops_run"
"""In `kv_transfer_params`: generated tokens by the loops they ran."""
ASKED = "melt_loops_asked"
"""In `kv_transfer_params`: the request's depth, and the checkpoint's decode mode, if it has one."""
TOKEN = "melt_token"
"""In `kv_transfer_params`: the loops that this output's token ran, and its exit probabilities after each."""
TOKENS = "token_loops"
"""An attribute of a `CompletionOutput`: the same of all tokens of its answer so far."""

COMPACT = (",", ":")
"""How vLLM writes JSON: parts of a stream are looked through as text before they are read."""

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


RUN = "melt_run"
"""An attribute of a `RequestState`: what its tokens ran so far."""


class Run(NamedTuple):
    """What a request's tokens ran so far: its depth and decode mode, by name, and tokens by the loops they ran."""

    asked: dict[str, Any]
    tokens: dict[int, int]


def mean(tokens: Mapping[int, int]) -> float:
    """Return the loops that a token ran in the mean, of tokens by the loops they ran."""
    return sum(loops * number for loops, number in tokens.items()) / sum(tokens.values())


def take_runs(outputs: Iterable[EngineCoreOutput], states: dict[str, Any]) -> dict[str, Run]:
    """Return what the engine's outputs say of their requests' loops, by request id.

    Each of several answers to a prompt then hands on the sum over all of them. The states get their own, and what each
    token ran.

    Args:
        outputs: what the engine returns of this step's requests.
        states: vLLM's states of running requests, by id.
    """
    runs = {}
    for output in outputs:
        params = output.kv_transfer_params or {}
        state = states.get(output.request_id)
        if state is None:
            continue
        if TOKEN in params:
            vars(state).setdefault(TOKENS, []).append(params.pop(TOKEN))
            output.kv_transfer_params = params or None
        if LOOPS_RUN not in params:
            continue
        run = runs[output.request_id] = Run(params.pop(ASKED), params[LOOPS_RUN])
        setattr(state, RUN, run)
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
        observed = TOKEN_LOOPS.labels(run.asked["loops"])
        for loops, tokens in run.tokens.items():
            for _ in range(tokens):
                observed.observe(loops)


def wrap_completion(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what makes an answer's output, (a request's state, ...) -> `CompletionOutput`."""

    @functools.wraps(original)
    def make(self: Any, *args: Any, **kwargs: Any) -> Any:
        completion = original(self, *args, **kwargs)
        if TOKENS in vars(self):
            setattr(completion, TOKENS, getattr(self, TOKENS))
        return completion

    return make


class LoopUsage:
    """Adds up the loops of one response's tokens, as its results come in, and those of each token where they are told.

    Attributes:
        run: by prompt, tokens by the loops they ran.
        tokens: by choice, what each token ran that the client has not been told yet.
        counted: by choice, the tokens that have come in.
    """

    def __init__(self, request: Any = None) -> None:
        self.run: dict[int, Counter[int]] = {}
        self.tokens: defaultdict[int, list[tuple[int, list[float]]]] = defaultdict(list)
        self.counted: Counter[int] = Counter()
        self.answers = getattr(request, "n", None) or 1
        # Other APIs have choices that take no more fields, or none. For an echo alone vLLM makes a token, and drops it.
        self.tells_tokens = hasattr(request, "vllm_xargs") and getattr(request, "max_tokens", None) != 0

    def add(self, output: Any, prompt: int = 0) -> None:
        """Take the loops out of a result or a response; the last result of a prompt counts all its answers."""
        params = dict(output.kv_transfer_params or {})
        if run := params.pop(LOOPS_RUN, None):
            self.run[prompt] = Counter(run)
            output.kv_transfer_params = params or None
        for answer in output.outputs if self.tells_tokens else ():
            if (tokens := getattr(answer, TOKENS, None)) is not None:
                choice = prompt * self.answers + answer.index
                before = self.counted[choice]
                self.counted[choice] += len(answer.token_ids)
                self.tokens[choice] += tokens[before : self.counted[choice]]

    def take_tokens(self, choice: int) -> dict[str, list[Any]]:
        """Return the fields of a choice that say what its tokens ran since the last call; none if nobody asked."""
        if choice not in self.tokens:
            return {}
        tokens = self.tokens.pop(choice)
        return {"loops": [loops for loops, _ in tokens], "exit_probabilities": [said for _, said in tokens]}

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
        return {"mean": mean(total), "max": max(total)} if total else None


def wrap_response(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap vLLM's chat responses and answers in tokens, (self, request, results, ...) -> response."""

    @functools.wraps(original)
    async def respond(self: Any, request: Any, results: AsyncIterator[RequestOutput], *args: Any, **kwargs: Any) -> Any:
        loops = LoopUsage(request)
        response = await original(self, request, loops.watch(results), *args, **kwargs)
        return add_usage(response, loops)

    return respond


def wrap_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap vLLM's responses to several chats at once, (self, request, results of each chat, ...) -> response."""

    @functools.wraps(original)
    async def respond(
        self: Any, request: Any, results: Sequence[AsyncIterator[RequestOutput]], *args: Any, **kwargs: Any
    ) -> Any:
        loops = LoopUsage(request)
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
                elif '"loops":{' in event:
                    loops = json.loads(event.removeprefix("data: "))["usage"]["loops"]
                yield event

        async for event in original(self, watch()):
            yield add_to_event(event, loops) if loops else event

    return convert


def wrap_completions(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap vLLM's completions, (self, outputs, request, ...) -> response."""

    @functools.wraps(original)
    def respond(self: Any, outputs: list[RequestOutput], request: Any, *args: Any, **kwargs: Any) -> Any:
        loops = LoopUsage(request)
        for prompt, output in enumerate(outputs):
            loops.add(output, prompt)
        return add_usage(original(self, outputs, request, *args, **kwargs), loops)

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
    """Set `usage.loops`, if the response has a usage (an error has none), and what tokens ran; return the response."""
    if loops.summary and getattr(response, "usage", None) is not None:
        response.usage.loops = loops.summary
    if loops.tokens:
        for choice in getattr(response, "choices", ()):
            tell_tokens(choice, loops)
    return response


def tell_tokens(choice: Any, loops: LoopUsage) -> None:
    """Set a choice's fields that say what its tokens ran."""
    for name, values in loops.take_tokens(choice.index).items():
        setattr(choice, name, values)


def add_tokens(event: Any, loops: LoopUsage) -> Any:
    """Set what tokens ran in a part of a stream, and return it.

    A part of a chat's stream that has tokens states `token_ids`, if only as null: the first ones, of the role, do not.
    Where vLLM sends no part for a token, the next one tells of both.
    """
    if not isinstance(event, str):
        for choice in getattr(event, "choices", ()):
            if "token_ids" in choice.model_fields_set:
                tell_tokens(choice, loops)
        return event
    if '"token_ids":' not in event:
        return event
    head, _, data = event.partition("data: ")
    body = json.loads(data)
    for choice in body["choices"]:
        if "token_ids" in choice:
            choice.update(loops.take_tokens(choice["index"]))
    return f"{head}data: {json.dumps(body, ensure_ascii=False, separators=COMPACT)}\n\n"


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
    return f"{head}data: {json.dumps(body, ensure_ascii=False, separators=COMPACT)}\n\n"


def wrap_stream(results_at: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a wrapper of vLLM's streams, of server-sent events or chunks, which adds what ran.

    Args:
        results_at: the index, among the arguments after self, of the results; the first is the request.
    """

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        async def stream(self: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            loops = LoopUsage(args[0])
            arguments = list(args)
            arguments[results_at] = loops.watch(arguments[results_at])
            async for event in original(self, *arguments, **kwargs):
                if loops.tokens:
                    event = add_tokens(event, loops)
                yield add_to_event(event, loops.summary) if loops.summary else event

        return stream

    return wrap
