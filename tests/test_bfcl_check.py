"""evals/bfcl_check.py against 17,280 official verdicts, and each rule of the official checker as one line."""

import gzip
import json
from dataclasses import replace

import pytest
from bfcl_cases import DATA, GOLDEN, needs_shared, problem, reply

from evals.bfcl_check import Problem, bfcl_verdict, decode, find_fault, reply_kind
from evals.bfcl_data import load_problems


@needs_shared
def test_every_golden_verdict_and_error_type():
    problems, different = load_problems(DATA), []
    with gzip.open(GOLDEN, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        if (found := bfcl_verdict(problems[row["id"]], row["output"])) != (row["valid"], row["error_type"]):
            different.append((row["id"], row["kind"], row["error_type"], found))
    assert len(rows) == 17280
    assert not different, different[:5]


SIMPLE, NESTED = "type_error:simple", "type_error:nested"
OTHERS, STRING, LIST = "value_error:others", "value_error:string", "value_error:list/tuple"
KEY, VALUE = "value_error:dict_key", "value_error:dict_value"

PYTHON_RULES = [  # declared type (with that of its elements), allowed values, value, error
    ("integer", [5], 5.0, SIMPLE),
    ("integer", [5.0], 5.0, None),  # the type of the first allowed value counts as well
    ("integer", [1], True, SIMPLE),
    ("boolean", [True], 1, SIMPLE),
    ("float", [1.0], 1, None),  # an integer becomes a float at the top level ...
    ("array float", [[1.0, 2.0]], [1, 2], NESTED),  # ... but not inside a list
    ("float", [1.0], 10**400, SIMPLE),  # the official checker crashes
    ("float", [1.0], float("nan"), OTHERS),
    ("string", ["New York, NY"], "new-york ny.", None),
    ("string", ["abcdefgh"], "a b,c.d/e-f_g*h^", None),
    ("string", ["10:30"], "1030", STRING),
    ("string", ["a'ς"], "A'Σ", None),  # in lower case before the quotes become the same
    ("string", ["a", ""], "", None),
    ("integer", [1, ""], "", SIMPLE),
    ("array string", [["a"], ""], [], None),
    ("string", [2], 2, None),
    ("integer", ["dontcare"], "DontCare", OTHERS),  # a variable's name is compared as it is
    ("dict", [{"a": [1]}], {"a": True}, None),
    ("dict", [{"a": [["X"]]}], {"a": ["x"]}, VALUE),  # strings in lists in a dict are compared as they are
    ("dict", [{"a": [1]}], {"A": 1}, KEY),
    ("dict", [{"a": [1], "b": [2, ""]}], {"a": 1}, None),
    ("dict", [{"a": [1], "b": [2]}], {"a": 9}, KEY),  # a missing key hides a wrong value
    ("array string", [["a", "b"]], ["b", "a"], LIST),
    ("array dict", [[{"a": [1]}, {"a": [2]}]], [{"a": 2}, {"a": 1}], VALUE),
    ("array string", [["a"], "var"], [1], LIST),  # "var" vouches for the elements' types, not their values
    ("array dict", ["", [{"a": [1]}]], [1], NESTED),  # as does ""; the official checker crashes
]
JAVA_RULES = [
    ("integer", [1], 1, "type_error:java"),
    ("integer", [1], "1", None),
    ("integer", [1], "9" * 5000, SIMPLE),  # more digits than Python converts
    ("long", [1], "1L", None),
    ("boolean", [True], "True", SIMPLE),
    ("String", ["a"], '"a"', STRING),
    ("Array String", [["-v"]], 'new String[]{"-v"}', LIST),
    ("Array String", [["-v"]], "new String[]{-v}", None),
    ("Array integer", [[1, 2]], "new int[]{1, 2,}", None),
    ("ArrayList String", [["a", "b"]], 'new ArrayList<>(Arrays.asList("a", "b"))', None),
    ("ArrayList String", [["a"]], 'new ArrayList<String>() {{ add("a"); }}', None),
    ("ArrayList String", [["a"]], 'Arrays.asList("a")', SIMPLE),
    ("ArrayList long", [[1, 2]], "new ArrayList<>(Arrays.asList(1L, 2L))", None),
    ("HashMap", ["options"], "options", None),
    ("HashMap", [{"a": [1], "b": ["x"]}], 'new HashMap<>() {{ put("a", 1); put("b", "x"); }}', None),
    ("HashMap", [{"b": [2]}], 'new HashMap<>() {{ put("a);\nput("b", 2L); }}', None),
    ("HashMap", [{"a": [2.0]}], 'new HashMap<>() {{ put("a", 2f); }}', None),
    ("HashMap", ["options"], "Options", OTHERS),
    ("HashMap", [{"a": ["b"]}], 'new HashMap<String,\n Object>() {{ put("a", "b"); }}', None),
    ("HashMap", [{}], "new HashMap<String,\n Object>()", SIMPLE),  # without a body, the type is in one line
    ("ArrayList String", [["x"]], 'new ArrayList<>() {{ }} {{ add("x"); }}', None),
    ("ArrayList long", [[1]], 'new ArrayList<>() {{ }} {{ add("x"); }}', NESTED),
    ("ArrayList String", [[]], "new ArrayList<>() {{ }}", None),
    ("ArrayList String", [[]], 'new ArrayList<>() {{ add("x"); ', None),
    ("Array ArrayList", [[["a"]]], 'new Object[]{new ArrayList<>(Arrays.asList("a"))}', None),
]
JAVASCRIPT_RULES = [
    ("integer", [1], 1, "type_error:js"),
    ("integer", [1], "1", None),
    ("integer", [5], "5.0", SIMPLE),
    ("array String", [["a", "b"]], "['a', \"b\"]", None),
    ("array String", [["a", "b"]], '["a",\n"b"]', SIMPLE),
    ("array float", [[[1.0], [2.0]]], "[[1.0],\n[2.0]]", None),  # lists, as in the answer
    ("array float", [[[1.0], [2.0]]], "[\n[[1.0], [2.0]]", None),
    ("array float", [[[1.0], [2.0]]], "new Array([[1.0], [2.0]])", None),
    ("array float", [[[1.0], [2.0]]], "new Array([\n[1.0],\n[2.0]\n])", SIMPLE),
    ("array integer", [[1, 2]], "new Array(1, 2)", None),
    ("array integer", [f"[{'9' * 5000}]"], f" [{'9' * 5000}]", None),  # stays text
    ("dict", [{"a": [1]}], "{a: 1} garbage", None),
    ("dict", [{"a": ["x, y"], "b": [[1, 2]]}], '{"a": "x, y", b: [1, 2]}', None),
    ("dict", [{"a": [{"b": 1}]}], "{a: {b: 1}}", VALUE),
    ("dict", [{}], "{a}", None),
]
RULES = {"python": PYTHON_RULES, "java": JAVA_RULES, "javascript": JAVASCRIPT_RULES}
CASES = [(f"simple_{language}", *rule) for language, rules in RULES.items() for rule in rules]


@pytest.mark.parametrize(("category", "declared", "allowed", "value", "error"), CASES)
def test_rule_of_values(category, declared, allowed, value, error):
    kind, _, item = declared.partition(" ")  # "array float": its elements are floats
    case = problem(kind, allowed, item or None, category)
    assert bfcl_verdict(case, reply(("f", {"p": value}))) == (error is None, error)


CHECKER, PARALLEL = "simple_function_checker", "parallel_function_checker_no_order"
ONE, TWO = ("f", {"p": 1}), ("f", {"p": 2})
F = problem("integer", [1])
NAMED = replace(F, answer=[{"F": {"p": [1]}}])  # a simple case's function counts, the answer's name does not
CHOICE = replace(F, category="multiple", functions=[{**F.functions[0], "name": "other"}, *F.functions])
PAIR = replace(F, category="parallel", answer=[{"f": {"p": [1, 2]}}, {"f": {"p": [1]}}])
SECOND_FIRST = replace(PAIR, answer=[{"f": {"p": [2]}}, {"f": {"p": [1]}}])
CALL_RULES = [  # case, calls, error
    (F, [ONE], None),
    (F, [("F", {"p": 1})], f"{CHECKER}:wrong_func_name"),
    (F, [("f", {})], f"{CHECKER}:missing_required"),
    (F, [("f", {"q": 1, "p": 2})], f"{CHECKER}:unexpected_param"),
    (F, [("f", {"p": 2, "q": 1})], OTHERS),  # in the model's order: p comes first
    (NAMED, [ONE], None),
    (CHOICE, [ONE], None),
    (CHOICE, [("other", {"p": 1})], f"{CHECKER}:wrong_func_name"),
    (replace(F, category="parallel"), [ONE] * 2, f"{PARALLEL}:wrong_count"),
    (replace(F, category="parallel_multiple"), [TWO], f"{PARALLEL}:cannot_find_match"),
    (PAIR, [ONE, TWO], f"{PARALLEL}:cannot_find_match"),  # matched greedily
    (PAIR, [TWO, ONE], None),
    (SECOND_FIRST, [TWO, ONE], None),
    (SECOND_FIRST, [ONE, TWO], None),  # in another order than the answers
    # only an optional parameter with an empty string may be left out
    (problem("integer", [1, ""]), [("f", {})], f"{CHECKER}:missing_required"),
    (problem("integer", [1, ""], required=False), [("f", {})], None),
    (problem("integer", [1], required=False), [("f", {})], f"{CHECKER}:missing_optional"),
]


@pytest.mark.parametrize("case, calls, error", CALL_RULES, ids=range(len(CALL_RULES)))
def test_call_rule(case, calls, error):
    assert bfcl_verdict(case, reply(*calls)) == (error is None, error)


def test_a_parameter_must_be_in_the_documentation_and_in_the_answer():
    case = problem("integer", [1])
    case.functions[0]["parameters"]["properties"]["q"] = {"type": "integer"}
    both = reply(("f", {"p": 1, "q": 1}))
    assert bfcl_verdict(case, both) == (False, f"{CHECKER}:unexpected_param")
    case.answer[0]["f"]["q"] = [1]
    assert bfcl_verdict(case, both) == (True, None)
    assert bfcl_verdict(case, reply(TWO)) == (False, OTHERS)  # told before a missing parameter
    assert bfcl_verdict(case, reply(ONE)) == (False, f"{CHECKER}:missing_optional")


DECODE, FORMAT = "ast_decoder:decoder_failed", "ast_decoder:decoder_wrong_output_format"
GOOD = '[{"name": "f", "arguments": {"p": 1}}]'
OUTPUTS = [  # output, error
    (f"<tool_call>{GOOD}</tool_call>", None),
    (f"<think><tool_call>\n{GOOD}\n</tool_call> and so on", None),
    (f"<tool_call>[]</tool_call><tool_call>{GOOD}</tool_call>", "simple_function_checker:wrong_count"),
    (f"<tool_call>{GOOD}", DECODE),
    (GOOD, DECODE),
    ('<tool_call>{"name": "f", "arguments": {"p": 1}}</tool_call>', DECODE),
    ('<tool_call>""</tool_call>', "simple_function_checker:wrong_count"),  # iterates to no calls
    ('<tool_call>[{"name": null, "arguments": {}}]</tool_call>', "simple_function_checker:wrong_func_name"),
    ('<tool_call>[{"name": "f", "arguments": "p"}]</tool_call>', FORMAT),
    ('<tool_call>[{"name": "f", "arguments": {"p": 2}, "arguments": {"p": 1}, "id": 3}]</tool_call>', None),
    (f"<tool_call>{'[' * 100000}</tool_call>", DECODE),
    (f"<tool_call>[{'9' * 5000}]</tool_call>", DECODE),
]


@pytest.mark.parametrize(("output", "error"), OUTPUTS, ids=range(len(OUTPUTS)))
def test_decoding(output, error):
    assert bfcl_verdict(problem("integer", [1]), output) == (error is None, error)


REPLY_KINDS = [
    (reply(("f", {})), "called"),
    (reply(), "empty_list"),
    ("No function fits.", "no_block"),
    ("<tool_call>{}</tool_call>", "unparsable"),  # officially no call as well, but not what was asked for
    ('<tool_call>[{"name": "f", "arguments": "p"}]</tool_call>', "unparsable"),
]


@pytest.mark.parametrize(("output", "kind"), REPLY_KINDS)
def test_no_call_has_three_kinds(output, kind):
    """All three are officially correct refusals, so a broken format would pass for restraint."""
    assert reply_kind(output, decode(output)) == kind
    called = kind == "called"
    for category in ("irrelevance", "live_irrelevance"):
        error = "irrelevance_error:decoder_success" if called else None
        assert bfcl_verdict(Problem("i", category, [], [], []), output) == (not called, error)
    error = None if called else "relevance_error:decoder_failed"
    assert bfcl_verdict(Problem("i", "live_relevance", [], [], []), output) == (called, error)


def test_a_value_nested_as_deeply_as_json_can_be_read_is_no_crash():
    """Reading JSON and printing it again have the same limit, but at different depths of the stack."""
    for depth in range(900, 1000):
        output = f'<tool_call>[{{"name": "f", "arguments": {{"p": {"[" * depth}{"]" * depth}}}}}]</tool_call>'
        assert bfcl_verdict(problem("integer", [1]), output) in ((False, SIMPLE), (False, DECODE))
    value = []
    for _ in range(100_000):
        value = [value]
    _, words = find_fault(problem("integer", [1]), [{"f": {"p": value}}])
    assert words.startswith("p is a deeply nested value, but")
