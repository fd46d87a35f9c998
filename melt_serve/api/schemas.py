"""JSON schemas in a request's body: those that describe no value.

A schema may refer to itself, and often does: a tree has trees for children. But if nothing stands between a `$ref` and
what it refers to, as in `{"$ref": "#"}`, no value is described at all. xgrammar compiles that into a mask that leaves
no token, the sampler takes one nevertheless, and vLLM reports what the grammar then says as an error of the server's.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import unquote

FIELDS = ("structured_outputs.json", "sampling_params.structured_outputs.json")
CONTAINERS = (
    "response_format",
    "text.format",
    "output_config.format",
    "structured_outputs.structural_tag",
    "sampling_params.structured_outputs.structural_tag",
)
"""Fields that have schemas somewhere inside, named `schema` or `json_schema`."""
FIELDS_OF_A_TOOL = ("function.parameters", "parameters", "input_schema")
DEFINITIONS = ("$defs", "definitions")
"""What stands there describes a value only where a `$ref` names it."""
MOST_DIGITS = 9
"""Of an array's index in a JSON pointer."""


def find_endless(schema: Any) -> str | None:
    """Return a `$ref` in `schema` that leads back to itself with no value between, or None."""
    nodes = list(reachable(schema))
    described = find_described(nodes, schema)
    endless = [node for node in nodes if id(node) not in described]
    return next((node["$ref"] for node in endless if isinstance(node.get("$ref"), str)), None)


def find_described(nodes: Iterable[dict[str, Any]], root: Any) -> set[int]:
    """Return the ids of the schemas that describe a value: those of which all that `needs_of` says is such a schema."""
    missing: dict[int, int] = {}
    needed_by: defaultdict[int, list[list[int]]] = defaultdict(list)
    for node in nodes:
        needs = list(needs_of(node, root))
        missing[id(node)] = len(needs)
        for alternatives in needs:
            need = [id(node)]  # empty once one of the alternatives is known to describe a value
            for each in alternatives:
                needed_by[id(each)].append(need)
    known = [number for number, count in missing.items() if not count]
    described = set(known)
    while known:
        for need in needed_by[known.pop()]:
            if not need:
                continue
            owner = need.pop()
            missing[owner] -= 1
            if not missing[owner]:
                described.add(owner)
                known.append(owner)
    return described


def needs_of(node: dict[str, Any], root: Any) -> Iterator[list[dict[str, Any]]]:
    """Yield lists of schemas of the same value as `node`, one of each of which must describe one."""
    if isinstance(target := resolve(node.get("$ref"), root), dict):
        yield [target]
    if isinstance(members := node.get("allOf"), list):
        yield from ([each] for each in members if isinstance(each, dict))
    for keyword in ("anyOf", "oneOf"):
        members = node.get(keyword)
        if isinstance(members, list) and members and all(isinstance(each, dict) for each in members):
            yield members


def reachable(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield every object that a value of `schema` may be judged by, itself first."""
    waiting, seen = [schema], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            yield value
            waiting.extend(each for name, each in value.items() if name not in DEFINITIONS)
            waiting.append(resolve(value.get("$ref"), schema))


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
            index = int(name) if name.isdecimal() and len(name) <= MOST_DIGITS else len(value)
            value = value[index] if index < len(value) else None
        else:
            value = value.get(name) if isinstance(value, dict) else None
    return value


def schemas_of(body: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the schemas of a body, whatever its route, with the names of their fields."""
    tools = body.get("tools")
    of_tools = [f"tools.{index}" for index in range(len(tools) if isinstance(tools, list) else 0)]
    for field in (*FIELDS, *(f"{tool}.{field}" for tool in of_tools for field in FIELDS_OF_A_TOOL)):
        if (schema := parsed(follow(field.split("."), body))) is not None:
            yield field, schema
    for field in CONTAINERS:
        for schema in schemas_in(parsed(follow(field.split("."), body))):
            yield field, schema


def schemas_in(container: Any) -> Iterator[Any]:
    """Yield what is named `schema` or `json_schema` in a response format or a structural tag."""
    waiting = [container]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(value)
        for name, each in value.items() if isinstance(value, dict) else ():
            wraps = isinstance(each, dict) and "schema" in each  # OpenAI's json_schema has a name beside its schema
            if name == "schema" or (name == "json_schema" and not wraps):
                yield parsed(each)
            else:
                waiting.append(each)


def parsed(value: Any) -> Any:
    """Return what a field means that takes JSON as a text, too."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):  # vLLM says what is wrong with it
        return None
