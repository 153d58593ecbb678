"""Rewards of other papers: each rule a second time, slowly, and where they differ from strict verdicts."""

import json
import random

import pytest

from evals.published_rewards import PUBLISHED, rouge_l
from evals.reference_reward import REFERENCE
from prompts import ToolCall, render_calls, render_completion
from reward import REWARDS, RewardError, compute_score, main, reward_function, score, trl_reward

VALUES = [1, 1.0, True, "1", None, [1, 2], [2, 1], {"x": 1}, "", " ", "a b", "A  b", "b a c", "é ß", "É ß"]
TOOLS = [{"name": name, "parameters": {key: {"type": "any"} for key in "abc"}} for name in "fg"]
MOST = {"toolrl": 3.0, "toolrl_small": 1.0}
CALLS = [ToolCall("f", {"a": 1, "b": "x y"})]
THOUGHT = "<think>so</think>"
BLOCK = render_calls(CALLS)


def some_calls(rng: random.Random) -> list[ToolCall]:
    calls = []
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        keys = rng.sample("abc", rng.randint(0, 3))
        calls.append(ToolCall(rng.choice("fg"), {key: rng.choice(VALUES) for key in keys}))
    return calls


def pairs(count: int) -> list[tuple[list[ToolCall], list[ToolCall]]]:
    """(calls, right calls): often alike, in another order, with one call more, less, or changed."""
    rng, found = random.Random(0), []
    for _ in range(count):
        truth = some_calls(rng)
        calls = some_calls(rng) if rng.random() < 0.2 else rng.sample(truth, len(truth))
        if calls and rng.random() < 0.5:
            old = calls.pop(rng.randrange(len(calls)))
            calls.append(ToolCall(old.name, old.arguments | {rng.choice("abc"): rng.choice(VALUES)}))
        if rng.random() < 0.2:
            calls += rng.choices(truth or some_calls(rng) or CALLS, k=rng.randint(1, 2))
        found.append((calls, truth))
    return found


def same(one, other) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def jaccard(one: list, other: list) -> float:
    left, common = list(other), 0
    for item in one:
        if item in left:
            left.remove(item)
            common += 1
    return common / (len(one) + len(left)) if one or left else 1.0


def slow_toolrl(calls: list[ToolCall], truth: list[ToolCall], most: float) -> float:
    reached, possible = jaccard([c.name for c in calls], [t.name for t in truth]), 1
    left = list(calls)
    for right in truth:
        possible += 1 + len(right.arguments)
        winner, won = None, 0
        for place, call in enumerate(left):
            if call.name != right.name:
                continue
            points = jaccard(list(call.arguments), list(right.arguments))
            for key, value in right.arguments.items():
                points += key in call.arguments and same(call.arguments[key], value)
            if points > won:
                winner, won = place, points
        if winner is not None:
            left.pop(winner)
            reached += won
    return -most + 2 * most * reached / possible


def slow_rouge(one: str, other: str) -> float:
    a, b = one.lower().split(), other.lower().split()
    longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a)):
        for j in range(len(b)):
            step = longest[i][j] + 1 if a[i] == b[j] else max(longest[i][j + 1], longest[i + 1][j])
            longest[i + 1][j + 1] = step
    if not longest[-1][-1]:
        return 0.0
    precision, recall = longest[-1][-1] / len(a), longest[-1][-1] / len(b)
    return 2 * precision * recall / (precision + recall)


def slow_similarity(call: ToolCall, right: ToolCall) -> float:
    total, keys = 0.0, set(call.arguments) | set(right.arguments)
    for key in set(call.arguments) & set(right.arguments):
        value, wanted = call.arguments[key], right.arguments[key]
        texts = isinstance(value, str) and isinstance(wanted, str)
        total += 1.0 if same(value, wanted) else slow_rouge(value, wanted) if texts else 0.0
    return total / len(keys) if keys else 1.0


def slow_overlap(calls: list[ToolCall], truth: list[ToolCall]) -> float:
    if not calls and not truth:
        return 1.0
    common, taken = 0.0, []
    for call in calls:
        free = [i for i in range(len(truth)) if i not in taken and truth[i].name == call.name]
        if free:
            scores = [slow_similarity(call, truth[i]) for i in free]
            common += max(scores)
            taken.append(free[scores.index(max(scores))])
    return common / (len(calls) + len(truth) - len(taken))


def folded(calls: list[ToolCall]) -> list[str]:
    """Calls as overlap tells them apart: texts that stand for themselves without case and white space."""
    texts = []
    for call in calls:
        items = call.arguments.items()
        arguments = {k: v.lower().split() or v if isinstance(v, str) else [v] for k, v in items}
        texts.append(json.dumps([call.name, arguments], sort_keys=True))
    return sorted(texts)


def test_every_rule_is_its_slow_twin_and_the_most_is_for_right_calls():
    cases = pairs(3000)
    for calls, truth in cases:
        reply = render_completion(calls, "so")
        for name, most in MOST.items():
            reward = score(reply, truth, name)
            assert reward.total == pytest.approx(1 + slow_toolrl(calls, truth, most)), (calls, truth)
            assert 1 - most <= reward.total <= REWARDS[name].right == 1 + most
            assert (reward.total == 1 + most) == reward.correct == score(reply, truth).correct
        reward = score(reply, truth, "overlap", tools=TOOLS)
        assert reward.total == pytest.approx(slow_overlap(calls, truth)), (calls, truth)
        assert 0 <= reward.total <= 1
        assert (reward.total == 1) == (folded(calls) == folded(truth)) and reward.total >= reward.correct
    assert sum(folded(calls) == folded(truth) for calls, truth in cases) > 500, "the cases tell nothing"


