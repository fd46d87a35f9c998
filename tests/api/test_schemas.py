"""Schemas that describe no value."""

import json

import pytest

from melt_serve.api.schemas import find_endless, schemas_of

TREE = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}
SELF = {"$ref": "#/$defs/a"}
ENDLESS = [
    ({"$ref": "#"}, "#"),
    ({"anyOf": [{"$ref": "#"}, {"allOf": [{"type": "integer"}, {"$ref": "#"}]}]}, "#"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [SELF, {"allOf": [{"$ref": "#"}]}]}}}, "#/$defs/a"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [SELF]}}}, "#/$defs/a"),
    ({"properties": {"x/y": {"$ref": "#/properties/x~1y"}}}, "#/properties/x~1y"),
    ({"items": {"oneOf": [{"$ref": "#/items"}]}}, "#/items"),
    ({"$ref": 5, "allOf": [{"$ref": "#"}]}, "#"),
]
ENDING = [
    {},
    True,
    [],
    "text",
    TREE,
    {"anyOf": [{"type": "null"}, TREE]},
    {"anyOf": [{"type": "integer"}, {"$ref": "#"}]},
    {"oneOf": [True, {"$ref": "#"}]},
    {"type": "integer", "$defs": {"a": SELF}},
    {"$defs": {"a": {"type": "string"}}, "allOf": [SELF, SELF]},
    {"$ref": "#/$defs/missing"},
    {"$ref": "https://example.org/schema"},
    {"$ref": 3, "anyOf": "x"},
    {"anyOf": [{"$ref": "#/anyOf/7"}, {"$ref": "#/anyOf/x"}, {"$ref": "#/anyOf/" + "9" * 5000}]},
    {"anyOf": []},
]


@pytest.mark.parametrize(("schema", "reference"), ENDLESS)
def test_a_reference_to_itself_with_no_value_between_is_found(schema, reference):
    assert find_endless(schema) == reference


@pytest.mark.parametrize("schema", ENDING)
def test_any_other_schema_is_let_through(schema):
    assert find_endless(schema) is None


@pytest.mark.parametrize("order", [1, -1])
def test_a_deep_chain_is_followed_in_time_that_grows_with_its_length(order):
    links = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(20_000)}
    links = dict(list(links.items())[::order])
    assert find_endless({"$defs": links | {"a20000": {"type": "null"}}, "$ref": "#/$defs/a0"}) is None
    assert find_endless({"$defs": links | {"a20000": {"$ref": "#/$defs/a0"}}, "$ref": "#/$defs/a0"}) is not None


def test_schemas_are_found_wherever_a_route_takes_them():
    a = {"type": "null"}
    body = {
        "structured_outputs": {"json": json.dumps(a), "structural_tag": json.dumps({"structures": [{"schema": a}]})},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": a}},
        "text": {"format": {"schema": a}},
        "output_config": {"format": {"tags": [{"content": {"json_schema": a}}]}},
        "sampling_params": {"structured_outputs": {"json": a}},
        "tools": [{"function": {"parameters": a}}, {"parameters": a}, {"input_schema": a}, 7],
    }
    assert [value for _, value in schemas_of(body)] == [a] * 9
    assert "tools.2.input_schema" in [name for name, _ in schemas_of(body)]
    assert not list(schemas_of({"structured_outputs": {"json": "{"}, "tools": 3, "text": [], "response_format": 5}))
