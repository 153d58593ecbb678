"""Rewards of other papers in our wire format, as published but for differences that are named. reward.score
looks here for the names in PUBLISHED.

They grade near misses, where the paper that we follow pays for right calls alone. No output of a model makes
them raise. Which calls are `correct` stays the strict verdict of reward.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from corpus.schema import read_tools, undeclared
from corpus.strict_json import canonical_json
from prompts import CALL, END_CALL, Parsed, ToolCall, parse_completion

UNREADABLE = ("bad_json", "not_a_list", "bad_call")  # errors inside tags that are as they should be


@dataclass(frozen=True)
class PublishedRow:
    """rule: (completion, right calls, tools) -> what is paid. right: for the right reply, the most there is.

    right_no_think: for the right calls alone.
    """

    rule: Callable[[str, list[ToolCall], Sequence[dict] | str | None], float]
    right: float
    right_no_think: float


# --------------------------------------------------------------------------------------------------- toolrl


def toolrl(completion: str, truth: list[ToolCall], tools: object, most: float) -> float:
    """1 for the format, plus a correctness in [-most, most]. ToolRL (arXiv 2504.13958), section 3.3.

    The correctness of calls that are read is 2 * most * earned / parts - most. Earned is the overlap of the
    multisets of names, and for each right call, in turn, the overlap of its keys and the number of its right
    values in the best call of the same name that is still free. `parts` is what the right calls would earn.
    It is -most where no calls can be read. As in the released code, the two parts are independent: a block of
    calls in the wrong place earns no format and all of the correctness, and the first block counts. Calls too
    many cost little: only the overlap of the names sees them.

    Differences to the released code:
    - A block holds our JSON list instead of a call per line, with `arguments` instead of `parameters`. White
      space around tags is free, and so is an end token. A list, or a call, of another form cannot be read.
    - The format asks for a thought that says something and has no tags in it.
    - A tag inside a value is a part of the value, where the released code sees a second block.
    - Values are equal by their JSON text, as in our strict verdict. By Python's ==, which the released code
      takes, true would equal 1 and a reply could earn the most without being correct.
    - Where no call is right, `[]` earns the most and any call the least. The released code pays there for
      the format alone, because a text, which has no ground truth, would be the answer.
    """
    parsed = parse_completion(completion)
    calls = _first_calls(completion, parsed)
    correctness = -most if calls is None else 2 * most * _toolrl_share(calls, truth) - most
    return _tags_are_right(completion, parsed) + correctness


def _tags_are_right(completion: str, parsed: Parsed) -> bool:
    """Whether a thought and one block of calls stand where they should, whatever is inside the block."""
    if parsed.error is None:
        return True
    thought = bool(parsed.think and parsed.think.strip())
    one_block = thought and completion.count(CALL) == completion.count(END_CALL) == 1
    return one_block and parsed.error in UNREADABLE


def _first_calls(completion: str, parsed: Parsed) -> list[ToolCall] | None:
    """The calls of the first block, wherever it stands, or None where there are none to read."""
    if parsed.calls is not None or parsed.error == "not_text":
        return parsed.calls
    _, begun, rest = completion.partition(CALL)
    block, closed, _ = rest.partition(END_CALL)
    return parse_completion(CALL + block + END_CALL).calls if begun and closed else None


def _toolrl_share(calls: list[ToolCall], truth: list[ToolCall]) -> float:
    """What the calls earn of what the right ones would, in [0, 1]."""
    earned = _overlap([call.name for call in calls], [call.name for call in truth])
    parts = 1.0
    free = [(call.name, _texts(call)) for call in calls]
    for call in truth:
        wanted = _texts(call)
        parts += 1.0 + len(wanted)
        points = [_points(given, wanted) if name == call.name else 0.0 for name, given in free]
        best = max(points, default=0.0)
        if best > 0.0:
            earned += best
            del free[points.index(best)]
    return earned / parts


def _points(given: dict[str, str], wanted: dict[str, str]) -> float:
    return _overlap(given, wanted) + sum(given.get(key) == text for key, text in wanted.items())


def _overlap(ours: Iterable[str], gold: Iterable[str]) -> float:
    """Intersection over union of two multisets; 1 if both are empty."""
    ours, gold = Counter(list(ours)), Counter(list(gold))
    union = (ours | gold).total()
    return (ours & gold).total() / union if union else 1.0


def _texts(call: ToolCall) -> dict[str, str]:
    return {key: canonical_json(value) for key, value in call.arguments.items()}


# -------------------------------------------------------------------------------------------------- overlap


def overlap(completion: str, truth: list[ToolCall], tools: Sequence[dict] | str | None) -> float:
    """-1 for a wrong format, else the graded intersection over union of the calls, in [0, 1].

    The reward of Sim-RL in STAR (arXiv 2602.03022), equations 6 to 10, read in its released code (simrl.py of
    Qwen-Applications/STAR) and, of the paper, in public summaries only. The format is right where thought and
    calls are as the prompt asks and the tools declare every name and argument. Then each call, in turn, is
    paired with the most similar right call of its name that is still free. The reward is the sum of the
    similarities over the number of calls on both sides, a pair counted once; 1 for none on both sides.

    Differences to the released code:
    - Values other than texts are equal by their JSON text, and not by Python's == or str(), by which true
      equals 1, and the order of keys inside a value counts.
    - Words are what stands between white space, in any script. The released code takes ASCII letters and
      digits alone, and their Porter stems.
    - A tool that takes undeclared arguments takes any.
    - Equation 9, for replies in words, has no case here: our replies are calls, and `[]` is one without any.

    Two texts that differ only in case, or in the white space between words, have similarity 1. So a reply
    that is not correct can earn 1. Raises ValueError for tools that are missing or broken.
    """
    if tools is None:
        raise ValueError("overlap needs the tools that were offered: `tools`, or prepare's `tools_json`")
    offered = {tool["name"]: tool for tool in read_tools(tools or [])}
    parsed = parse_completion(completion)
    if parsed.error is not None or not all(_is_declared(call, offered) for call in parsed.calls):
        return -1.0
    total, free = 0.0, list(truth)
    for call in parsed.calls:
        rated = [similarity(call, right) if call.name == right.name else -1.0 for right in free]
        best = max(rated, default=-1.0)
        if best >= 0.0:
            total += best
            del free[rated.index(best)]
    union = len(parsed.calls) + len(free)
    return total / union if union else 1.0


def _is_declared(call: ToolCall, offered: dict[str, dict]) -> bool:
    return call.name in offered and not undeclared(call.arguments, offered[call.name])


def similarity(call: ToolCall, right: ToolCall) -> float:
    """Of two calls of the same tool: the similarities of common arguments over the number of all keys."""
    keys = call.arguments.keys() | right.arguments.keys()
    common = [key for key in right.arguments if key in call.arguments]
    alike = sum(_alike(call.arguments[key], right.arguments[key]) for key in common)
    return alike / len(keys) if keys else 1.0


def _alike(value: object, right: object) -> float:
    """Of two values: ROUGE-L for texts; all others are equal or not, by their JSON text."""
    if isinstance(value, str) and isinstance(right, str) and value != right:
        return rouge_l(value, right)
    return float(canonical_json(value) == canonical_json(right))


def rouge_l(text: str, right: str) -> float:
    """ROUGE-L's F1 (Lin 2004) over lower-case words: twice the longest common subsequence over their number.

    The subsequence is counted by bits of an integer, one for each word of the right text (Hyyrö 2004): the
    time is linear in a model's text, with a small factor for the length of the right one.
    """
    words, wanted = text.lower().split(), right.lower().split()
    places: dict[str, int] = {}
    for place, word in enumerate(wanted):
        places[word] = places.get(word, 0) | 1 << place
    whole = (1 << len(wanted)) - 1
    open_places = whole  # a bit turns 0 where the subsequence grows
    for word in words:
        if hits := open_places & places.get(word, 0):
            open_places = (open_places + hits | open_places - hits) & whole
    longest = len(wanted) - open_places.bit_count()
    return 2 * longest / max(1, len(words) + len(wanted))


PUBLISHED = {
    "toolrl": PublishedRow(partial(toolrl, most=3.0), 4.0, 3.0),
    "toolrl_small": PublishedRow(partial(toolrl, most=1.0), 2.0, 1.0),
    "overlap": PublishedRow(overlap, 1.0, -1.0),
}
