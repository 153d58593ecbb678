"""The only teacher: (completion, ground truth) -> Reward. Strict, total, and a table of variants.

Source: Nemotron-Research-Tool-N1 (arXiv 2505.00024), section on reward modelling and the reward ablation.
Parsing is in prompts.py; what a variant pays for is one row of REWARDS. `python reward.py FILE.jsonl`
re-scores completions.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import math
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from config import UserError
from corpus.schema import lenient_arguments
from prompts import (
    LLAMA_MARKER,
    QWEN_MARKER,
    Parsed,
    ToolCall,
    canonical_json,
    parse_completion,
    parse_reference,
    strict_json,
)


class RewardError(UserError):
    """A reward function, variant or file that cannot be used; the message says which and what to do."""


@dataclass(frozen=True)
class Reward:
    """total: what training sees. format_ok: thought and calls as the prompt asks. correct: the calls equal
    the answer.

    reason: "correct", a parse error of prompts.parse_completion, or how the calls differ:
    called_without_need, no_call, wrong_number, wrong_name, wrong_arguments. Of the reference's variants also
    no_block, unread and "raises ERROR", where the reference stops with that exception.
    """

    total: float
    format_ok: bool
    correct: bool
    reason: str


@dataclass(frozen=True)
class Variant:
    """What a variant pays: for right and wrong calls, with and without the thought; everything else pays 0.

    `names` is added where the calls are wrong but the multiset of tool names is right, `unread` paid where a
    thought stands beside calls that cannot be read. With a `marker` the completion is read as the reference
    reads it, not strictly: see _score_as_reference. `silence` and `think_first` are two more of the
    reference's differences.
    """

    right: float
    right_no_think: float
    wrong: float
    wrong_no_think: float
    names: float = 0.0
    unread: float = 0.0
    marker: str = ""  # the header of an assistant's turn: only what follows the last one counts
    think_first: bool = False  # without a thought nothing else is looked at
    silence: bool = False  # no block is right when no call is; and a block with a plain text raises


REWARDS = {
    # The paper's default. Format alone pays nothing, so it cannot be farmed.
    "binary": Variant(1.0, 0.0, 0.0, 0.0),
    # The paper's ablation: no reasoning required; 0.2 for the reasoning format; 0.2 more for the right tool
    # names.
    "no_reason": Variant(1.0, 1.0, 0.0, 0.0),
    "partial_format": Variant(1.0, 0.8, 0.2, 0.0),
    "partial_names": Variant(1.0, 0.8, 0.2, 0.0, names=0.2),
    # The verdicts of Tool-N1's released reward, holes included: for comparisons, not for training.
    "tool_n1_v0": Variant(1.0, 0.0, 0.0, 0.0, marker=QWEN_MARKER, think_first=True),
    "tool_n1_v1": Variant(1.2, 1.0, -0.2, 0.0, marker=QWEN_MARKER),
    "tool_n1_v2": Variant(1.0, 1.0, 0.0, 0.0, marker=QWEN_MARKER),
    "tool_n1_v3": Variant(1.0, 0.8, 0.2, 0.0, unread=0.2, marker=QWEN_MARKER),
    "tool_n1_v4": Variant(1.0, 0.8, 0.2, 0.0, names=0.2, unread=0.2, marker=QWEN_MARKER),
    "tool_n1_llama": Variant(1.0, 0.0, 0.0, 0.0, marker=LLAMA_MARKER, think_first=True, silence=True),
}


# ----------------------------------------------------------------------------------------------- ground truth


def as_calls(answer: Sequence) -> list[ToolCall]:
    """A ground truth as ToolCalls: a list of ToolCall or of {"name", "arguments"} dicts.

    Raises ValueError for anything else, because a broken ground truth is an error of the data, not of the
    model.
    """
    if isinstance(answer, (str, bytes, dict)) or not isinstance(answer, Sequence):
        raise ValueError(
            f"the answer must be a list of calls, not {type(answer).__name__}: {str(answer)[:80]!r}"
        )
    calls = []
    for item in answer:
        if isinstance(item, ToolCall):
            calls.append(item)
        elif (
            isinstance(item, dict)
            and isinstance(item.get("name"), str)
            and isinstance(item.get("arguments"), dict)
        ):
            calls.append(ToolCall(item["name"], item["arguments"]))
        else:
            raise ValueError(f"a call of the answer needs a name and arguments: {str(item)[:80]!r}")
    return calls


def _as_dicts(calls: list[ToolCall]) -> list[dict]:
    return [{"name": call.name, "arguments": call.arguments} for call in calls]


def decode_answer(ground_truth: Any) -> list[ToolCall]:
    """A ground truth as files carry it, a list or its JSON text, as ToolCalls. Raises ValueError for anything
    else.
    """
    if not isinstance(ground_truth, str):
        return as_calls(ground_truth)
    try:
        return as_calls(strict_json(ground_truth))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"the answer is not JSON ({error}): {ground_truth[:80]!r}") from None


# ---------------------------------------------------------------------------------------------------- scoring


def _same_names(calls: list[ToolCall], answer: list[ToolCall]) -> bool:
    return sorted(call.name for call in calls) == sorted(call.name for call in answer)


def _difference(calls: list[ToolCall], answer: list[ToolCall]) -> str:
    """Why two multisets of calls differ, the coarsest reason first; "correct" if they do not."""
    if len(calls) == len(answer) and sorted(call.key() for call in calls) == sorted(
        call.key() for call in answer
    ):
        return "correct"
    if not answer:
        return "called_without_need"
    if not calls:
        return "no_call"
    if len(calls) != len(answer):
        return "wrong_number"
    return "wrong_arguments" if _same_names(calls, answer) else "wrong_name"


def _leniently(calls: list[ToolCall], tools: Sequence[dict]) -> list[ToolCall]:
    declared = {tool["name"]: tool for tool in tools}
    return [
        ToolCall(call.name, lenient_arguments(call.arguments, declared.get(call.name, {}))) for call in calls
    ]


def score(
    completion: str, answer: Sequence | str, variant: str = "binary", lenient: bool = False,
    tools: Sequence[dict] = (),
) -> Reward:
    """Scores one completion against the ground-truth calls.

    completion: the model's reply, any string; nothing in it can raise. answer: ToolCalls or {"name",
    "arguments"} dicts; order does not matter, [] means that no call is right. variant: a key of REWARDS.
    lenient: numbers are compared by what `tools` declare, so that 2 equals 2.0 where a number is asked for
    (schema.lenient_arguments).

    The tool_n1 variants reproduce the reference's verdict; for them the answer may also be JSON text, which
    the reference reads itself, and a broken one pays 0. Otherwise raises ValueError for a broken answer, and
    KeyError for an unknown variant.
    """
    row = REWARDS[variant]
    if row.marker:
        if lenient:
            raise ValueError(f"lenient does not go with {variant}, which compares as the reference does")
        if not isinstance(answer, str):
            answer = json.dumps(_as_dicts(as_calls(answer)))
        return _score_as_reference(completion, answer, row)
    truth, parsed = as_calls(answer), parse_completion(completion)
    if lenient and parsed.calls is not None:
        truth, parsed = (
            _leniently(truth, tools),
            Parsed(parsed.think, _leniently(parsed.calls, tools), parsed.error),
        )
    return score_parsed(parsed, truth, variant)


def score_parsed(parsed: Parsed, answer: list[ToolCall], variant: str = "binary") -> Reward:
    """`score` for a completion that is already parsed, strictly. Not for the reference's variants."""
    row, format_ok = REWARDS[variant], parsed.error is None
    if parsed.calls is None:
        return Reward(0.0, False, False, parsed.error)
    difference = _difference(parsed.calls, answer)
    if difference == "correct":
        total = row.right if format_ok else row.right_no_think
    else:
        total = row.wrong if format_ok else row.wrong_no_think
        total += row.names * _same_names(parsed.calls, answer) if row.names else 0.0
    # A reward without reasoning calls an answer correct although the thought is missing.
    reason = difference if format_ok or (difference == "correct" and total == 1.0) else parsed.error
    return Reward(total, format_ok, difference == "correct", reason)


