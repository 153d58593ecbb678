"""API-Bank's checker: each comparison rule, reason and mode as one line, and outputs that must not raise."""

import pytest

from evals.apibank_check import MODES, apibank_verdict
from evals.apibank_data import GoldCall
from prompts import ToolCall, render_calls

KINDS = {"count": "int", "on": "bool", "degrees": "float", "attendees": "list(str)", "health_data": "list"}


def make_case(name: str, gold: dict, optional: tuple = (), accepts: bool = True) -> GoldCall:
    inputs = {key: {"type": KINDS.get(key, "str"), "description": f"the {key}"} for key in (*gold, *optional)}
    required = [key for key in inputs if key not in optional]
    api = {"name": name, "description": "an API", "input_parameters": inputs, "required": required}
    written, why = {k: str(v) for k, v in gold.items()}, "" if accepts else "a reason"
    return GoldCall("case", 1, ToolCall(name, gold), written, {name: api}, [], [], why)


def reply(name: str, arguments: dict) -> str:
    return f"<think>so</think>{render_calls([ToolCall(name, arguments)])}"


@pytest.mark.parametrize("parameter, gold, predicted, correct", [
    ("AddAgenda.content", "Meeting with John today", "Meeting with John", True),  # 3 of 4 words
    ("AddAgenda.content", "Meeting John", "Meeting Mary John Ann", False),  # exactly half is too little
    ("AddReminder.content", "Call mom", "CALL MOM", True),
    ("DeleteAgenda.location", "office", "anywhere", True),
    ("DeleteReminder.content", "Call mom", "  ", False),
    ("AppointmentRegistration.date", "2023-03-05", "2023-3-5", True),
    ("BookHotel.check_in_time", "2023-03-05", "2023-3-5", False),  # no rule: equal text
    ("RecordHealthData.time", "2023-03-05 09:00:00", "2023-3-5 9:00:00", True),
    ("RecordHealthData.health_data", [{"name": "a", "value": "1"}], [{"name": "b", "value": "2"}], True),
    ("RecordHealthData.health_data", [], [{"name": "b", "value": "2"}] * 2, False),
    ("RecordHealthData.health_data", [], [{"name": None, "value": "2"}], True),
    ("RecordHealthData.health_data", [], [{"name": [], "value": "2"}], False),
    ("Calculator.formula", "(1+2)*3", "(1 + 2) * 3", True),
    ("Dictionary.keyword", "deep learning", "Deep_Learning ", True),
    ("SendEmail.subject", "Hello", "hello", False),
    ("SendEmail.receiver", "john@example.com", " john@EXAMPLE.COM", True),
    ("SendEmail.receiver", "john@example.com", "JOHN@EXAMPLE.COM", False),
    ("AddAgenda.token", "a9s8d7f6g5h4j3k2l1", "o8i7u6y5t4r3e2w1q0", True),  # another user's
    ("AddAgenda.token", "a9s8d7f6g5h4j3k2l1", "a9s8", False),
    ("AddAlarm.token", "a9s8d7f6g5h4j3k2l1", "o8i7u6y5t4r3e2w1q0", False),
    ("QueryHistoryToday.date", "10-06", "23-10-6", True),
    ("QueryHistoryToday.date", "10-06", "1-23-10-06", False),
    ("AddMeeting.attendees", ["Ann", "Bob"], ["Bob", "Ann"], False),
    ("BookHotel.count", 2, "2", True),  # numbers may be written as digits
    ("Weather.degrees", "10", 10, True),
    ("Weather.degrees", -3, "-3", False),
    ("Lamp.on", True, "True", True),
])
def test_comparison(parameter, gold, predicted, correct):
    name, key = parameter.split(".")
    assert apibank_verdict(make_case(name, {key: gold}), reply(name, {key: predicted}))[0] is correct


CALL = '{"name": "Get", "arguments": {"x": "1"}}'


@pytest.mark.parametrize("output, reason", [
    (f"<tool_call>[{CALL}]</tool_call>", "correct"),
    (f"text <tool_call>\n {CALL}\n</tool_call> text", "correct"),  # one object counts as a list of one
    (f"<think><tool_call>{CALL}</tool_call></think>", "correct"),  # thoughts are not scored
    (f"<tool_call>{CALL}</tool_call><tool_call>[]</tool_call>", "correct"),  # the first section decides
    (f"<tool_call>[]</tool_call><tool_call>{CALL}</tool_call>", "not_one_call"),
    (f"<tool_call>[{CALL}, {CALL}]</tool_call>", "not_one_call"),
    ("<tool_call></tool_call>", "bad_json"),
    (f"<tool_call>{CALL}", "no_tool_call"),
    ('<tool_call>[{"name": "Get", "parameters": {"x": "1"}}]</tool_call>', "bad_call"),
    ('<tool_call>[{"name": "get", "arguments": {"x": "1"}}]</tool_call>', "wrong_name"),
    ('<tool_call>[{"name": "Get", "arguments": {}}]</tool_call>', "missing_argument"),
    ('<tool_call>[{"name": "Get", "arguments": {"x": "1", "y": ""}}]</tool_call>', "unknown_argument"),
    ('<tool_call>[{"name": "Get", "arguments": {"x": 1}}]</tool_call>', "wrong_value:x"),
])
def test_reason(output, reason):
    assert apibank_verdict(make_case("Get", {"x": "1"}), output) == (reason == "correct", reason)


