"""The only teacher: (completion, ground truth) -> Reward. Strict, total, and a table of variants.

Source: Nemotron-Research-Tool-N1 (arXiv 2505.00024), section on reward modelling and the reward ablation. Parsing is
in prompts.py; what a variant pays for is one row of REWARDS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prompts import Parsed, ToolCall, parse_completion


@dataclass(frozen=True)
class Reward:
    """total: what training sees. format_ok: thought and calls as the prompt asks. correct: the calls equal the answer.

    reason: "correct", a parse error of prompts.parse_completion, or how the calls differ: called_without_need,
    no_call, wrong_number, wrong_name, wrong_arguments.
    """

    total: float
    format_ok: bool
    correct: bool
    reason: str


@dataclass(frozen=True)
class Facts:
    """What a variant may look at. `correct` and `names` need readable calls, but not a thought."""

    format_ok: bool
    correct: bool
    names: bool  # the same multiset of tool names as in the answer


# Values for right calls with a thought, right calls without, wrong calls with the format, wrong without:
REWARDS: dict[str, Callable[[Facts], float]] = {
    # 1 / 0 / 0 / 0: the paper's default. Format alone pays nothing, so it cannot be farmed.
    "binary": lambda f: float(f.format_ok and f.correct),
    # 1 / 1 / 0 / 0: "no reasoning required".
    "no_reason": lambda f: float(f.correct),
    # 1 / 0.8 / 0.2 / 0: 0.2 of the reward is for the reasoning format.
    "partial_format": lambda f: 0.2 * f.format_ok + 0.8 * f.correct,
    # As above, with another 0.2 for the right tool names.
    "partial_names": lambda f: 0.2 * f.format_ok + 0.2 * f.names + 0.6 * f.correct,
}


def as_calls(answer: Sequence) -> list[ToolCall]:
    """A ground truth as ToolCalls: a list of ToolCall or of {"name", "arguments"} dicts.

    Raises ValueError for anything else, because a broken ground truth is an error of the data, not of the model.
    """
    if isinstance(answer, (str, bytes, dict)) or not isinstance(answer, Sequence):
        raise ValueError(f"the answer must be a list of calls, not {type(answer).__name__}: {str(answer)[:80]!r}")
    calls = []
    for item in answer:
        if isinstance(item, ToolCall):
            calls.append(item)
        elif isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("arguments"), dict):
            calls.append(ToolCall(item["name"], item["arguments"]))
        else:
            raise ValueError(f"a call of the answer needs a name and arguments: {str(item)[:80]!r}")
    return calls


def _difference(calls: list[ToolCall], answer: list[ToolCall]) -> str:
    """Why two multisets of calls differ, the coarsest reason first; "correct" if they do not."""
    if Counter(call.key() for call in calls) == Counter(call.key() for call in answer):
        return "correct"
    if not answer:
        return "called_without_need"
    if not calls:
        return "no_call"
    if len(calls) != len(answer):
        return "wrong_number"
    return "wrong_arguments" if _same_names(calls, answer) else "wrong_name"


def _same_names(calls: list[ToolCall], answer: list[ToolCall]) -> bool:
    return sorted(call.name for call in calls) == sorted(call.name for call in answer)


def score(completion: str, answer: Sequence, variant: str = "binary") -> Reward:
    """Scores one completion against the ground-truth calls.

    completion: the model's reply, any string; nothing in it can raise. answer: ToolCalls or {"name", "arguments"}
    dicts; order does not matter, [] means that no call is right. variant: a key of REWARDS. Raises ValueError for a
    broken answer and KeyError for an unknown variant.
    """
    truth, parsed = as_calls(answer), parse_completion(completion)
    return score_parsed(parsed, truth, variant)


def score_parsed(parsed: Parsed, answer: list[ToolCall], variant: str = "binary") -> Reward:
    """`score` for a completion that is already parsed."""
    difference = "unreadable" if parsed.calls is None else _difference(parsed.calls, answer)
    correct, format_ok = difference == "correct", parsed.error is None
    names = parsed.calls is not None and _same_names(parsed.calls, answer)
    total = REWARDS[variant](Facts(format_ok, correct, names))
    # A reward without reasoning calls an answer correct although the thought is missing.
    reason = difference if parsed.error is None or (correct and total == 1.0) else parsed.error
    return Reward(float(total), format_ok, correct, reason)
