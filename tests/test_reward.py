"""The reward: what pays, what does not, and why. Every hole of the released reward is one line here."""

import gzip
import json
import random
import re
import sys
from pathlib import Path

import pytest

import data
from config import UserError
from evals.published_rewards import PUBLISHED
from evals.reference_reward import REFERENCE
from prompts import ToolCall, render_completion
from reward import REWARDS, RewardError, Variant, main, reward_function, score

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "reward_verdicts.jsonl.gz"

ANSWER = [{"name": "book", "arguments": {"city": "Oslo", "days": 2}}]
CALL = '{"name": "book", "arguments": {"city": "Oslo", "days": 2}}'
BLOCK = f"<tool_call>[{CALL}]</tool_call>"
THINK = "<think>Oslo, two days.</think>"
GOOD = THINK + BLOCK
OURS = [name for name, row in REWARDS.items() if isinstance(row, Variant)]


def with_calls(listed: str) -> str:
    """A reply with a thought and `listed` as the text of its tool-call section."""
    return f"{THINK}<tool_call>{listed}</tool_call>"


def with_value(value: str) -> str:
    """A reply that calls f(x=value), `value` being JSON text."""
    return with_calls(f'[{{"name": "f", "arguments": {{"x": {value}}}}}]')


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (GOOD, ANSWER),
        (f"\n{THINK}\n{BLOCK}<|im_end|>\n", ANSWER),
        (with_calls("[]"), []),
        (with_calls('[{"arguments": {"days": 2, "city": "Oslo"}, "name": "book"}]'), ANSWER),
        (with_value('"</tool_call>"'), [ToolCall("f", {"x": "</tool_call>"})]),
        (with_value('"\\u00e9\\ud83d\\ude00"'), [ToolCall("f", {"x": "é😀"})]),
    ],
    ids=["format", "white space and end token", "no call", "order of keys", "tag in a value", "escapes"],
)
def test_right_calls_with_a_thought_pay_one(completion, answer):
    reward = score(completion, answer)
    assert (reward.total, reward.format_ok, reward.correct, reward.reason) == (1.0, True, True, "correct")


HOLES = [  # what the released reward (v0) pays for, and ours does not
    ("empty thought", f"<think></think>{BLOCK}", "empty_think"),
    ("tags reversed", f"</think>Oslo.<think>{BLOCK}", "text_before_think"),
    ("call in the thought", f"<think>a{BLOCK}b</think>", "tag_in_think"),
    ("text before", f"Sure! {GOOD}", "text_before_think"),
    ("text after", f"{GOOD} Done!", "text_after_tool_call"),
    ("a turn goes on", f"{GOOD}<|im_end|>\n<|im_start|>user\nThanks!", "text_after_tool_call"),
    ("right block last", f"{THINK}<tool_call>[]</tool_call>{BLOCK}", "several_tool_calls"),
    ("double-encoded JSON", with_calls(json.dumps(f"[{CALL}]")), "not_a_list"),
    ("extra key", with_calls(f'[{CALL[:-1]}, "id": 1}}]'), "bad_call"),
    ("duplicate key", with_calls(f'[{{"name": "other", {CALL[1:]}]'), "bad_json"),
    ("byte order mark before", "\ufeff" + GOOD, "text_before_think"),
]
UNREAD = [  # what neither pays for; more in test_prompts.py
    ("NaN", with_value("NaN"), "bad_json"),
    ("more than 4300 digits", with_value("9" * 5000), "bad_json"),
    ("raw newline in a value", with_value('"a\nb"'), "bad_json"),
    ("lone surrogate as a value", with_value('"\ud800"'), "wrong_name"),
]


@pytest.mark.parametrize(("name", "completion", "reason"), HOLES + UNREAD, ids=lambda x: str(x)[:30])
def test_hole_pays_nothing(name, completion, reason):
    reward = score(completion, ANSWER)
    assert (reward.total, reward.reason) == (0.0, reason)
    assert score(completion, ANSWER, lenient=True).reason == reason, "lenient changes how numbers compare"
    assert score(completion, ANSWER, "tool_n1_v0").total == float((name, completion, reason) in HOLES)


