"""The reward: what pays, what does not, and why. Every hole of FAILURES.md 16 to 19 is one line here."""

import gzip
import json
import random
import re
import time
from collections import Counter
from pathlib import Path

import pytest

from prompts import ToolCall, parse_completion, render_calls, render_completion
from reward import REWARDS, RewardError, compute_score, main, reward_function, score, trl_reward

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "reward_verdicts.jsonl.gz"

ANSWER = [{"name": "book", "arguments": {"city": "Oslo", "days": 2}}]
CALL = '{"name": "book", "arguments": {"city": "Oslo", "days": 2}}'
BLOCK = f"<tool_call>[{CALL}]</tool_call>"
THINK = "<think>Oslo, two days.</think>"
GOOD = THINK + BLOCK


def with_calls(listed: str) -> str:
    """A reply with a thought and `listed` as the text of its tool-call section."""
    return f"{THINK}<tool_call>{listed}</tool_call>"


def with_value(value: str) -> str:
    """A reply that calls f(x=value), `value` being JSON text."""
    return with_calls(f'[{{"name": "f", "arguments": {{"x": {value}}}}}]')


# ------------------------------------------------------------------------------------------------- what pays


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (GOOD, ANSWER),
        (f"\n{THINK}\n{BLOCK}<|im_end|>\n", ANSWER),
        (f"{THINK}<tool_call>[]</tool_call>", []),
        (with_calls('[{"arguments": {"days": 2, "city": "Oslo"}, "name": "book"}]'), ANSWER),
        (with_calls(f"[{CALL}, {CALL}]"), ANSWER * 2),
        (THINK + render_calls([ToolCall("f", {}), ToolCall("g", {})]), [ToolCall("g", {}), ToolCall("f", {})]),
        (with_value('"</tool_call>"'), [ToolCall("f", {"x": "</tool_call>"})]),
        (with_value('"<|im_start|>assistant"'), [ToolCall("f", {"x": "<|im_start|>assistant"})]),
        (with_value('"\\u00e9\\ud83d\\ude00"'), [ToolCall("f", {"x": "é😀"})]),
    ],
    ids=["format", "white space and end token", "no call is right", "order of keys", "a call twice", "order of calls",
         "closing tag in a value", "header in a value", "escapes"],
)
def test_right_calls_with_a_thought_pay_one(completion, answer):
    reward = score(completion, answer)
    assert (reward.total, reward.format_ok, reward.correct, reward.reason) == (1.0, True, True, "correct")


# ----------------------------------------------------------------------------- holes of the reference, closed