FORMATS = [  # reply, what toolrl pays for the format and, of 3, for correctness; what overlap pays
    (THOUGHT + BLOCK, 1, 3, 1),
    (f" {THOUGHT}\n\n{BLOCK} <|im_end|>\n", 1, 3, 1),
    (BLOCK, 0, 3, -1),
    (f"<think> </think>{BLOCK}", 0, 3, -1),
    (f"Sure! {THOUGHT}{BLOCK}", 0, 3, -1),
    (f"{THOUGHT}{BLOCK} Done!", 0, 3, -1),
    (f"{THOUGHT}{BLOCK}{render_calls([])}", 0, 3, -1),  # the first block counts
    (f"{THOUGHT}{render_calls([])}{BLOCK}", 0, -3, -1),
    (f"<think>{BLOCK}</think>{render_calls([])}", 0, 3, -1),
    (f"{THOUGHT}<tool_call>oops</tool_call>", 1, -3, -1),
    (f"{THOUGHT}<tool_call>{{}}</tool_call>", 1, -3, -1),
    (f"{THOUGHT}<tool_call>oops</tool_call></tool_call>", 0, -3, -1),
    ("<think></think><tool_call>oops</tool_call>", 0, -3, -1),
    ("<tool_call>oops</tool_call>", 0, -3, -1),
    (f"{THOUGHT}{BLOCK.removesuffix('</tool_call>')}", 0, -3, -1),
    (THOUGHT, 0, -3, -1), ("", 0, -3, -1), (None, 0, -3, -1),
]


@pytest.mark.parametrize(("reply", "shape", "correctness", "overlap"), FORMATS, ids=lambda x: str(x)[:50])
def test_what_the_format_pays(reply, shape, correctness, overlap):
    assert score(reply, CALLS, "toolrl").total == shape + correctness
    assert score(reply, CALLS, "toolrl_small").total == shape + correctness / 3
    assert score(reply, CALLS, "overlap", tools=TOOLS).total == overlap
    strict = score(reply, CALLS)
    for name in (*PUBLISHED, "none"):
        verdict = score(reply, CALLS, name, tools=TOOLS)
        assert (verdict.format_ok, verdict.correct) == (strict.format_ok, strict.correct)
        assert (verdict.reason == strict.reason) and (name != "none" or verdict.total == 0)


def test_a_tag_in_a_value_is_a_part_of_it():
    truth = [ToolCall("f", {"a": "</tool_call><tool_call>"})]
    assert score(render_completion(truth, "so"), truth, "toolrl").total == 4


@pytest.mark.parametrize(
    ("call", "tools", "total"),
    [(ToolCall("h", {}), TOOLS, -1), (ToolCall("f", {"d": 1}), TOOLS, -1), (ToolCall("f", {}), (), -1),
     (ToolCall("f", {"a": 2}), json.dumps(TOOLS), 0),
     (ToolCall("f", {"a": 1, "d": 1}), [{"name": "f", "parameters": {"additionalProperties": True}}], 1 / 3)],
)
def test_overlap_asks_for_declared_names_and_arguments(call, tools, total):
    assert score(render_completion([call], "so"), CALLS, "overlap", tools=tools).total == total


def test_overlap_without_tools_is_an_error():
    with pytest.raises(ValueError, match="tools"):
        trl_reward([""], [THOUGHT + BLOCK], ground_truth=[json.dumps([])], variant="overlap")


def test_rouge_of_long_texts():
    assert rouge_l("a4", "A4") == 1.0
    rng = random.Random(0)
    for n, m in ((0, 0), (0, 5), (1, 200), (130, 70), (300, 300)):
        text, right = (" ".join(rng.choices("abcd", k=size)) for size in (n, m))
        assert rouge_l(text, right) == pytest.approx(slow_rouge(text, right))


@pytest.mark.parametrize("name", [*PUBLISHED, "none"])
def test_a_row_works_wherever_a_reward_is_named(name, tmp_path, capsys):
    reply = render_completion([ToolCall("f", {"a": 1, "b": "x"})], "so")
    answer = json.dumps([call.as_dict() for call in CALLS])
    total = score(reply, CALLS, name, tools=TOOLS).total
    assert reward_function(name)(reply, CALLS, TOOLS).total == total
    column = [json.dumps(TOOLS)]
    assert trl_reward([""], [reply], ground_truth=[answer], tools_json=column, variant=name) == [total]
    assert compute_score("", reply, answer, {"tools_json": column[0]}, variant=name) == total
    row = {"completion": reply, "ground_truth": answer, "tools": TOOLS}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    main([str(tmp_path / "rows.jsonl"), "--variant", name])
    assert json.loads(capsys.readouterr().out)["total"] == total


@pytest.mark.parametrize("name", [*PUBLISHED, *REFERENCE])
def test_a_row_that_compares_as_its_source_is_not_lenient(name):
    with pytest.raises(ValueError, match="lenient"):
        score("", [], name, lenient=True)
    with pytest.raises(RewardError, match="lenient"):
        reward_function(name, lenient=True)