def test_no_depth_of_nesting_raises():
    """Where the parser just allowed a depth, comparing needed a few stack frames more, and raised."""
    for depth in [*range(1100), *range(1100, 60_000, 4999)]:
        for value in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
            score(with_value(value), [ToolCall("f", {"x": 1})])


@pytest.mark.parametrize("variant", OURS)
def test_neither_silence_nor_bare_tags_pay(variant):
    bare = "<think></think><tool_call></tool_call>"
    for silent in ("", THINK, f"{THINK}I cannot help.", bare, with_calls(""), with_calls("null")):
        assert score(silent, [], variant).total == score(silent, ANSWER, variant).total == 0.0


@pytest.mark.parametrize(
    ("truth", "value", "equal"),
    [
        (1, "1", True), (1, "1.0", False), (1.0, "1", False), (100.0, "1e2", True), (True, "1", False),
        (0, "false", False), (None, '"null"', False), (5, '"5"', False), ("5", "5", False),
        (0.0, "-0.0", False), (0, "-0", True),  # JSON's integers have one zero
        ("é", '"e\u0301"', False), ("é", '"\\u00e9"', True),  # NFD is not NFC: a tool would get other bytes
        ("a", '"A"', False), ("a", '"a "', False), ([1, 2], "[2, 1]", False), ([], "{}", False),
        ({"a": 1, "b": 2}, '{"b": 2, "a": 1}', True), ({"a": None}, "{}", False),
        (10**30, "1" + "0" * 30, True), (2**53, str(2**53 + 1), False),  # as floats they would be equal
    ],
)
def test_when_values_are_equal(truth, value, equal):
    reward = score(with_value(value), [ToolCall("f", {"x": truth})])
    assert reward.reason == ("correct" if equal else "wrong_arguments") and reward.total == float(equal)


@pytest.mark.parametrize(
    ("answered", "truth", "reason"),
    [("a", "", "called_without_need"), ("", "a", "no_call"), ("a", "aa", "wrong_number"),
     ("aab", "abb", "wrong_name"), ("ab", "ba", "correct")],
)
def test_calls_are_compared_as_a_multiset(answered, truth, reason):
    calls = [ToolCall(name, {}) for name in answered]
    assert score(render_completion(calls, "so"), [ToolCall(name, {}) for name in truth]).reason == reason


TYPES = {"x": {"type": "number"}, "count": {"type": "integer"}, "anything": {},
         "list": {"type": "array", "items": {"type": "number"}}}
TOOL = {"name": "f", "parameters": {"type": "object", "properties": TYPES}}


@pytest.mark.parametrize(
    ("name", "truth", "given", "equal"),
    [("x", 2, 2.0, True), ("x", 2.0, "2", False), ("x", 0.0, -0.0, True), ("x", 2**53, 2**53 + 1, False),
     ("count", 2, 2.0, False), ("list", [1, 2.5], [1.0, 2.5], True), ("anything", 1, 1.0, False)],
)
def test_lenient_compares_numbers_by_the_declared_type(name, truth, given, equal):
    completion = render_completion([ToolCall("f", {name: given})], "so")
    assert score(completion, [ToolCall("f", {name: truth})], lenient=True, tools=[TOOL]).correct == equal