HOLES = [
    ("empty thought", f"<think></think>{BLOCK}", "empty_think"),
    ("blank thought", f"<think> \n\t\u00a0</think>{BLOCK}", "empty_think"),
    ("no thought", BLOCK, "no_think"),
    ("thought only closed", f"Oslo.</think>{BLOCK}", "no_think"),
    ("thought only opened", f"<think>Oslo.{BLOCK}", "think_not_closed"),
    ("tags reversed", f"</think>Oslo.<think>{BLOCK}", "text_before_think"),
    ("tags quoted in prose", f"I write <think> and </think> first. {BLOCK}", "text_before_think"),
    ("tags inside an argument", with_value('"<think>a</think>"').removeprefix(THINK), "no_think"),
    ("tags in capitals", GOOD.replace("think>", "THINK>"), "no_think"),
    ("nested thought", f"<think>a<think>b</think></think>{BLOCK}", "tag_in_think"),
    ("thought twice", THINK + GOOD, "text_before_tool_call"),
    ("thought after the call", BLOCK + THINK, "text_after_tool_call"),
    ("call in the thought", f"<think>a{BLOCK}b</think>", "tag_in_think"),
    ("call in the thought and after it", f"<think>a{BLOCK}</think>{BLOCK}", "tag_in_think"),
    ("text before", f"Sure! {GOOD}", "text_before_think"),
    ("text between", f"{THINK} So: {BLOCK}", "text_before_tool_call"),
    ("text after", f"{GOOD} Done!", "text_after_tool_call"),
    ("two end tokens", f"{GOOD}<|im_end|><|im_end|>", "text_after_tool_call"),
    ("two different end tokens", f"{GOOD}<|endoftext|><|im_end|>", "text_after_tool_call"),
    ("a turn goes on", f"{GOOD}<|im_end|>\n<|im_start|>user\nThanks!", "text_after_tool_call"),
    ("header of the turn", f"<|im_start|>assistant\n{GOOD}", "text_before_think"),
    ("code fence outside", f"```\n{GOOD}\n```", "text_before_think"),
    ("code fence around the block", f"{THINK}```{BLOCK}```", "text_before_tool_call"),
    ("code fence inside", with_calls(f"```json\n[{CALL}]\n```"), "bad_json"),
    ("right block last", f"{THINK}<tool_call>[]</tool_call>{BLOCK}", "several_tool_calls"),
    ("right block first", f"{GOOD}<tool_call>[]</tool_call>", "several_tool_calls"),
    ("same block twice", f"{GOOD}\n{BLOCK}", "several_tool_calls"),
    ("block not closed", GOOD.removesuffix("</tool_call>"), "tool_call_not_closed"),
    ("block in a block", with_calls(BLOCK), "several_tool_calls"),
    ("no block", THINK, "no_tool_call"),
    ("calls without tags", f"{THINK}[{CALL}]", "no_tool_call"),
    ("bare tags", "<think></think><tool_call></tool_call>", "bad_json"),
    ("nothing", "", "no_think"),
    ("dict instead of list", with_calls(CALL), "not_a_list"),
    ("double-encoded JSON", with_calls(json.dumps(f"[{CALL}]")), "not_a_list"),
    ("null", with_calls("null"), "not_a_list"),
    ("list in a list", with_calls(f"[[{CALL}]]"), "bad_call"),
    ("encoded call in the list", with_calls(f"[{json.dumps(CALL)}]"), "bad_call"),
    ("encoded arguments", with_calls(f'[{{"name": "f", "arguments": {json.dumps("{}")}}}]'), "bad_call"),
    ("no arguments", with_calls('[{"name": "book"}]'), "bad_call"),
    ("no name", with_calls('[{"arguments": {}}]'), "bad_call"),
    ("name is null", with_calls('[{"name": null, "arguments": {}}]'), "bad_call"),
    ("extra key", with_calls(f'[{CALL[:-1]}, "id": 1}}]'), "bad_call"),
    ("duplicate key", with_calls(f'[{{"name": "other", {CALL[1:]}]'), "bad_json"),
    ("duplicate argument", with_calls(f"[{CALL[:-2]}, " + '"days": 2}}]'), "bad_json"),
    ("Python's quotes", with_calls(f"[{CALL}]".replace('"', "'")), "bad_json"),
    ("trailing comma", with_calls(f"[{CALL},]"), "bad_json"),
    ("one call per line", with_calls(f"{CALL}\n{CALL}"), "bad_json"),
    ("NaN", with_value("NaN"), "bad_json"),
    ("Infinity", with_value("-Infinity"), "bad_json"),
    ("number that overflows", with_value("1e999"), "bad_json"),
    ("more than 4300 digits", with_value("9" * 5000), "bad_json"),
    ("raw newline in a value", with_value('"a\nb"'), "bad_json"),
    ("raw control character in a value", with_value('"a\x00b"'), "bad_json"),
    ("control character before", "\x00" + GOOD, "text_before_think"),
    ("byte order mark before", "\ufeff" + GOOD, "text_before_think"),
    ("byte order mark in the block", with_calls(f"\ufeff[{CALL}]"), "bad_json"),
    ("lists 100,000 deep", with_value("[" * 100_000 + "]" * 100_000), "bad_json"),
    ("objects 100,000 deep", with_value('{"a":' * 100_000 + "1" + "}" * 100_000), "bad_json"),
    ("open lists 100,000 deep", with_calls("[" * 100_000), "bad_json"),
    ("raw lone surrogate as a value", with_value('"\ud800"'), "wrong_name"),
    ("escaped lone surrogate as a value", with_value('"\\ud800"'), "wrong_name"),
    ("lone surrogate between", f"{THINK}\ud800{BLOCK}", "text_before_tool_call"),
    ("None", None, "not_text"),
    ("bytes", GOOD.encode(), "not_text"),
    ("a number", 5, "not_text"),
    ("a list", [GOOD], "not_text"),
]


