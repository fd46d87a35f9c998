"""Random bodies: right ones of every route, with some of their fields, which the server itself names, made wrong."""

import json
from typing import Any

from hypothesis import strategies as st

from tests.faults.servers import MODEL, QUESTION

MESSAGES = [{"role": "user", "content": QUESTION}]
RIGHT: dict[str, dict[str, Any]] = {
    "/detokenize": {"tokens": [5, 6]},
    "/generative_scoring": {"query": "Ann", "items": ["is", "in"], "label_token_ids": [5, 6]},
    "/inference/v1/abort_requests": {"request_ids": ["nobody"]},
    "/inference/v1/generate": {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 4}},
    "/invocations": {"messages": MESSAGES, "max_tokens": 4},
    "/tokenize": {"prompt": QUESTION},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/chat/completions/batch": {"messages": [MESSAGES, MESSAGES], "max_tokens": 4},
    "/v1/completions": {"prompt": "Ann is", "max_tokens": 4},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/v1/responses": {"input": QUESTION, "max_output_tokens": 4},
}
"""A body that each route takes; routes without one get an empty object."""

ELSEWHERE = ("vllm_xargs", "kv_transfer_params", "structured_outputs", "reasoning", "reasoning_effort", "tools", "stop")
"""Fields that a client may send anywhere, named or not."""
MEANT_FOR_OPERATORS = (
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
)

SCHEMAS = (
    {"$ref": "#"},
    {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
    {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"allOf": [{"$ref": "#"}]}]}}},
    {"type": "string", "pattern": "("},
    {"type": "nonsense"},
    {"enum": []},
)
odd_numbers = st.sampled_from((0, -1, 1, 2, 0.5, -0.5, 1e308, 5e-324, 2**31, -(2**31) - 1, 2**63, 2**64, -(2**70)))
odd_texts = st.sampled_from(
    ("", "a", "low", "none", "auto", "required", "x" * 3000, "\ud800", "\0", "é", "🙂", "{", "(")
)
not_numbers = st.sampled_from((float("nan"), float("inf"), float("-inf")))
leaves = st.none() | st.booleans() | odd_numbers | odd_texts | not_numbers | st.integers() | st.text(max_size=20)
names = st.sampled_from(
    ("loops", "exit_threshold", "kv_transfer_params", "effort", "enabled", "type", "json", "regex", "grammar", "choice")
) | st.text(max_size=5)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=6
)
odd_tools = st.builds(
    lambda schema, strict: [{"type": "function", "function": {"name": "f", "parameters": schema, "strict": strict}}],
    st.sampled_from(SCHEMAS) | values,
    st.booleans(),
)
odd_formats = st.builds(
    lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, st.sampled_from(SCHEMAS)
)
odd_depths = st.fixed_dictionaries({}, optional={"loops": leaves, "exit_threshold": leaves, "a": values})
odd_outputs = st.dictionaries(
    st.sampled_from(("json", "regex", "grammar", "choice", "structural_tag")),
    st.sampled_from(SCHEMAS) | values,
    max_size=2,
)
meant = {
    "vllm_xargs": odd_depths,
    "tools": odd_tools,
    "response_format": odd_formats,
    "structured_outputs": odd_outputs,
    "reasoning": st.fixed_dictionaries({}, optional={"effort": leaves, "enabled": leaves}),
    "n": st.sampled_from((0, 1, 2, -1, 10**6, True, "2", None)),  # between them: answers for minutes
}
"""What is nearly right for a field; any other value is tried, too."""
nested = st.builds(
    lambda opening, closing, levels: opening * levels + b"1" + closing * levels,
    st.just(b"["),
    st.just(b"]"),
    st.sampled_from((50, 101, 1200, 50_000)),
)


def fields_of_routes(openapi: dict[str, Any]) -> dict[str, list[str]]:
    """Return the routes that take a body, each with its fields, from the server's own description."""
    schemas = openapi.get("components", {}).get("schemas", {})

    def fields(schema: dict[str, Any]) -> set[str]:
        named = schemas.get(schema.get("$ref", "").rpartition("/")[2], schema)
        return set(named.get("properties", {})).union(*map(fields, named.get("anyOf", ())))

    found = {}
    for path, methods in openapi["paths"].items():
        if "post" in methods and "{" not in path and path not in MEANT_FOR_OPERATORS:
            content = methods["post"].get("requestBody", {}).get("content", {})
            found[path] = sorted(fields(content.get("application/json", {}).get("schema", {})))
    return found


def bodies(routes: dict[str, list[str]]) -> st.SearchStrategy[tuple[str, bytes]]:
    """Draw a route and a body for it."""

    @st.composite
    def draw_body(draw: st.DrawFn) -> tuple[str, bytes]:
        path = draw(st.sampled_from(sorted(routes)))
        kind = draw(st.integers(0, 19))
        if kind == 0:
            return path, draw(st.binary(max_size=40) | nested)
        if kind == 1:
            return path, json.dumps(draw(values)).encode()
        body = {"model": MODEL, **RIGHT.get(path, {})}
        for name in draw(st.lists(st.sampled_from((*routes[path], *ELSEWHERE)), max_size=3)):
            body[name] = draw(meant.get(name, values) | values if name != "n" else meant["n"])
        if draw(st.booleans()):
            body["stream"] = True
        return path, json.dumps(body).encode()

    return draw_body()
