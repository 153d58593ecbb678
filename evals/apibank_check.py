"""Judges one API-Bank reply in four modes, without running any tool.

The official scorer runs the predicted call on a toy database and lets the API compare the results; the table
COMPARED_AS says the same of the arguments. Sources: API-Bank (arXiv 2304.08244), ToolRL (arXiv 2504.13958).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from operator import eq
from typing import Any

from evals.apibank_data import GoldCall
from evals.bfcl_check import find_block
from prompts import ToolCall

Comparison = Callable[[Any, Any], bool]  # (predicted value, gold value) -> do they count as the same?
MODES = ("official", "corrected", "exact", "loose")  # see `judge`

WHY = {
    "no_tool_call": "there is no closed tool-call section",
    "bad_json": "the first tool-call section is not JSON",
    "not_one_call": "the first tool-call section does not hold exactly one call",
    "bad_call": "the call has no name that is a text, or no arguments that are an object",
    "wrong_name": "another API is called",
    "unknown_argument": "an argument that the API does not have",
    "missing_argument": "a required argument is missing",
    "wrong_type": "a value does not fit the type of its argument",
    "wrong_value": "the values of this argument differ",
    "official_rejects_gold": "the official tools reject the gold call itself",
}


def after(normalise: Callable[[str], Any], same: Comparison = eq) -> Comparison:
    """Compares two texts after `normalise`. What is no text or cannot be normalised (ValueError) differs."""

    def compare_texts(predicted: Any, gold: Any) -> bool:
        """Whether two values of an argument are texts that are the same once normalised. Never raises."""
        try:
            texts = isinstance(predicted, str) and isinstance(gold, str)
            return texts and same(normalise(predicted), normalise(gold))
        except ValueError:
            return False

    return compare_texts


def share_words(ours: str, theirs: str) -> bool:
    """More than half of all words (split at single spaces) that occur in either text occur in both."""
    left, right = set(ours.split(" ")), set(theirs.split(" "))
    return len(left & right) > 0.5 * len(left | right)


def month_and_day(text: str) -> tuple[int, int]:
    """Of MM-DD or YYYY-MM-DD. A leap year stands in where none is given, or 02-29 would not exist."""
    year, dash, rest = text.partition("-") if text.count("-") == 2 else ("2000", "-", text)
    return datetime.strptime(year.zfill(4) + dash + rest, "%Y-%m-%d").timetuple()[1:3]


def address(text: str) -> tuple[str, str]:
    """An email address in two parts. Only that of the host may be in capitals, or the official API fails."""
    user, _, host = text.strip().partition("@")
    return user, host.lower()


def known_tokens(predicted: Any, gold: Any) -> bool:
    """The same token, or two users' tokens: the official APIs ask for a user, not for the gold's user."""
    return predicted == gold or predicted in TOKENS and gold in TOKENS


def named_items(predicted: Any, gold: Any) -> bool:
    """A non-empty list of {"name", "value"} objects with different names; the official API asks no more."""
    items = predicted if isinstance(predicted, list) else []
    names = [item["name"] for item in items if isinstance(item, dict) and {"name", "value"} <= item.keys()]
    hashable = not any(isinstance(name, (list, dict)) for name in names)
    return hashable and 0 < len(items) == len(names) == len(set(names))


# Of all users in the official database.
TOKENS = """a9s8d7f6g5h4j3k2l1 o8i7u6y5t4r3e2w1q0 p9o8i7u6y5t4k3e2w1q z9x8c7v6b5n4m3q2w1 l9k8j7h6g5f4d3s2a1
m9n8b7v6c5x4z3a2s1 n9m8k7j6h5g4f3d2s1a0 o9i8u7y6t5r4e3w2q1 p9o8i7u6y5t4r3e2w1q q9w8e7r6t5y4u3i2o1""".split()

# What the APIs do with their input before they look into their databases. Not listed here: equal values.
COMPARED_AS: dict[Comparison, str] = {
    # more than half of the words in common
    after(str, share_words): "AddAgenda.content AddMeeting.meeting_topic ModifyMeeting.meeting_topic "
    "QueryMeeting.meeting_topic",
    after(str.lower, share_words): "AddReminder.content ModifyReminder.content QueryReminder.content",
    # not compared, or hardly
    lambda predicted, gold: True: "DeleteAgenda.location",
    after(str.strip, lambda ours, theirs: ours != ""): "DeleteReminder.content EmailReminder.content",
    named_items: "RecordHealthData.health_data",
    known_tokens: "AddAgenda.token AddReminder.token",
    # equal but for spaces or letter case
    after(str.strip): "AppointmentRegistration.patient_name AppointmentRegistration.doctor_name "
    "ModifyRegistration.appointment_id ModifyRegistration.new_appointment_doctor DocumentQA.url "
    "QueryRegistration.patient_name CancelRegistration.appointment_id DocumentQA.question SendEmail.subject "
    "SendEmail.content",
    after(str.lower): "Translate.src_lang Translate.tgt_lang",
    after(lambda text: text.strip().lower()): "DeleteScene.name QueryScene.name TimedSwitch.name "
    "CancelTimedSwitch.name EmergencyKnowledge.symptom SymptomSearch.symptom PlayMusic.music_name "
    "SearchEngine.keyword",
    after(address): "SendEmail.receiver",
    after(lambda text: text.strip().upper()): "QueryHealthData.user_id RecordHealthData.user_id "
    "QueryStock.stock_code",
    after(lambda text: text.replace(" ", "")): "Calculator.formula",
    after(lambda text: text.replace("_", " ").strip().lower()): "Dictionary.keyword Wiki.keyword",
    # equal points in time; strptime takes unpadded months and days, but no slashes, no ISO T, no date alone
    after(lambda text: datetime.strptime(text.strip(), "%Y-%m-%d")): "AppointmentRegistration.date "
    "QueryStock.date ModifyRegistration.new_appointment_date QueryRegistration.date",
    after(lambda text: datetime.strptime(text.strip(), "%Y-%m-%d %H:%M:%S")): "QueryHealthData.start_time "
    "QueryHealthData.end_time RecordHealthData.time TimedSwitch.time CancelTimedSwitch.time",
    after(lambda text: month_and_day(text.strip())): "QueryHistoryToday.date",
}
COMPARISONS = {name: same for same, names in COMPARED_AS.items() for name in names.split()}

# These golds name the device `device_id`, but the schema that the model is shown says `name`: officially such
# a gold is rejected, and so is every answer. The other modes take either name.
RENAMED = {"TimedSwitch": {"device_id": "name"}, "CancelTimedSwitch": {"device_id": "name"}}


def coerce(value: Any, kind: str) -> Any:
    """A value as the official tool manager hands it on. Refuses by ValueError, TypeError or OverflowError."""
    if kind in ("int", "float"):
        # Strings must consist of digits (and one point, for a float): no "-3", no " 3".
        if isinstance(value, str) and not value.replace(".", "", kind == "float").isdigit():
            raise ValueError("not an unsigned number")
        return int(value) if kind == "int" else float(value)
    if kind == "bool":
        # Officially `value == "True"`, but there all golds with a truth value are rejected.
        return {"True": True, "False": False}.get(value, value) if isinstance(value, str) else value
    return value


def json_items(text: str) -> list | None:
    """A JSON list, or another JSON value as a list of one; None for what is unreadable."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else [value]