@pytest.mark.parametrize(
    ("completion", "reason"), [hole[1:] for hole in HOLES], ids=[hole[0] for hole in HOLES]
)
def test_hole_pays_nothing(completion, reason):
    reward = score(completion, ANSWER)
    assert (reward.total, reward.reason) == (0.0, reason)


@pytest.mark.parametrize(("opening", "closing"), ["[]", ('{"a":', "}")])
def test_no_depth_of_nesting_raises(opening, closing):
    """Just below the depth that the parser refused, comparing took a few stack frames more than parsing, and
    raised.
    """
    for depth in [*range(1100), *range(1100, 60_000, 997)]:
        score(
            with_value(opening * depth + "1" * (opening != "[") + closing * depth), [ToolCall("f", {"x": 1})]
        )


def test_silence_does_not_pay_when_no_call_is_right():
    for completion in (
        "",
        THINK,
        f"{THINK}I cannot help.",
        with_calls(""),
        with_calls("null"),
        with_calls("{}"),
    ):
        assert score(completion, []).total == 0.0


# --------------------------------------------------------------------------------------- when calls are equal


@pytest.mark.parametrize(
    ("truth", "value", "equal"),
    [
        (1, "1", True),
        (1, "1.0", False),
        (1.0, "1.0", True),
        (1.0, "1", False),
        (1.5, "1.50", True),  # the number counts, not its spelling
        (100.0, "1e2", True),
        (True, "true", True),
        (True, "1", False),
        (0, "false", False),
        (None, "null", True),
        (None, '"null"', False),
        (5, '"5"', False),
        ("5", "5", False),
        (0.0, "-0.0", False),
        (0, "-0", True),  # JSON's integers have one zero
        ("é", '"e\u0301"', False),  # NFC is not NFD: a tool would receive other bytes
        ("é", '"\\u00e9"', True),
        ("a", '"A"', False),
        ("a", '"a "', False),
        ([1, 2], "[2, 1]", False),
        ([1], "[1, 1]", False),
        ([], "{}", False),
        ({"a": 1, "b": 2}, '{"b": 2, "a": 1}', True),
        ({"a": None}, "{}", False),
        (10**30, "1" + "0" * 30, True),
        (2**53, str(2**53 + 1), False),  # as floats they would be equal
    ],
)
def test_when_values_are_equal(truth, value, equal):
    reward = score(with_value(value), [ToolCall("f", {"x": truth})])
    assert reward.reason == ("correct" if equal else "wrong_arguments") and reward.total == float(equal)


@pytest.mark.parametrize(
    ("answered", "truth", "reason"),
    [("a", "", "called_without_need"), ("", "a", "no_call"), ("aa", "a", "wrong_number"), ("a", "aa", "wrong_number"),
     ("aab", "abb", "wrong_name"), ("ab", "ac", "wrong_name"), ("A", "a", "wrong_name"), ("ab", "ba", "correct")],
)
def test_calls_are_compared_as_a_multiset(answered, truth, reason):
    calls = [ToolCall(name, {}) for name in answered]
    assert score(render_completion(calls, "so"), [ToolCall(name, {}) for name in truth]).reason == reason


# --------------------------------------------------------------------------------------------------- variants

