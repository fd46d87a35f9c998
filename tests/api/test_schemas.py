"""Schemas of which no grammar can be made."""

import json

import pytest

from melt_serve.api.schemas import find_endless, schemas_of

TREE = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}
ENDLESS = [
    ({"$ref": "#"}, "#"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}}, "#/$defs/a"),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}}, "#/$defs/b"),
    ({"properties": {"x/y": {"$ref": "#/properties/x~1y"}}}, "#/properties/x~1y"),
    ({"anyOf": [{"type": "string"}, {"oneOf": [{"$ref": "#/anyOf/1"}]}]}, "#/anyOf/1"),
]
ENDING = [
    {},
    True,
    [],
    "text",
    TREE,
    {"anyOf": [{"type": "null"}, TREE]},
    {"$defs": {"a": {"type": "string"}}, "allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]},
    {"$ref": "#/$defs/missing"},
    {"$ref": "https://example.org/schema"},
    {"$ref": 3, "anyOf": "x"},
    {"anyOf": [{"$ref": "#/anyOf/7"}, {"$ref": "#/anyOf/x"}]},
]


@pytest.mark.parametrize(("schema", "reference"), ENDLESS)
def test_a_reference_to_itself_with_no_value_between_is_found(schema, reference):
    assert find_endless(schema) == reference


@pytest.mark.parametrize("schema", ENDING)
def test_any_other_schema_is_let_through(schema):
    assert find_endless(schema) is None


def test_a_deep_chain_is_followed_without_recursion():
    links = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(20_000)}
    assert find_endless({"$defs": links | {"a20000": {"type": "null"}}}) is None
    assert find_endless({"$defs": links | {"a20000": {"$ref": "#/$defs/a0"}}}) is not None


def test_schemas_are_found_wherever_a_route_takes_them():
    a = {"type": "null"}
    body = {
        "structured_outputs": {"json": json.dumps(a)},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": a}},
        "text": {"format": {"schema": a}},
        "sampling_params": {"structured_outputs": {"json": a}},
        "tools": [{"function": {"parameters": a}}, {"parameters": a}, {"input_schema": a}, 7],
    }
    assert [value for _, value in schemas_of(body)] == [a] * 7
    assert [name for name, _ in schemas_of(body)][-1] == "tools.2.input_schema"
    assert not list(schemas_of({"structured_outputs": {"json": "{"}, "tools": 3, "text": []}))
