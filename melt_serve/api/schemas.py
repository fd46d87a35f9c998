"""JSON schemas in a request's body: what no grammar can be made of.

A schema may refer to itself, and often does: a tree has trees for children. But if nothing stands between a `$ref` and
what it refers to, as in `{"$ref": "#"}`, no value is described at all. xgrammar then lets any token through and fails
at the first that ends the answer, which vLLM reports as an error of the server's.
"""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

SAME_VALUE = ("allOf", "anyOf", "oneOf")
"""Keywords whose schemas describe the value that the schema around them describes."""
FIELDS = (
    "structured_outputs.json",
    "sampling_params.structured_outputs.json",
    "response_format.json_schema.schema",
    "text.format.schema",
    "output_config.format.schema",
)
FIELDS_OF_A_TOOL = ("function.parameters", "parameters", "input_schema")


def find_endless(schema: Any) -> str | None:
    """Return a `$ref` in `schema` that leads back to itself with no value between, or None."""
    done: set[int] = set()
    for start in subschemas(schema):
        chain: dict[int, Any] = {}
        waiting = [(start, False)]
        while waiting:  # depth first; True: all that this one leads to has been seen
            node, left = waiting.pop()
            if left:
                del chain[id(node)]
                done.add(id(node))
            elif id(node) in chain:
                return next(each["$ref"] for each in reversed([*chain.values(), node]) if "$ref" in each)
            elif id(node) not in done:
                chain[id(node)] = node
                waiting.append((node, True))
                waiting.extend((each, False) for each in leads_to(node, schema))
    return None


def leads_to(node: dict[str, Any], root: Any) -> Iterator[dict[str, Any]]:
    """Yield the schemas that describe the same value as `node`."""
    for keyword in SAME_VALUE:
        if isinstance(members := node.get(keyword), list):
            yield from (each for each in members if isinstance(each, dict))
    if isinstance(target := resolve(node.get("$ref"), root), dict):
        yield target


def resolve(reference: Any, root: Any) -> Any:
    """Return what a JSON pointer such as `#/$defs/a` refers to (RFC 6901), or None."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    names = filter(None, unquote(reference[1:]).split("/"))
    return follow([name.replace("~1", "/").replace("~0", "~") for name in names], root)


def follow(names: list[str], value: Any) -> Any:
    """Return what lies in objects and arrays under these names and numbers, or None."""
    for name in names:
        if isinstance(value, list):
            value = value[int(name)] if name.isdecimal() and int(name) < len(value) else None
        else:
            value = value.get(name) if isinstance(value, dict) else None
    return value


def subschemas(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield every object in a schema, itself first."""
    waiting = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)


def schemas_of(body: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the schemas of a body, whatever its route, with their fields' names."""
    tools = body.get("tools")
    of_tools = [f"tools.{index}" for index in range(len(tools) if isinstance(tools, list) else 0)]
    for field in (*FIELDS, *(f"{tool}.{field}" for tool in of_tools for field in FIELDS_OF_A_TOOL)):
        schema = follow(field.split("."), body)
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError):  # vLLM says what is wrong with it
                schema = None
        if schema is not None:
            yield field, schema