# ------------------------------------------------------------------------------------ the reference's verdict


def _score_as_reference(completion: str, ground_truth: str, row: Variant) -> Reward:
    """The verdict of Tool-N1's released reward, measured on 6,009 rows of it
    (shared/golden/reward_verdicts.jsonl.gz).

    Where the reference raises, total is 0 and the reason names the exception.
    """
    if not isinstance(completion, str):
        return Reward(0.0, False, False, "not_text")
    try:
        thought, block, calls = parse_reference(completion, row.marker, text_raises=row.silence)
        answer = json.loads(ground_truth)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        if block is None and row.silence:
            return Reward(float(not answer), False, not answer, "no_block")
        if calls is None:
            return Reward(row.unread * thought, False, False, "no_block" if block is None else "unread")
        if row.think_first and not thought:
            return Reward(0.0, False, False, "no_think")
        return _compare_as_reference(calls, answer, thought, row)
    # Numbers and null have no length, a gold call may lack its arguments, integers may have too many digits.
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        return Reward(0.0, False, False, f"raises {type(error).__name__}")


def _compare_as_reference(calls: Any, answer: Any, thought: bool, row: Variant) -> Reward:
    same = names = False
    if len(calls) == 0 or len(answer) == 0:
        same = len(calls) == len(answer)
    elif all(isinstance(call, dict) and {"name", "arguments"} <= set(call) for call in calls):
        if all(
            isinstance(call, dict) for call in answer
        ):  # a single gold call is not wrapped: its keys are no calls
            ours = [(canonical_json(call["name"]), canonical_json(call["arguments"])) for call in calls]
            gold = [(canonical_json(call["name"]), canonical_json(call["arguments"])) for call in answer]
            same = Counter(ours) == Counter(gold)
            names = Counter(name for name, _ in ours) == Counter(name for name, _ in gold)
    if same:
        return Reward(row.right if thought else row.right_no_think, thought, True, "correct")
    total = (row.wrong if thought else row.wrong_no_think) + row.names * names
    return Reward(total, thought, False, "wrong_arguments" if names else "wrong_calls")


