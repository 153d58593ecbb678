"""The verdicts of Tool-N1's released reward, holes included: for comparisons with it, not for training.

Source: NVlabs/Tool-N1 at f9b4849, verl/verl/utils/reward_score/toolcall.py. They equal its own on 6,009 rows
(tests/test_reward.py). reward.score looks here for the names in REFERENCE.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from corpus.strict_json import canonical_json
from prompts import CALL, END_CALL, END_THINK, THINK

QWEN_MARKER = "<|im_start|>assistant"
LLAMA_MARKER = "<|start_header_id|>assistant<|end_header_id|>"


@dataclass(frozen=True)
class ReferenceRow:
    """What a variant pays for right and wrong calls, with and without a thought.

    names: added where the calls are wrong but the tools are right. unread: paid for a thought without calls
    that can be read.
    """

    right: float
    right_no_think: float
    wrong: float
    wrong_no_think: float
    names: float = 0.0
    unread: float = 0.0
    marker: str = QWEN_MARKER  # the header of an assistant's turn: only what follows the last one counts
    think_first: bool = False  # without a thought nothing else is looked at
    silence: bool = False  # no block is right when no call is; and a block with a plain text raises


REFERENCE = {
    "tool_n1_v0": ReferenceRow(1.0, 0.0, 0.0, 0.0, think_first=True),
    "tool_n1_v1": ReferenceRow(1.2, 1.0, -0.2, 0.0),
    "tool_n1_v2": ReferenceRow(1.0, 1.0, 0.0, 0.0),
    "tool_n1_v3": ReferenceRow(1.0, 0.8, 0.2, 0.0, unread=0.2),
    "tool_n1_v4": ReferenceRow(1.0, 0.8, 0.2, 0.0, names=0.2, unread=0.2),
    "tool_n1_llama": ReferenceRow(1.0, 0.0, 0.0, 0.0, marker=LLAMA_MARKER, think_first=True, silence=True),
}


@dataclass(frozen=True)
class Verdict:
    """format_ok: both think tags, and calls that can be read. reason: "correct", wrong_calls, wrong_arguments
    (the names are right), no_think, no_block, unread, not_text, or "raises ERROR" where the reference does.
    """

    total: float
    format_ok: bool
    correct: bool
    reason: str


def score_as_reference(completion: str, ground_truth: str, variant: str) -> Verdict:
    """The reference's verdict. ground_truth: JSON text, as its data has it. Where it raises, total is 0."""
    if not isinstance(completion, str):
        return Verdict(0.0, False, False, "not_text")
    row = REFERENCE[variant]
    kept = completion.rpartition(row.marker)[2]
    thought = THINK in kept and END_THINK in kept
    try:
        block = _last_block(kept)
        calls = None if block is None else _read_calls(block, row)
        answer = json.loads(ground_truth)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if block is None and row.silence:
            silent = len(answer) == 0
            return Verdict(float(silent), False, silent, "no_block")
        if calls is None:
            return Verdict(row.unread * thought, False, False, "no_block" if block is None else "unread")
        if row.think_first and not thought:
            return Verdict(0.0, False, False, "no_think")
        return _compare(calls, answer, thought, row)
    # Numbers and null have no length, a gold call may lack its arguments, integers may have too many digits.
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        return Verdict(0.0, False, False, f"raises {type(error).__name__}")


def _last_block(text: str) -> str | None:
    """The text of the last closed tool-call section, or None."""
    block = None
    at = text.find(CALL)
    while at >= 0 and (end := text.find(END_CALL, at)) >= 0:
        block = text[at + len(CALL) : end]
        at = text.find(CALL, end)
    return block


def _read_calls(block: str, row: ReferenceRow) -> Any:
    """A block's JSON, of whatever shape, or None where it is not JSON. JSON inside a JSON text is read once
    more, and an object becomes a list.
    """
    calls = None
    try:
        calls = json.loads(block.strip())
        if isinstance(calls, str):
            calls = json.loads(calls)
    except json.JSONDecodeError:
        if isinstance(calls, str) and row.silence:
            raise
        return None
    return [calls] if isinstance(calls, dict) else calls


def _compare(calls: Any, answer: Any, thought: bool, row: ReferenceRow) -> Verdict:
    same = names = False
    if len(calls) == 0 or len(answer) == 0:
        same = len(calls) == len(answer)
    elif all(isinstance(call, dict) and {"name", "arguments"} <= set(call) for call in calls):
        # A single gold call is not wrapped in a list: its items are keys.
        if all(isinstance(call, dict) for call in answer):
            ours = [(canonical_json(call["name"]), canonical_json(call["arguments"])) for call in calls]
            gold = [(canonical_json(call["name"]), canonical_json(call["arguments"])) for call in answer]
            same = Counter(ours) == Counter(gold)
            names = Counter(name for name, _ in ours) == Counter(name for name, _ in gold)
    if same:
        return Verdict(row.right if thought else row.right_no_think, thought, True, "correct")
    total = (row.wrong if thought else row.wrong_no_think) + row.names * names
    return Verdict(total, thought, False, "wrong_arguments" if names else "wrong_calls")
