"""The loops of a request on its span, where the server has an `--otlp-traces-endpoint`.

vLLM makes a span of each answer when it has ended, `llm_request`, with attributes named `gen_ai.*`, and has no hook
for more: what makes the span does not know the request, and what knows the request makes all of the span at once.
"""

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from melt_serve.engine.usage import RUN, Run, mean

ATTRIBUTES: ContextVar[Mapping[str, Any]] = ContextVar("of the answer whose span is made")


def attributes_of(run: Run) -> dict[str, Any]:
    """Return what a request asked for, and the loops that its answer's tokens ran, by names of attributes."""
    asked = {f"melt.request.{name}": value for name, value in run.asked.items()}
    return asked | {"melt.usage.loops.mean": mean(run.tokens), "melt.usage.loops.max": max(run.tokens)}


def wrap_tracing(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap vLLM's tracing of an answer that has ended, (self, output, the request's state, statistics)."""

    @functools.wraps(original)
    def do_tracing(self: Any, output: Any, state: Any, *args: Any, **kwargs: Any) -> None:
        run = getattr(state, RUN, None)
        before = ATTRIBUTES.set(attributes_of(run) if run else {})
        try:
            original(self, output, state, *args, **kwargs)
        finally:
            ATTRIBUTES.reset(before)

    return do_tracing


def wrap_span(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what makes the span, (..., attributes=...)."""

    @functools.wraps(original)
    def instrument(*args: Any, attributes: Mapping[str, Any], **kwargs: Any) -> Any:
        return original(*args, attributes={**attributes, **ATTRIBUTES.get()}, **kwargs)

    return instrument