# Right with a thought, right without, names right with, wrong with, wrong without, unreadable with a thought:
TABLE = {
    "binary": (1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "no_reason": (1.0, 1.0, 0.0, 0.0, 0.0, 0.0),
    "partial_format": (1.0, 0.8, 0.2, 0.2, 0.0, 0.0),
    "partial_names": (1.0, 0.8, 0.4, 0.2, 0.0, 0.0),
    "tool_n1_v0": (1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "tool_n1_v1": (1.2, 1.0, -0.2, -0.2, 0.0, 0.0),
    "tool_n1_v2": (1.0, 1.0, 0.0, 0.0, 0.0, 0.0),
    "tool_n1_v3": (1.0, 0.8, 0.2, 0.2, 0.0, 0.2),
    "tool_n1_v4": (1.0, 0.8, 0.4, 0.2, 0.0, 0.2),
    "tool_n1_llama": (1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
}
OURS = [name for name in REWARDS if not REWARDS[name].marker]
COMPLETIONS = (
    GOOD,
    BLOCK,
    GOOD.replace("2", "3"),
    with_calls("[]"),
    "<tool_call>[]</tool_call>",
    with_calls("oops"),
)


@pytest.mark.parametrize("variant", TABLE)
def test_the_table_of_variants(variant):
    totals = [score(completion, ANSWER, variant).total for completion in COMPLETIONS]
    assert totals == pytest.approx(TABLE[variant])


def test_the_table_is_complete():
    assert set(TABLE) == set(REWARDS)


def test_the_reason_is_correct_without_a_thought_only_where_that_pays_in_full():
    reasons = {variant: score(BLOCK, ANSWER, variant).reason for variant in OURS}
    assert reasons == dict.fromkeys(OURS, "no_think") | {"no_reason": "correct"}


@pytest.mark.parametrize("variant", OURS)
def test_bare_tags_pay_in_no_variant_of_ours(variant):
    for completion in (THINK, "<think></think><tool_call></tool_call>", f"{THINK}<tool_call></tool_call>"):
        assert score(completion, ANSWER, variant).total == 0.0


# ----------------------------------------------------------------------------------------- errors of the data


@pytest.mark.parametrize(
    "answer",
    [None, 5, "", b"", "[]", {}, ANSWER[0], [None], [[]], ["book"], [{}], [{"name": "f"}], [{"arguments": {}}],
     [{"name": None, "arguments": {}}], [{"name": "f", "arguments": "{}"}]],
)
def test_a_broken_ground_truth_raises(answer):
    with pytest.raises(ValueError, match="answer"):
        score(GOOD, answer)


def test_an_unknown_variant_raises():
    with pytest.raises(KeyError):
        score(GOOD, ANSWER, "v0")


# ---------------------------------------------------------------------------------------------- the reference

needs_golden = pytest.mark.skipif(
    not GOLDEN.exists(), reason="shared/golden is not beside this checkout; it holds the verdicts"
)


@needs_golden
@pytest.mark.parametrize("variant", [name for name in REWARDS if name not in OURS])
def test_the_reference_variants_give_its_verdict_on_every_golden_row(variant):
    """Where the reference raises, we pay 0 and the reason names its exception."""
    with gzip.open(GOLDEN, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    differing = []
    for row in rows:
        verdict = row[variant.removeprefix("tool_n1_")]
        reward = score(row["completion"], row["ground_truth"], variant)
        raised = reward.reason.removeprefix("raises ") if reward.reason.startswith("raises ") else None
        wanted = (0.0, verdict["raises"]) if isinstance(verdict, dict) else (pytest.approx(verdict), None)
        if (reward.total, raised) != wanted:
            differing.append((row["kind"], verdict, reward))
    assert len(rows) > 6000 and not differing


REFERENCE_HOLES = [  # what v0 pays for, and the strict default does not: FAILURES.md 17
    ("empty thought", f"<think></think>{BLOCK}"),
    ("thought after the call", BLOCK + THINK),
    ("tags reversed", f"</think>hm<think>{BLOCK}"),
    ("call inside the thought", f"<think>hm{BLOCK}</think>"),
    ("tags in an argument's place", f"I like <think> and </think>. {BLOCK}"),
    ("text before, between and after", f"a{THINK}b{BLOCK}c"),
    ("several blocks, the last is right", f"{THINK}<tool_call>[]</tool_call>{BLOCK}"),
    ("dict instead of list", with_calls(CALL)),
    ("double-encoded JSON", with_calls(json.dumps(f"[{CALL}]"))),
    ("extra key", with_calls(f'[{CALL[:-1]}, "id": 1}}]')),
    ("duplicate key", with_calls(f'[{{"name": "other", {CALL[1:]}]')),
]


@pytest.mark.parametrize(
    "completion", [hole[1] for hole in REFERENCE_HOLES], ids=[hole[0] for hole in REFERENCE_HOLES]
)
def test_the_reference_pays_for_what_the_strict_default_refuses(completion):
    assert (score(completion, ANSWER, "tool_n1_v0").total, score(completion, ANSWER).total) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("completion", "answer", "variant", "total", "reason"),
    [
        # A dict as ground truth is not wrapped, though one in the completion is: never right.
        (GOOD, json.dumps(ANSWER[0]), "tool_n1_v0", 0.0, "wrong_calls"),
        (GOOD, json.dumps(json.dumps(ANSWER)), "tool_n1_v0", 1.0, "correct"),
        (GOOD, '[{"name": "book"}]', "tool_n1_v0", 0.0, "raises KeyError"),
        (GOOD, "null", "tool_n1_v0", 0.0, "raises TypeError"),
        (BLOCK, "null", "tool_n1_v0", 0.0, "no_think"),  # v0 looks at nothing else without a thought
        (with_calls("5"), "[]", "tool_n1_v2", 0.0, "raises TypeError"),
        (with_calls('"5"'), "[]", "tool_n1_v2", 0.0, "raises TypeError"),
        (with_calls('"hello"'), "[]", "tool_n1_v2", 0.0, "unread"),
        (with_calls('"hello"'), "[]", "tool_n1_llama", 0.0, "raises JSONDecodeError"),
        (with_value("9" * 5000), ANSWER, "tool_n1_v3", 0.0, "raises ValueError"),
        ("Sorry, no.", "[]", "tool_n1_llama", 1.0, "no_block"),  # pays for silence
        ("Sorry, no.", ANSWER, "tool_n1_llama", 0.0, "no_block"),
        (THINK, ANSWER, "tool_n1_v4", 0.2, "no_block"),  # pays for bare tags
        (
            f"{GOOD}<|im_start|>assistant",
            ANSWER,
            "tool_n1_v2",
            0.0,
            "no_block",
        ),  # the marker hides what is before it
        (
            f"{GOOD}<|im_start|>assistant",
            ANSWER,
            "tool_n1_llama",
            1.0,
            "correct",
        ),  # only its own family's marker does
        (None, ANSWER, "tool_n1_v0", 0.0, "not_text"),
    ],
)
def test_quirks_of_the_reference(completion, answer, variant, total, reason):
    reward = score(completion, answer, variant)
    assert (reward.total, reward.reason) == (total, reason)


@needs_golden
def test_against_the_verdicts_of_the_reference():
    """We pay less often, for reasons of the format; more often only where a tag in a value misled the
    reference.
    """
    with gzip.open(GOLDEN, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    agreed, fewer, more = 0, Counter(), []
    for row in rows:
        try:
            reward = score(row["completion"], json.loads(row["ground_truth"]))
        except ValueError:
            continue  # a broken ground truth
        agreed += reward.total == row["v0"]
        if reward.total < (row["v0"] == 1):
            fewer[reward.reason] += 1
        elif reward.total > (row["v0"] == 1):
            more.append(row["ground_truth"])
    # A format that it accepts, and never a difference between readable calls:
    assert set(fewer) <= {
        "empty_think", "tag_in_think", "no_think", "text_before_think", "text_before_tool_call",
        "text_after_tool_call", "several_tool_calls", "bad_json", "not_a_list", "bad_call",
    }
    assert more and all("</tool_call>" in truth or "<|im_start|>" in truth for truth in more)
    assert agreed > 4000


# ------------------------------------------------------------------------------------------- properties, fuzz


def random_value(rng: random.Random, depth: int = 2):
    makers = [lambda: rng.randint(-9, 9), rng.random, lambda: rng.random() < 0.5, lambda: None,
              lambda: "".join(rng.choices('ab"\\é😀\n<>', k=3)),
              lambda: [random_value(rng, depth - 1) for _ in range(rng.randint(0, 3))],
              lambda: {key: random_value(rng, depth - 1) for key in "xy"}]
    return rng.choice(makers if depth else makers[:5])()


def random_calls(rng: random.Random) -> list[ToolCall]:
    names = ["f", "g", "get it (v2)"]
    return [
        ToolCall(rng.choice(names), {key: random_value(rng) for key in "abc"})
        for _ in range(rng.randint(1, 4))
    ]


def shuffled(value, rng: random.Random):
    """`value` with the keys of every dict in another order."""
    if isinstance(value, dict):
        return {key: shuffled(value[key], rng) for key in rng.sample(list(value), len(value))}
    return [shuffled(item, rng) for item in value] if isinstance(value, list) else value


def test_order_of_calls_and_arguments_never_matters():
    rng = random.Random(0)
    for _ in range(300):
        truth = random_calls(rng)
        calls = [ToolCall(call.name, shuffled(call.arguments, rng)) for call in rng.sample(truth, len(truth))]
        assert score(render_completion(calls, "so"), truth).total == 1.0, calls


def test_any_single_change_pays_nothing():
    rng = random.Random(0)
    for _ in range(300):
        truth = random_calls(rng)
        at, key = rng.randrange(len(truth)), rng.choice("abc")
        name, arguments = truth[at].name, truth[at].arguments
        others = {k: v for k, v in arguments.items() if k != key}
        changed = [
            [ToolCall(name, {**others, key: [arguments[key]]})],  # a value
            [ToolCall(name, {**others, key + "_": arguments[key]})],  # a key
            [ToolCall(name + "x", arguments)],  # the name
            [ToolCall(name, others)],  # an argument less
            [ToolCall(name, {**arguments, "d": None})],  # an argument more
            [],  # a call less
            [truth[at], truth[at]],  # a call more
        ]
        for new in changed:
            calls = [*truth[:at], *new, *truth[at + 1 :]]
            assert score(render_completion(calls, "so"), truth).total == 0.0, calls


# What a full reward promises, written a second time: one regular expression, then Python's own JSON.
_TAG = r"</?(?:think|tool_call)>"
_END = r"<\|(?:im_end|endoftext|eot_id|eom_id|end_of_text)\|>"
FORM = re.compile(rf"(?s)\s*<think>((?:(?!{_TAG}).)+)</think>\s*<tool_call>(.*)</tool_call>\s*(?:{_END})?\s*")
PIECES = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<|im_end|>",
    "[",
    "]",
    "{",
    "}",
    '"',
    ",",
    ":",
    "\\",
    "2",
    "-",
    ".0",
    "e9",
    "NaN",
    "null",
    " ",
    "\n",
    "\x00",
    "\ud800",
    "é",
    CALL,
    BLOCK,
    THINK,
    '"name": "book"',
]


def mutated(text: str, rng: random.Random) -> str:
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice((0, 0, 1, 5, 40)))
        middle = rng.choice(("", rng.choice(PIECES), text[start:end] * 2))
        text = text[:start] + middle + text[end:]
    return text


PAID = {variant: {*row, 0.0, row[2] - row[3]} for variant, row in TABLE.items()}
REFERENCE_REASONS = {"raises", "unread", "no_block", "wrong_calls"}


def test_twenty_thousand_broken_completions():
    rng, rewards = random.Random(0), Counter()
    known = set(re.findall(r"\w+", parse_completion.__doc__)) | {
        "correct",
        "no_call",
        "wrong_number",
        "wrong_name",
    }
    known |= {"wrong_arguments"}
    for _ in range(20_000):
        completion = mutated(GOOD, rng)
        for variant in REWARDS:
            reward = score(completion, ANSWER, variant)
            assert reward.total in PAID[variant], completion
            assert (
                reward.reason in known
                or variant not in OURS
                and reward.reason.split()[0] in REFERENCE_REASONS
            )
            if variant in OURS and reward.total == 1.0 and reward.format_ok:
                form = FORM.fullmatch(completion)
                assert form and form[1].strip() and json.loads(form[2]) == ANSWER, completion
            rewards[variant, reward.total == 1.0] += 1
    assert 500 < rewards["binary", True] < 10_000  # white space, and changes of the thought


N = 1_000_000
BIG = {
    "open thoughts": "<think>" * (N // 7),
    "open blocks": THINK + "<tool_call>" * (N // 11),
    "blocks": THINK + "<tool_call>[]</tool_call>" * (N // 25),
    "almost tags": "<think>" + "<" * N + "</think>",
    "spaces": " " * N + "x" + " " * N,
    "end tokens": GOOD + "<|im_end|>" * (N // 10),
    "backslashes": with_value('"' + "\\" * N + '"'),
    "open strings": with_calls('"' * N),
    "lists": with_value("[" + "[]," * (N // 3) + "[]]"),
    "keys": with_value("{" + ",".join(f'"{i}":{i}' for i in range(N // 14)) + "}"),
    "digits": with_value("9" * N),
    "decimals": with_value("0." + "1" * N),
    "exponent": with_value("1e-" + "9" * N),
    "calls": with_calls("[" + ",".join([CALL] * (N // 60)) + "]"),
}


@pytest.mark.parametrize("completion", BIG.values(), ids=BIG)
def test_time_is_linear_in_the_length(completion):
    start = time.perf_counter()
    for variant in ("binary", "tool_n1_v4", "tool_n1_llama"):
        score(completion, ANSWER * 1000, variant)
    assert time.perf_counter() - start < 15  # well below 1 s; a quadratic reader needs minutes


# ---------------------------------------------------------------------------------------------- lenient types

TOOL = {
    "name": "f",
    "parameters": {
        "type": "object",
        "properties": {
            "price": {"type": "number"},
            "count": {"type": "integer"},
            "word": {"type": "string"},
            "on": {"type": "boolean"},
            "prices": {"type": "array", "items": {"type": "number"}},
            "place": {"type": "object", "properties": {"lat": {"type": "float"}, "floor": {"type": "int"}}},
            "pair": {"type": "Tuple[float, float]"},
            "maybe": {"type": ["number", "null"]},
            "anything": {},
        },
    },
}


@pytest.mark.parametrize(
    ("name", "truth", "given", "equal"),
    [
        ("price", 2.0, 2, True),  # an integer is a number
        ("price", 2, 2.0, True),
        ("price", 2.0, "2", False),  # a numeric string is a string
        ("price", 1.0, True, False),  # a truth value is no number
        ("price", 0.0, -0.0, True),
        ("price", 2**53, 2**53 + 1, False),  # exact beyond what a float can hold
        ("price", 10**400, 10**400, True),
        ("count", 2, 2.0, False),  # an integer was asked for, and a tool may refuse 2.0
        ("word", "2", 2, False),
        ("on", True, 1, False),
        ("prices", [1, 2.5], [1.0, 2.5], True),  # inside declared lists
        ("prices", [1, 2], [2, 1], False),  # where order counts, as before
        ("place", {"lat": 1, "floor": 1}, {"floor": 1, "lat": 1.0}, True),  # inside declared objects
        ("place", {"lat": 1, "floor": 1}, {"lat": 1, "floor": 1.0}, False),
        ("pair", [1, 2], [1.0, 2.0], True),
        ("maybe", 1, 1.0, True),
        ("anything", 1, 1.0, False),  # nothing declared: compared strictly
        ("undeclared", 1, 1.0, False),
    ],
)
def test_lenient_compares_numbers_by_the_declared_type(name, truth, given, equal):
    completion, answer = (
        render_completion([ToolCall("f", {name: given})], "so"),
        [ToolCall("f", {name: truth})],
    )
    assert score(completion, answer, lenient=True, tools=[TOOL]).correct == equal


def test_lenient_closes_no_more_and_no_fewer_holes():
    """It changes how numbers are compared, and nothing else."""
    for _, completion, reason in HOLES:
        assert score(completion, ANSWER, lenient=True, tools=[TOOL]).reason == reason
    with pytest.raises(ValueError, match="lenient does not go with tool_n1_v0"):
        score(GOOD, ANSWER, "tool_n1_v0", lenient=True)


# ------------------------------------------------------------------------------ functions for trainers, files


def test_trl_reward_takes_texts_and_messages():
    truth = json.dumps(ANSWER)
    rewards = trl_reward(
        prompts=["p"] * 3, completions=[GOOD, [{"role": "assistant", "content": GOOD}], [{"role": "assistant"}]],
        ground_truth=[truth, ANSWER, truth], id=["a", "b", "c"], trainer_state=None,
    )
    assert rewards == [1.0, 1.0, 0.0] and all(isinstance(reward, float) for reward in rewards)
    assert trl_reward(["p"], [THINK], ground_truth=["[]"], variant="tool_n1_v3") == [0.2]
    with pytest.raises(ValueError, match="answer is not JSON"):
        trl_reward(["p"], [GOOD], ground_truth=["[oops"])


def test_verl_compute_score():
    assert compute_score("toolace", GOOD, json.dumps(ANSWER), {"index": 3}) == 1.0
    assert compute_score("toolace", BLOCK, json.dumps(ANSWER), None, variant="no_reason") == 1.0
    with pytest.raises(ValueError, match="answer"):
        compute_score("toolace", GOOD, "{}")


def test_a_reward_function_of_the_users_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def length(completion, answer, tools):\n    return len(completion) / 10 + len(answer) + len(tools)\n"
        "def broken(completion, answer, tools):\n    return completion['text']\n"
        "def nothing(completion, answer, tools):\n    pass\n"
    )
    reward = reward_function(f"{path}:length")("x" * 10, [ToolCall("f", {})], [TOOL])
    assert (reward.total, reward.correct, reward.reason) == (
        3.0,
        False,
        "no_think",
    )  # the log's rates stay meaningful
    with pytest.raises(RewardError, match="raised TypeError"):
        reward_function(f"{path}:broken")("x", [], [])
    with pytest.raises(RewardError, match="must return a finite number, not None"):
        reward_function(f"{path}:nothing")("x", [], [])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("binery", "reward must be one of binary"),
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("{mine}:g", "has no function 'g'"),
        ("{bad}:f", "importing .* failed: ZeroDivisionError"),
        ("{text}:f", "is not a Python file"),
    ],
)
def test_a_reward_that_cannot_be_used_is_one_sentence(tmp_path, name, message):
    files = {"mine": tmp_path / "mine.py", "bad": tmp_path / "bad.py", "text": tmp_path / "notes.txt"}
    for file, source in zip(files.values(), ("f = 3\n", "1 / 0\n", "hello\n")):
        file.write_text(source)
    with pytest.raises(RewardError, match=message):
        reward_function(name.format(**files))


def write_rows(path: Path, *rows: dict) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_file_is_rescored(tmp_path, capsys, name):
    path = write_rows(
        tmp_path / name, {"id": "a", "completion": GOOD, "ground_truth": ANSWER},
        {"id": "b", "completion": THINK, "ground_truth": json.dumps(ANSWER)},
    )
    main([str(path), "--out", str(tmp_path / "scored.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [(row["id"], row["line"], row["reward"], row["reason"]) for row in rows] == [
        ("a", 1, 1.0, "correct"),
        ("b", 2, 0.0, "no_tool_call"),
    ]
    assert "2 completions, mean reward 0.5000" in capsys.readouterr().err
    main([str(path), "--variant", "tool_n1_v3"])
    assert '"reason": "no_block"' in capsys.readouterr().out


def test_a_file_is_rescored_leniently_by_the_tools_of_its_rows(tmp_path, capsys):
    completion = render_completion([ToolCall("f", {"price": 2})], "so")
    row = {
        "completion": completion,
        "ground_truth": [{"name": "f", "arguments": {"price": 2.0}}],
        "tools": [TOOL],
    }
    path = write_rows(tmp_path / "rows.jsonl", row)
    main([str(path), "--lenient"])
    main([str(path)])
    assert [json.loads(line)["total"] for line in capsys.readouterr().out.splitlines()] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"completion": "x"}', "rows.jsonl:1: a row needs the fields completion and ground_truth"),
        ('{"completion": "x", "ground_truth": []}\n{"compl', "rows.jsonl:2: not a JSON object"),
        ('{"completion": "x", "ground_truth": "[oops"}', "rows.jsonl:1: the answer is not JSON"),
        ("\n", "holds no row"),
    ],
)
def test_a_broken_file_is_one_sentence_with_its_line(tmp_path, text, message):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(RewardError, match=message):
        main([str(tmp_path / "rows.jsonl")])