@pytest.mark.parametrize("blank", [None, ""])
def test_an_optional_argument_is_given_where_the_gold_gives_it(blank):
    """null and "" do not count as absent."""
    case = make_case("Translate", {"src": "Hello", "tgt_lang": "fr"}, optional=("src_lang", "tgt_lang"))
    output = reply("Translate", {"src": "Hello", "tgt_lang": "fr", "src_lang": blank})
    assert apibank_verdict(case, output) == (False, "wrong_value:src_lang")
    assert apibank_verdict(case, reply("Translate", {"src": "Hello"})) == (False, "wrong_value:tgt_lang")
    required = make_case("Get", {"x": "0"})
    assert apibank_verdict(required, reply("Get", {"x": blank})) == (False, "wrong_value:x")


def test_switch_takes_either_name_of_the_device_but_not_both():
    """The gold says device_id, the schema that the model sees says name; officially nothing passes."""
    case = make_case("TimedSwitch", {"name": "10"}, accepts=False)
    for keys, right in ((["name"], True), (["device_id"], True), (["name", "device_id"], False)):
        output = reply("TimedSwitch", dict.fromkeys(keys, "10"))
        assert apibank_verdict(case, output, "corrected")[0] is right
        assert apibank_verdict(case, output)[0] is False


@pytest.mark.parametrize("name, gold, predicted, accepts, reasons", [
    ("Get", "1", "1", False, ("official_rejects_gold", "correct", "correct")),
    ("Get", "1", "2", False, ("wrong_value:x",) * 3),
    ("Calculator", "1+2", "1 + 2", True, ("correct", "correct", "wrong_value:formula")),  # by no rule
    ("QueryStock", "soon", "soon", True, ("wrong_value:date", "wrong_value:date", "correct")),  # no date
])
def test_official_corrected_and_exact_mode(name, gold, predicted, accepts, reasons):
    key = {"Get": "x", "Calculator": "formula", "QueryStock": "date"}[name]
    case = make_case(name, {key: gold}, accepts=accepts)
    found = [apibank_verdict(case, reply(name, {key: predicted}), mode) for mode in MODES[:3]]
    assert found == [(reason == "correct", reason) for reason in reasons]


@pytest.mark.parametrize("block, correct", [
    # any call of a list, or of an object per line
    ('[{"name": "Other", "arguments": {}}, {"name": "Book", "arguments": {"count": "2"}}]', True),
    ('{"name": "Other", "parameters": {}}\n{"name": "Book", "parameters": {"count": "2"}}', True),
    ('{"parameters": {"count": "2"}}', True),  # the missing name is filled in
    ('{"name": "Book", "arguments": {"count": 2}}', False),  # golds are strings, so numbers fail
])
def test_loose_mode(block, correct):
    case, output = make_case("Book", {"count": 2}), f"<tool_call>{block}</tool_call>"
    assert apibank_verdict(case, output, "loose")[0] is correct


HUGE = ('"' + "9" * 10_000 + '"', "9" * 4_000, "[" * 900 + "]" * 900)
VALUES = ["Infinity", "NaN", "1e999", '"\u00b2"', "[]", "{}", '"\\ud800"', *HUGE]
HOSTILE = [
    "<tool_call>" + "[" * 100_000 + "]" * 100_000 + "</tool_call>",
    "<tool_call>" * 200_000,  # quadratic for a regular expression
    "<tool_call>" + "9" * 10_000 + "</tool_call>",
    *(f'<tool_call>[{{"name": "Book", "arguments": {{"count": {value}}}}}]</tool_call>' for value in VALUES),
]


@pytest.mark.parametrize("output", HOSTILE, ids=lambda output: repr(output)[-70:-25])
@pytest.mark.parametrize("key", ["count", "degrees", "on", "health_data", "plain"])
def test_no_output_raises(output, key):
    name = "RecordHealthData" if key == "health_data" else "Book"
    text = output.replace("Book", name).replace("count", key)
    for mode in MODES:
        assert apibank_verdict(make_case(name, {key: "gold"}), text, mode)[0] is False