# Right with a thought, right without, names right with, wrong with, wrong without, unreadable with a thought:
NO_CALL = "<tool_call>[]</tool_call>"
COMPLETIONS = (GOOD, BLOCK, GOOD.replace("2", "3"), THINK + NO_CALL, NO_CALL, with_calls("oops"))
TABLE = {
    "binary": (1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "no_reason": (1.0, 1.0, 0.0, 0.0, 0.0, 0.0),
    "partial_format": (1.0, 0.8, 0.2, 0.2, 0.0, 0.0),
    "partial_names": (1.0, 0.8, 0.4, 0.2, 0.0, 0.0),
    "none": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
}


@pytest.mark.parametrize("variant", OURS)
def test_the_table_of_variants(variant):
    rewards = [score(completion, ANSWER, variant) for completion in COMPLETIONS]
    assert [reward.total for reward in rewards] == pytest.approx(TABLE[variant])
    # without a thought only a variant that pays in full for it gives the reason "correct"
    assert rewards[1].reason == ("correct" if variant == "no_reason" else "no_think")


@pytest.mark.parametrize("answer", [None, "[]", {}, [None], [{"name": "f"}], [{"arguments": {}}]])
def test_a_broken_ground_truth_raises(answer):
    with pytest.raises(ValueError, match="answer"):
        score(GOOD, answer)


@pytest.fixture(scope="module")
def golden() -> list[dict]:
    if not GOLDEN.exists():
        pytest.skip("shared/golden is not beside this checkout; it holds the verdicts")
    with gzip.open(GOLDEN, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("variant", REFERENCE)
def test_the_reference_variants_give_its_verdict_on_every_golden_row(variant, golden):
    """Where the reference raises, we pay 0 and the reason names its exception."""
    differing = []
    for row in golden:
        verdict = row[variant.removeprefix("tool_n1_")]
        reward = score(row["completion"], row["ground_truth"], variant)
        raised = reward.reason.removeprefix("raises ") if reward.reason.startswith("raises ") else None
        wanted = (0.0, verdict["raises"]) if isinstance(verdict, dict) else (pytest.approx(verdict), None)
        if (reward.total, raised) != wanted:
            differing.append((row["kind"], verdict, reward))
    assert len(golden) == 6009 and not differing


@pytest.mark.parametrize("truth", ["null", "0", "5", "true", "false", '"null"'])
def test_the_reference_asks_every_ground_truth_for_its_length(truth):
    """Of a number or null there is none: it raises, also where a reply without any call would be right."""
    for completion in ("", THINK, with_calls("[]"), with_calls("5")):
        reward = score(completion, truth, "tool_n1_llama")
        assert (reward.total, reward.correct, reward.reason) == (0.0, False, "raises TypeError")
    assert score("", "{}", "tool_n1_llama").total == score("", '"[]"', "tool_n1_llama").total == 1.0


def test_against_the_verdicts_of_the_reference(golden):
    """The default pays less often, for the format; more often only where a tag in a value misled it."""
    fewer, more = set(), []
    for row in golden:
        try:
            reward = score(row["completion"], json.loads(row["ground_truth"]))
        except ValueError:
            continue  # a broken ground truth
        if reward.total < (row["v0"] == 1):
            fewer.add(reward.reason)
        elif reward.total > (row["v0"] == 1):
            more.append(row["ground_truth"])
    assert fewer == {  # a format that it accepts, and never a difference between readable calls
        "empty_think", "tag_in_think", "no_think", "text_before_think", "text_before_tool_call",
        "text_after_tool_call", "several_tool_calls", "bad_json", "not_a_list", "bad_call",
    }
    assert more and all("</tool_call>" in truth or "<|im_start|>" in truth for truth in more)


def test_any_order_is_right_and_any_single_change_pays_nothing():
    rng = random.Random(0)
    values = [-7, 0.5, True, None, 'a"b\\é😀\n<>', [1, [2.0, ""]], {"x": {"y": None}}]
    for _ in range(300):
        names = rng.choices(["f", "g", "get it (v2)"], k=rng.randint(1, 4))
        truth = [ToolCall(name, {key: rng.choice(values) for key in "abc"}) for name in names]
        calls = [ToolCall(call.name, dict(reversed(call.arguments.items()))) for call in truth[::-1]]
        assert score(render_completion(calls, "so"), truth).total == 1.0, calls
        at, key = rng.randrange(len(truth)), rng.choice("abc")
        name, arguments = truth[at].name, truth[at].arguments
        others = {k: v for k, v in arguments.items() if k != key}
        value, renamed = {**others, key: [arguments[key]]}, {**others, key + "_": arguments[key]}
        changed = [ToolCall(name, x) for x in (value, renamed, others, {**arguments, "d": None})]
        changed.append(ToolCall(name + "x", arguments))
        for new in (*([call] for call in changed), [], [truth[at]] * 2):
            calls = [*truth[:at], *new, *truth[at + 1 :]]
            assert score(render_completion(calls, "so"), truth).total == 0.0, calls


# What a full reward promises, written a second time: one regular expression, then Python's own JSON.
_TAG = r"</?(?:think|tool_call)>"
_END = r"<\|(?:im_end|endoftext|eot_id|eom_id|end_of_text)\|>"
FORM = re.compile(rf"(?s)\s*<think>((?:(?!{_TAG}).)+)</think>\s*<tool_call>(.*)</tool_call>\s*(?:{_END})?\s*")
BOOK = [{"name": "book", "parameters": {"city": {}, "days": {}}}]
PIECES = [*'[]{}",:\\2- \n\x00\ud800é', "<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_end|>",
          "e9", "NaN", "null", CALL, BLOCK, THINK]


def mutated(text: str, rng: random.Random) -> str:
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice((0, 0, 1, 5, 40)))
        middle = rng.choice(("", rng.choice(PIECES), text[start:end] * 2))
        text = text[:start] + middle + text[end:]
    return text


def test_thousands_of_broken_completions():
    rng, full = random.Random(0), 0
    for _ in range(5000):
        completion = mutated(GOOD, rng)
        score(completion, ANSWER, "tool_n1_v4")  # does not raise
        for variant, row in PUBLISHED.items():
            reward = score(completion, ANSWER, variant, tools=BOOK)
            assert -3 <= reward.total <= row.right, completion
            assert reward.total < row.right or reward.correct or variant == "overlap", completion
        for variant, row in TABLE.items():
            reward = score(completion, ANSWER, variant)
            assert reward.total in {*row, 0.0, row[2] - row[3]}, completion
            if reward.total == 1.0 and reward.format_ok:
                form = FORM.fullmatch(completion)
                assert form and form[1].strip() and json.loads(form[2]) == ANSWER, completion
                full += variant == "binary"
    assert 125 < full < 2500  # white space, and changes of the thought



OWN = """
from __future__ import annotations
import argparse
import dataclasses
import fractions
import numpy
from beside import TEN
from data import MINE  # ours is loaded already
from prompts import ToolCall  # there is only ours
from reward import Reward

argparse.ArgumentParser().parse_args()  # the test runner's arguments are not its own

@dataclasses.dataclass
class Weights:
    length: float = 1 / TEN

def length(completion, answer, tools):
    answer[0]["arguments"].clear()
    tools[0].clear()
    return len(completion) * Weights().length

single = lambda completion, answer, tools: numpy.float32(0.5)
half = lambda completion, answer, tools: fractions.Fraction(1, 2)
nothing = lambda completion, answer, tools: None
true = lambda completion, answer, tools: True
verdict = lambda completion, answer, tools: Reward(numpy.float32(0.5), False, False, "mine")
huge = lambda completion, answer, tools: 10**400
constant = 3
"""


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("TEN = 10\n")
    (tmp_path / "data.py").write_text("MINE = True\n")
    (tmp_path / "bad.py").write_text("1 / 0\n")
    (tmp_path / "asks.py").write_text("import argparse\nargparse.ArgumentParser().error('no')\n")
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.setattr("sys.path", [*sys.path])
    return str(tmp_path / "mine.py")


def test_a_reward_function_of_the_users_own(own_file, monkeypatch):
    """It may use dataclasses and neighbours, and change what it gets. The reason is the strict verdict's."""
    monkeypatch.setenv("HOME", str(Path(own_file).parent))
    assert reward_function("~/mine.py:single")("x", [], []).total == 0.5
    answer, tools, arguments = [ToolCall("f", {"x": 1})], [{"name": "f"}], sys.argv
    for _ in range(2):
        reward = reward_function(f"{own_file}:length")("x" * 10, answer, tools)
        assert (reward.total, reward.correct, reward.reason) == (1.0, False, "no_think")
    assert answer == [ToolCall("f", {"x": 1})] and tools == [{"name": "f"}]
    assert sys.modules["data"] is data and sys.argv is arguments
    for name in ("single", "half", "verdict"):
        total = reward_function(f"{own_file}:{name}")("x", [], []).total
        assert type(total) is float and total == 0.5, "samples.jsonl takes no other"


@pytest.mark.parametrize(
    ("name", "message"),
    [("binery", "reward must be one of binary"), ("{folder}/mine.py:constant", "has no function 'constant'"),
     ("{folder}/bad.py:f", "importing .* failed: ZeroDivisionError"),
     ("{folder}/asks.py:f", "importing .* failed: SystemExit"),
     ("{folder}/mine.py:huge", "raised OverflowError"),
     ("{folder}/mine.py:true", "must return a finite number, not True"),
     ("{folder}/mine.py:nothing", "must return a finite number, not None")],
)
def test_a_reward_that_cannot_be_used_is_one_sentence(own_file, name, message):
    with pytest.raises(RewardError, match=message):
        reward_function(name.format(folder=Path(own_file).parent))("x", [], [])


def test_a_file_is_rescored(tmp_path, capsys):
    two = [{"name": "f", "arguments": {"x": 2}}]
    wrapped = json.dumps([{"type": "function", "function": TOOL}])
    rows = [{"id": "\ud83d", "completion": GOOD, "ground_truth": json.dumps(ANSWER), "tools": []},
            {"id": "b", "completion": [{"content": THINK}], "answer": ANSWER, "tools": []},
            {"id": "c", "completion": with_value("2.0"), "answer": two, "tools": [TOOL]},
            {"id": "d", "completion": with_value("2.0"), "answer": two, "tools": wrapped},
            {"id": "e", "completion": with_value("2.0"), "answer": two, "tools_json": wrapped},
            {"id": "f", "completion": with_value("2.0"), "answer": two}]
    rows[4]["prompt_id"] = rows[5]["prompt_id"] = "p"  # of which samples.jsonl gives the tools once
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    main([str(path), "--lenient", "--out", str(tmp_path / "scored.jsonl")])
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    read = [(row["id"], row["line"], row["reward"], row["reason"]) for row in scored]
    lines = {"\ud83d": 1, "c": 3, "d": 4, "e": 5, "f": 6}
    right = [(row, line, 1.0, "correct") for row, line in lines.items()]
    assert sorted(read) == sorted([*right, ("b", 2, 0.0, "no_tool_call")])
    main([str(path), "--variant", "tool_n1_v3"])
    scored = [json.loads(line)["total"] for line in capsys.readouterr().out.splitlines()]
    assert scored == [1.0, 0.2, 0.2, 0.2, 0.2, 0.2]


@pytest.mark.parametrize(
    ("row", "message"),
    [({"completion": "x"}, "needs the fields completion and ground_truth"),
     ({"completion": "x", "ground_truth": None}, "needs the fields completion and ground_truth"),
     ({"completion": "x", "ground_truth": "null"}, "answer"),
     ({"completion": [{"role": "tool", "content": "x"}], "ground_truth": []}, "assistant"),
     ({"completion": THINK + NO_CALL, "ground_truth": [], "tools": [{"type": "function"}]}, "tool"),
     ({"completion": THINK + NO_CALL, "ground_truth": []}, "lenient needs the tools")],
)
def test_a_broken_file_is_one_sentence_with_its_line(row, message, tmp_path):
    good = '{"completion": "x", "ground_truth": [], "tools": []}\n'
    (tmp_path / "rows.jsonl").write_text(good + json.dumps(row))
    with pytest.raises(UserError, match=f"rows.jsonl:2: .*{message}"):
        main([str(tmp_path / "rows.jsonl"), "--lenient"])


@pytest.mark.parametrize("value", ["NaN", '{"a": 1, "a": 2}', "[" * 65 + "]" * 65])
def test_a_ground_truth_that_is_no_strict_json_is_refused(value, tmp_path):
    """It could never be paid."""
    truth = f'[{{"name": "f", "arguments": {{"x": {value}}}}}]'
    (tmp_path / "rows.jsonl").write_text(f'{{"completion": "x", "ground_truth": {truth}}}')
    with pytest.raises(UserError, match="rows.jsonl:1: .*(not JSON|repeated)"):
        main([str(tmp_path / "rows.jsonl")])


def test_a_file_is_scored_with_a_reward_of_ones_own(tmp_path, capsys):
    (tmp_path / "own.py").write_text("def pay(completion, answer, tools):\n    return len(answer) / 4\n")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"completion": "x", "answer": ANSWER}))
    main([str(tmp_path / "rows.jsonl"), "--variant", f"{tmp_path / 'own.py'}:pay"])
    assert json.loads(capsys.readouterr().out)["reward"] == len(ANSWER) / 4
