"""What a tool declares, in every dialect of the known data: JSON Schema, ToolACE, BFCL, xLAM."""

import pytest

from corpus.schema import (
    json_type,
    lenient_arguments,
    not_in_enum,
    properties,
    required,
    undeclared,
    wrong_types,
)

FLAT = {  # xLAM
    "name": "f",
    "parameters": {
        "city": {"type": "str"}, "days": {"type": "int", "default": 3}, "unit": {"type": "str, optional"},
    },
}
NESTED = {  # ToolACE: the list of required parameters may stand inside or beside
    "name": "f",
    "parameters": {
        "type": "dict",
        "properties": {
            "city": {"type": "string"}, "days": {"type": "int"}, "unit": {"type": ["string", "null"]},
        },
        "required": ["city"],
    },
    "required": ["days", "ghost"],
}


@pytest.mark.parametrize("declared, kind", [
    ("str", "string"), ("int,optional", "integer"), ("Optional[float]", "number"), ("DICT", "object"),
    ("List[Union[int, float]]", "array"), ("Tuple[float, float], optional", "array"),
    (["string", "null"], "string"),
    (["string", "integer"], None),  # either: nothing to judge by
    ("Callable[[float], float]", None), ("Union[int, str]", None), ("List[int", None), (5, None),
])
def test_declared_types(declared, kind):
    assert json_type({"type": declared}) == kind


def test_properties_and_required_of_both_dialects():
    assert list(properties(FLAT)) == ["city", "days", "unit"] and required(FLAT) == ["city"]
    assert list(properties(NESTED)) == ["city", "days", "unit"] and required(NESTED) == ["days", "city"]


@pytest.mark.parametrize("parameters", [None, "text", {}, {"properties": None, "type": "dict"}])
def test_a_tool_without_readable_parameters_declares_nothing(parameters):
    tool = {"name": "f", "parameters": parameters}
    assert properties(tool) == {} and required(tool) == []
    assert wrong_types({"x": 1}, tool) == []


def test_flat_parameters_may_say_which_are_required():
    said = {"a": {"type": "str", "required": False}, "b": {"type": "str"}}
    assert required({"parameters": said}) == ["b"]
    assert required({"parameters": {"a": {"type": "str"}, "b": {"type": "str"}, "required": ["a"]}}) == ["a"]


def test_flat_parameters_may_be_called_type_or_properties():
    flat = {"type": {"type": "str"}, "properties": {"description": "", "type": "int"}}
    assert list(properties({"name": "f", "parameters": flat})) == ["type", "properties"]
    assert list(properties({"name": "f", "parameters": {"properties": flat["properties"]}})) == ["properties"]


@pytest.mark.parametrize("arguments, wrong", [
    ({"city": "Oslo", "days": 2}, []), ({"city": 5}, ["city: string declared, int given"]),
    ({"days": True}, ["days: integer declared, bool given"]),  # a truth value is no integer
    ({"days": 2.0}, ["days: integer declared, float given"]),
    ({"unit": None}, []),  # "optional": null says, none
    ({"days": None}, ["days: integer declared, NoneType given"]),  # a default is no null: a column's filling
    ({"city": None}, ["city: string declared, NoneType given"]), ({"ghost": object}, []),  # not declared
])
def test_wrong_types(arguments, wrong):
    assert wrong_types(arguments, FLAT) == wrong


def test_integers_are_numbers_and_null_needs_permission():
    tool = {"parameters": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}}
    assert wrong_types({"x": 1}, tool) == [] and wrong_types({"x": 1.5}, tool) == []
    assert wrong_types({"x": None}, tool) and wrong_types({"x": "1"}, tool)
    assert wrong_types({"unit": None}, NESTED) == []


def test_lenient_arguments_change_declared_numbers_only():
    kinds = {"a": "float", "b": "int", "c": "List[float]", "d": "Tuple[int, float]"}
    kinds |= {"f": "List[List[float]], optional", "g": "Tuple[float, float]"}
    tool = {"name": "f", "parameters": {name: {"type": kind} for name, kind in kinds.items()}}
    arguments = {"a": 1.0, "b": 1.0, "c": [1.0, "1", None], "d": [1.0, 1], "e": 1.0}
    arguments |= {"f": [[1.0]], "g": [1.0, 2.0]}
    changed = lenient_arguments(arguments, tool)
    expected = {"a": 1, "b": 1.0, "c": [1, "1", None], "d": [1.0, 1], "e": 1.0, "f": [[1]], "g": [1, 2]}
    assert repr(changed) == repr(expected)
    assert type(arguments["a"]) is float, "the record itself stays as it is"


@pytest.mark.parametrize("parameters, found", [
    ({"a": {"type": "int"}}, ["x"]), ({}, ["x"]), ({"type": "object", "properties": {}}, ["x"]),
    ({"type": "object", "properties": {}, "additionalProperties": True}, []), ({"type": "object"}, []),
    (None, []), ({"a": {"type": "int"}, "required": ["a"]}, ["x"]), ({"oneOf": [{"required": ["x"]}]}, []),
    ({"$ref": "#/$defs/A", "$defs": {"A": {}}}, []), ({"properties": {}, "patternProperties": {"x": {}}}, []),
    ({"properties": {"a": {}}, "additionalProperties": {}}, []),
    ({"properties": {"a": {}}, "additionalProperties": False}, ["x"]),
])
def test_an_argument_is_undeclared_only_where_a_tool_says_what_it_takes(parameters, found):
    assert undeclared({"x": 1}, {"name": "f", "parameters": parameters}) == found


@pytest.mark.parametrize("value, wrong", [
    ("b", 0), ("c", 1), (["a", "b"], 0), (["a", "c"], 1), (None, 0), ([], 0),
    ("1", 0), (2, 0), ("2.0", 1), ("", 0),  # as often declared as text; the default
])
def test_a_value_or_each_item_of_a_list_is_one_of_the_enum(value, wrong):
    tool = {"parameters": {"x": {"enum": ["a", "b", 1, "2"], "default": ""}, "y": {"enum": []}}}
    assert len(not_in_enum({"x": value, "y": 1}, tool)) == wrong