# ------------------------------------------------------------------------------------- functions for trainers


RewardFunction = Callable[
    [str, list[ToolCall], list[dict]], Reward
]  # (completion, answer, tools) -> its reward


def reward_function(name: str, lenient: bool = False) -> RewardFunction:
    """The function (completion, answer, tools) -> Reward that grpo.py calls for `--reward name`.

    name: a key of REWARDS, or `file.py:function` for a function of one's own, which gets (completion, answer,
    tools), the answer as a list of {"name", "arguments"} dicts, and returns a number or a Reward. Raises
    RewardError with one sentence where it cannot be used, also later, when it raises or returns anything
    else.
    """
    if name in REWARDS:
        if lenient and REWARDS[name].marker:
            raise RewardError(f"reward: {name} compares as the reference does; use another one with lenient")
        return lambda completion, answer, tools: score(completion, answer, name, lenient, tools)
    path, colon, attribute = name.rpartition(":")
    if not colon:
        raise RewardError(f"reward must be one of {', '.join(REWARDS)}, or file.py:function, not {name!r}")
    function = _import(path, attribute)

    def own(completion: str, answer: list[ToolCall], tools: list[dict]) -> Reward:
        try:
            value = function(completion, _as_dicts(answer), tools)
        except Exception as error:  # anything may come out of a user's function; the message says what
            raise RewardError(
                f"reward: {name} raised {type(error).__name__}: {error} on {completion[:200]!r}"
            ) from error
        if isinstance(value, Reward):
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise RewardError(
                f"reward: {name} must return a finite number, not {value!r} as on {completion[:200]!r}"
            )
        strict = score(completion, answer)
        return Reward(float(value), strict.format_ok, strict.correct, strict.reason)

    return own


def _import(path: str, attribute: str) -> Callable:
    if not Path(path).is_file():
        raise RewardError(f"reward: there is no file {path}; give file.py:function")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None:
        raise RewardError(f"reward: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        raise RewardError(f"reward: importing {path} failed: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, attribute, None)):
        raise RewardError(f"reward: {path} has no function {attribute!r}")
    return getattr(module, attribute)