def read_call(output: str) -> tuple[ToolCall | None, str]:
    """The one call of a reply -> (call, "") or (None, reason). Laxer than the reward."""
    block = find_block(output)
    if block is None:
        return None, "no_tool_call"
    if (items := json_items(block)) is None:
        return None, "bad_json"
    if len(items) != 1:
        return None, "not_one_call"
    call = items[0] if isinstance(items[0], dict) else {}
    if not isinstance(call.get("name"), str) or not isinstance(call.get("arguments"), dict):
        return None, "bad_call"
    return ToolCall(call["name"], call["arguments"]), ""


def compare(call: ToolCall, case: GoldCall, comparisons: dict[str, Comparison]) -> str:
    """Says "correct", or the first reason why `call` is not the gold call of `case`."""
    if call.name != case.gold.name:
        return "wrong_name"
    api, renamed = case.apis[call.name], RENAMED.get(call.name, {})
    kinds = {key: parameter["type"] for key, parameter in api["input_parameters"].items()}
    predicted = {renamed.get(key, key): value for key, value in call.arguments.items()}
    gold = {renamed.get(key, key): value for key, value in case.gold.arguments.items()}
    if not predicted.keys() <= kinds.keys() or len(predicted) < len(call.arguments):
        return "unknown_argument"
    if not set(api["required"]) <= predicted.keys():
        return "missing_argument"
    try:
        predicted = {key: coerce(value, kinds[key]) for key, value in predicted.items()}
    except (ValueError, TypeError, OverflowError):
        return "wrong_type"
    try:
        gold = {key: coerce(value, kinds.get(key, "")) for key, value in gold.items()}
    except (ValueError, TypeError, OverflowError):
        pass  # a gold value that the official code refuses is compared as it stands
    for key in sorted(predicted.keys() | gold.keys()):
        # An optional argument may be left out only where the gold does so: null and "" are values as well.
        both_given = key in predicted and key in gold
        if not both_given or not comparisons.get(f"{call.name}.{key}", eq)(predicted[key], gold[key]):
            return f"wrong_value:{key}"
    return "correct"


def compare_loosely(case: GoldCall, output: str) -> str:
    """ToolRL's protocol: any of several calls, without a name too, but values equal to the gold's strings."""
    block = find_block(output) or ""
    texts = {block, *block.splitlines()}  # one JSON value, or one object per line
    items = [item for text in texts for item in json_items(text) or []]
    for call in (item for item in items if isinstance(item, dict)):
        arguments = call.get("arguments", call.get("parameters"))  # ToolRL's own prompt says "parameters"
        if call.get("name", case.gold.name) == case.gold.name and arguments == case.written:
            return "correct"
    return "no_call_equals_gold"


def judge(case: GoldCall, output: str) -> dict[str, str]:
    """Mode -> "correct" or the first reason why not, for the reply `output`. Nothing in it can raise.

    official: as the official tools judge, which accept no answer where they reject the gold call itself;
    corrected: the same without that gate; exact: equal values after type coercion; loose: see
    compare_loosely. Reasons: those of WHY, wrong_value with a colon and the argument's name, and for loose
    no_call_equals_gold. Source: api-bank/evaluator.py, tool_manager.py and the APIs at 483554ea, without
    execution.
    """
    call, reason = read_call(output)
    official = corrected = exact = reason or compare(call, case, COMPARISONS)
    if corrected == "correct" or corrected.startswith("wrong_value"):  # others do not depend on the table
        exact = compare(call, case, {})
    if corrected == "correct" and case.rejected:
        official = "official_rejects_gold"
    return dict(zip(MODES, (official, corrected, exact, compare_loosely(case, output))))


def apibank_verdict(case: GoldCall, output: str, mode: str = "official") -> tuple[bool, str]:
    """(correct, reason) of one reply in one mode, see judge."""
    reason = judge(case, output)[mode]
    return reason == "correct", reason
