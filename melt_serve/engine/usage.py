"""What an answer tells of its loops: `usage.loops` in responses, and metrics of the server.

The worker says which token ran how many loops (`worker.py`), the scheduler counts them for each request and hands the
count over with the request's last output (`scheduler.py`), in the one field of vLLM's for what an engine says of a
finished request, `kv_transfer_params`. Here it is taken out again.
"""

import functools
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import prometheus_client
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


def record_finished(outputs: Iterable[EngineCoreOutput], states: dict[str, Any]) -> None:
    """Observe what finished requests ran; let each of several answers to a prompt tell of all that are finished.

    Args:
        states: vLLM's, of running requests by id.
    """
    for output in outputs:
        params, state = output.kv_transfer_params or {}, states.get(output.request_id)
        if LOOPS_RUN not in params or state is None:
            continue
        observed = TOKEN_LOOPS.labels(params.pop(LOOPS))
        for loops, tokens in params[LOOPS_RUN].items():
            for _ in range(tokens):
                observed.observe(loops)
        if (parent := state.parent_req) is not None:
            all_answers = vars(parent).setdefault(LOOPS_RUN, Counter())
            all_answers.update(params[LOOPS_RUN])
            params[LOOPS_RUN] = dict(all_answers)


class LoopUsage:
    """The loops of one response's tokens, as its results come in."""

    def __init__(self) -> None:
        self.run: dict[int, Counter[int]] = {}

    def listen(self, output: Any, prompt: int = 0) -> None:
        """Take the loops out of a result, or of a response; the last one of each prompt tells of all its answers."""
        told = dict(output.kv_transfer_params or {})
        if run := told.pop(LOOPS_RUN, None):
            self.run[prompt] = Counter(run)
            output.kv_transfer_params = told or None

    async def pass_on(self, results: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The same results: outputs, or pairs of a prompt's number and its output."""
        async for result in results:
            if isinstance(result, tuple):
                self.listen(result[1], result[0])
            else:
                self.listen(result)
            yield result

    @property
    def usage(self) -> dict[str, float] | None:
        """Mean and maximum over all generated tokens; None before they are known."""
        total: Counter[int] = sum(self.run.values(), Counter())
        if not total:
            return None
        return {"mean": sum(loops * tokens for loops, tokens in total.items()) / total.total(), "max": max(total)}


def wrap_chat_response(original: Callable[..., Any]) -> Callable[..., Any]:
    """For vLLM's chat responses: (self, request, results, ...) -> response."""

    @functools.wraps(original)
    async def respond(self: Any, request: Any, results: AsyncIterator[RequestOutput], *args: Any, **kwargs: Any) -> Any:
        told = LoopUsage()
        response = await original(self, request, told.pass_on(results), *args, **kwargs)
        return add_usage(response, told)

    respond.melt_serve = True  # type: ignore[attr-defined]
    return respond


def wrap_completions(original: Callable[..., Any]) -> Callable[..., Any]:
    """For vLLM's completions: (self, outputs, ...) -> response."""

    @functools.wraps(original)
    def respond(self: Any, outputs: list[RequestOutput], *args: Any, **kwargs: Any) -> Any:
        told = LoopUsage()
        for prompt, output in enumerate(outputs):
            told.listen(output, prompt)
        return add_usage(original(self, outputs, *args, **kwargs), told)

    respond.melt_serve = True  # type: ignore[attr-defined]
    return respond


def wrap_responses(original: Callable[..., Any]) -> Callable[..., Any]:
    """For vLLM's Responses API, streamed or not: (self, ...) -> response, which repeats what its last result said."""

    @functools.wraps(original)
    async def respond(self: Any, *args: Any, **kwargs: Any) -> Any:
        told, response = LoopUsage(), await original(self, *args, **kwargs)
        if getattr(response, "kv_transfer_params", None):  # an error has none
            told.listen(response)
        return add_usage(response, told)

    respond.melt_serve = True  # type: ignore[attr-defined]
    return respond


def add_usage(response: Any, told: LoopUsage) -> Any:
    """`usage.loops`, where the response has a usage (an error has none)."""
    if told.usage and getattr(response, "usage", None) is not None:
        response.usage.loops = told.usage
    return response


def wrap_stream(results_at: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For vLLM's streams of server-sent events: the event with the usage tells the loops, too.

    Args:
        results_at: which argument, after self, the results are.
    """

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        async def stream(self: Any, *args: Any, **kwargs: Any) -> AsyncIterator[str]:
            told, arguments = LoopUsage(), list(args)
            arguments[results_at] = told.pass_on(arguments[results_at])
            async for event in original(self, *arguments, **kwargs):
                if told.usage and '"usage":{' in event:
                    body = json.loads(event.removeprefix("data: "))
                    body["usage"]["loops"] = told.usage
                    event = f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
                yield event

        stream.melt_serve = True  # type: ignore[attr-defined]
        return stream

    return wrap