def trl_reward(
    prompts: list, completions: list, *, ground_truth: list, variant: str = "binary", **columns
) -> list[float]:
    """A reward function for TRL's GRPOTrainer. Completions are texts or lists of messages; `ground_truth` is
    the column that `python data.py prepare --layouts trl` writes. Raises ValueError for a broken ground
    truth.
    """
    texts = [
        one if isinstance(one, str) else "\n".join(message.get("content") or "" for message in one)
        for one in completions
    ]
    return [
        score(text, decode_answer(truth), variant).total
        for text, truth in zip(texts, ground_truth, strict=True)
    ]


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None,
    variant: str = "binary",
) -> float:
    """verl's interface (custom_reward_function.path=reward.py, name=compute_score): one completion's reward.
    The ground truth is the JSON text that `python data.py prepare --layouts verl` writes. Raises ValueError
    for a broken one.
    """
    return score(solution_str, decode_answer(ground_truth), variant).total


# ----------------------------------------------------------------------------------------------- command line


def _read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, row) of a JSONL file, perhaps gzipped. Raises RewardError naming file and line."""
    line = 0
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8") as lines
        ):
            for line, text in enumerate(lines, 1):
                if text.strip():
                    row = json.loads(text)
                    if not isinstance(row, dict) or "completion" not in row or "ground_truth" not in row:
                        raise RewardError(
                            f"{path}:{line}: a row needs the fields completion and ground_truth"
                        )
                    yield line, row
    except (OSError, EOFError, zlib.error) as error:
        raise RewardError(f"{path} cannot be read: {error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RewardError(f"{path}:{line}: not a JSON object: {error}") from None


def _rescore(row: dict, variant: str, lenient: bool) -> Reward:
    truth = row["ground_truth"]
    if REWARDS[variant].marker and isinstance(truth, str):
        return score(row["completion"], truth, variant)  # the reference reads the text itself
    return score(row["completion"], decode_answer(truth), variant, lenient, row.get("tools") or ())


def main(arguments: list[str]) -> None:
    """`FILE.jsonl[.gz] --variant NAME [--lenient] [--out FILE]`: rows in, the same rows with their reward
    out.
    """
    parser = argparse.ArgumentParser(prog="reward.py", description="Re-scores a file of completions.")
    parser.add_argument(
        "file", type=Path, help="JSONL, perhaps gzipped: completion, ground_truth, perhaps tools"
    )
    parser.add_argument(
        "--variant", default="binary", choices=REWARDS, help="row of the table (default: binary)"
    )
    parser.add_argument(
        "--lenient", action="store_true", help="compare numbers by what the row's tools declare"
    )
    parser.add_argument("--out", type=Path, help="where the scored rows go (default: standard output)")
    args = parser.parse_args(arguments)
    if args.lenient and REWARDS[args.variant].marker:
        raise RewardError(f"lenient does not go with {args.variant}, which compares as the reference does")
    if args.out and args.out.exists() and args.out.samefile(args.file):
        raise RewardError(f"--out {args.out} is the file that is read; choose another name")
    reasons, total = Counter(), 0.0
    try:
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
        target = args.out.open("w", encoding="utf-8") if args.out else nullcontext(sys.stdout)
    except OSError as error:
        raise RewardError(f"--out {args.out} cannot be written: {error.strerror}") from None
    with target as out:
        for line, row in tqdm(_read_rows(args.file), desc="score", unit=" rows", disable=None):
            try:
                reward = _rescore(row, args.variant, args.lenient)
            except ValueError as error:
                raise RewardError(f"{args.file}:{line}: {error}") from None
            named = {key: row[key] for key in ("id", "prompt_id", "step") if key in row}
            out.write(json.dumps(named | {"line": line, "reward": reward.total} | asdict(reward)) + "\n")
            reasons[reward.reason] += 1
            total += reward.total
    count = sum(reasons.values())
    if not count:
        raise RewardError(f"{args.file} holds no row")
    print(f"{args.variant}: {count} completions, mean reward {total / count:.4f}", file=sys.stderr)
    for reason, n in reasons.most_common():
        print(f"  {n:>9} {100 * n / count:6.2f} %  {reason}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RewardError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
