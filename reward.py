"""The only teacher: (completion, ground truth) -> Reward. Strict, and a table of variants.

Source: Nemotron-Research-Tool-N1 (arXiv 2505.00024), reward modelling and its ablation. Parsing is in
prompts.py; a row of REWARDS says what a variant pays. `python reward.py FILE.jsonl` re-scores completions.
"""

# No postponed annotations: dataclasses look them up in sys.modules, where verl does not enter this file.
import argparse
import copy
import importlib.util
import json
import math
import numbers
import runpy
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# A trainer executes this file by its path, and may have a `config` or `corpus` of its own.
modules_beside = runpy.run_path(str(Path(__file__).resolve().parent / "corpus/foreign.py"))["modules_beside"]

with modules_beside(Path(__file__)):
    from config import UserError, first_line, run_command
    from corpus.replies import reply_text
    from corpus.schema import lenient_arguments, read_tools, without_nulls
    from corpus.sources import read_records
    from corpus.strict_json import MAX_DEPTH, nested_deeper, strict_json
    from evals.published_rewards import PUBLISHED, PublishedRow
    from evals.reference_reward import REFERENCE, ReferenceRow, score_as_reference
    from prompts import ToolCall, parse_completion


class RewardError(UserError):
    """A reward function, variant or file that cannot be used; the message says which and what to do."""


@dataclass(frozen=True)
class Reward:
    """total: what training sees. format_ok: thought and calls as the prompt asks. correct: right calls.

    reason: "correct", an error of prompts.parse_completion, or how the calls differ: called_without_need,
    no_call, wrong_number, wrong_name, wrong_arguments; for tool_n1 variants as in reference_reward.Verdict.
    """

    total: float
    format_ok: bool
    correct: bool
    reason: str


@dataclass(frozen=True)
class Variant:
    """What a variant pays for right and wrong calls, with and without the thought; everything else pays 0."""

    right: float
    right_no_think: float
    wrong: float
    wrong_no_think: float
    names: float = 0.0  # added where the calls are wrong but the multiset of their names is right


REWARDS: dict[str, Variant | ReferenceRow | PublishedRow] = {
    # The paper's default. Format alone pays nothing, so it cannot be farmed.
    "binary": Variant(1.0, 0.0, 0.0, 0.0),
    # The paper's ablation: no reasoning required; 0.2 for the reasoning format; 0.2 more for right names.
    "no_reason": Variant(1.0, 1.0, 0.0, 0.0),
    "partial_format": Variant(1.0, 0.8, 0.2, 0.0),
    "partial_names": Variant(1.0, 0.8, 0.2, 0.0, names=0.2),
    # tool_n1_v0 to v4 and tool_n1_llama: the released reward, holes included. To compare, not to train with.
    **REFERENCE,
    # toolrl, toolrl_small and overlap: rewards of other papers, beyond [0, 1]. They grade near misses.
    **PUBLISHED,
    # For on-policy distillation: only the KL to `--reference` trains.
    "none": Variant(0.0, 0.0, 0.0, 0.0),
}


def as_calls(answer: Sequence) -> list[ToolCall]:
    """A ground truth as ToolCalls: a list of ToolCall or of {"name", "arguments"} dicts.

    Raises ValueError for anything else: a broken ground truth is an error of the data, not of the model.
    """
    if isinstance(answer, (str, bytes, dict)) or not isinstance(answer, Sequence):
        raise ValueError(f"the answer must be a list of calls, not {answer!r:.80}")
    calls = []
    for item in answer:
        call = ToolCall(item.get("name"), item.get("arguments")) if isinstance(item, dict) else item
        named = isinstance(call, ToolCall) and isinstance(call.name, str)
        if not named or not isinstance(call.arguments, dict):
            raise ValueError(f"a call of the answer needs a name and arguments: {item!r:.80}")
        calls.append(call)
    return calls


def decode_answer(ground_truth: Any) -> list[ToolCall]:
    """A ground truth as trainers have it, a list or its JSON text, as ToolCalls. Raises ValueError else."""
    if not isinstance(ground_truth, str):
        if without_nulls(ground_truth) != ground_truth:
            raise ValueError(f"a null may be Arrow's filling; give the answer as text: {ground_truth!r:.80}")
        return as_calls(ground_truth)
    try:
        answer = strict_json(ground_truth)
        if nested_deeper(answer, MAX_DEPTH):  # no completion could equal it
            raise RecursionError(f"nested more than {MAX_DEPTH} deep")
        return as_calls(answer)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"the answer is not JSON ({error}): {ground_truth!r:.80}") from None


# ---------------------------------------------------------------------------------------------------- scoring


def score(
    completion: str, answer: Sequence | str, variant: str = "binary", lenient: bool = False,
    tools: Sequence[dict] | str | None = (),
) -> Reward:
    """Scores one completion against the ground-truth calls.

    completion: the model's reply, any string; nothing in it can raise. answer: ToolCalls or {"name",
    "arguments"} dicts; order does not matter, [] means that no call is right. variant: a key of REWARDS.
    lenient: numbers are compared by what `tools` declare, so that 2 equals 2.0 where a number is asked for;
    `overlap` needs `tools` too.

    For the tool_n1 variants the answer may also be JSON text, which the reference reads itself; a broken one
    pays 0. Otherwise raises ValueError for a broken answer or tools, and KeyError for an unknown variant.
    """
    row = REWARDS[variant]
    if lenient and not isinstance(row, Variant):
        raise ValueError(f"lenient does not go with {variant}, which compares as its source does")
    if isinstance(row, PublishedRow):
        return replace(score(completion, answer), total=row.rule(completion, as_calls(answer), tools))
    if isinstance(row, ReferenceRow):
        if not isinstance(answer, str):
            answer = json.dumps([call.as_dict() for call in as_calls(answer)])
        return Reward(**vars(score_as_reference(completion, answer, variant)))
    truth = as_calls(answer)
    parsed = parse_completion(completion)
    if parsed.calls is None:
        return Reward(0.0, False, False, parsed.error)
    calls = parsed.calls
    if lenient:
        if tools is None:
            raise ValueError("lenient needs the tools that were offered: `tools`, or prepare's `tools_json`")
        declared = {tool["name"]: tool for tool in read_tools(tools or [])}
        truth, calls = _leniently(truth, declared), _leniently(calls, declared)
    difference = _difference(calls, truth)
    format_ok = parsed.error is None
    if correct := difference == "correct":
        total = row.right if format_ok else row.right_no_think
    else:
        total = row.wrong if format_ok else row.wrong_no_think
        if _same_names(calls, truth):
            total += row.names
    # A reward without reasoning calls an answer correct although the thought is missing.
    reason = difference if format_ok or (correct and total == 1.0) else parsed.error
    return Reward(total, format_ok, correct, reason)


def _difference(calls: list[ToolCall], answer: list[ToolCall]) -> str:
    """Why two multisets of calls differ, the coarsest reason first; "correct" if they do not."""
    if calls and not answer:
        return "called_without_need"
    if answer and not calls:
        return "no_call"
    if len(calls) != len(answer):
        return "wrong_number"
    if not _same_names(calls, answer):
        return "wrong_name"
    same = sorted(call.key() for call in calls) == sorted(call.key() for call in answer)
    return "correct" if same else "wrong_arguments"


def _same_names(calls: list[ToolCall], answer: list[ToolCall]) -> bool:
    return sorted(call.name for call in calls) == sorted(call.name for call in answer)


def _leniently(calls: list[ToolCall], declared: dict[str, dict]) -> list[ToolCall]:
    return [ToolCall(c.name, lenient_arguments(c.arguments, declared.get(c.name, {}))) for c in calls]


# ------------------------------------------------------------------------------------- functions for trainers


RewardFunction = Callable[[str, list[ToolCall], list[dict]], Reward]  # (completion, answer, tools)


def reward_function(name: str, lenient: bool = False) -> RewardFunction:
    """The function (completion, answer, tools) -> Reward that grpo.py calls for `--reward name`.

    name: a key of REWARDS, or `file.py:function` for a function of one's own, which gets the answer as a list
    of {"name", "arguments"} dicts and returns a number or a Reward. Raises RewardError where it cannot be
    used, also later, when it raises or returns anything else.
    """
    if lenient and not isinstance(REWARDS.get(name, REWARDS["binary"]), Variant):
        raise RewardError(f"reward: {name} compares as its source does; use another one with lenient")
    if name in REWARDS:
        return lambda completion, answer, tools: score(completion, answer, name, lenient, tools)
    path, colon, attribute = name.rpartition(":")
    if not colon:
        raise RewardError(f"reward must be one of {', '.join(REWARDS)}, or file.py:function, not {name!r}")
    function = _import(str(Path(path).expanduser()), attribute)

    def own(completion: str, answer: list[ToolCall], tools: list[dict]) -> Reward:
        """The user's function as a reward; a plain number gets format and correctness of the strict one."""
        copies = copy.deepcopy(([call.as_dict() for call in answer], tools))  # it may change them
        try:
            value = function(completion, *copies)
            total = value.total if isinstance(value, Reward) else value
            number = isinstance(total, numbers.Real) and not isinstance(total, bool) and math.isfinite(total)
        except (Exception, SystemExit) as error:  # anything may come out of a user's function
            raise RewardError(f"reward: {name} raised {first_line(error)} on {completion!r:.200}") from error
        if not number:
            raise RewardError(f"reward: {name} must return a finite number, not {value!r}")
        verdict = value if isinstance(value, Reward) else score(completion, answer)
        return replace(verdict, total=float(total))

    return own


def _import(path: str, attribute: str) -> Callable:
    """A function of a user's file, which may import its neighbours, also those with names of ours."""
    if not Path(path).is_file() or not path.endswith(".py"):
        raise RewardError(f"reward: there is no Python file {path}; give file.py:function")
    spec = importlib.util.spec_from_file_location(f"own_reward_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        with modules_beside(Path(path)):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        hint = "; only `if __name__ == '__main__':` may read a command line" * isinstance(error, SystemExit)
        raise RewardError(f"reward: importing {path} failed: {first_line(error)}{hint}") from error
    if not callable(getattr(module, attribute, None)):
        raise RewardError(f"reward: {path} has no function {attribute!r}")
    return getattr(module, attribute)


def trl_reward(
    prompts: list, completions: list, *, ground_truth: list, variant: str = "binary", lenient: bool = False,
    **columns,
) -> list[float]:
    """A reward function for TRL's GRPOTrainer. Completions are texts or messages, see corpus.replies.

    `ground_truth` and, for lenient and overlap, `tools_json` are columns that `python data.py prepare
    --layouts trl` writes. Raises ValueError for broken ones, or a completion that cannot be put together.
    """
    tools = columns.get("tools") or columns.get("tools_json") or [None] * len(completions)
    return [
        score(reply_text(completion), decode_answer(truth), variant, lenient, offered).total
        for completion, truth, offered in zip(completions, ground_truth, tools, strict=True)
    ]


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None,
    variant: str = "binary", lenient: bool = False,
) -> float:
    """verl's interface (custom_reward_function.path=reward.py, name=compute_score). Ground truth and, for
    lenient and overlap, tools are those of `python data.py prepare --layouts verl`. Raises ValueError for
    broken ones.
    """
    extra = extra_info or {}
    tools = extra.get("tools") or extra.get("tools_json")
    return score(solution_str, decode_answer(ground_truth), variant, lenient, tools).total


# ----------------------------------------------------------------------------------------------- command line


def _refuse(value: Any) -> None:
    raise ValueError(f"the answer is not JSON: {value}")


def rescore(path: Path, variant: str, lenient: bool) -> Iterator[dict]:
    """The reward of every row of a file, as a row. Raises RewardError that names the file and the line."""
    known = {}
    own = None if variant in REWARDS else reward_function(variant)
    for line, row in read_records(path):
        try:
            if isinstance(row, Exception):
                raise ValueError(f"not JSON: {row}")
            truth = row.get("ground_truth", row.get("answer")) if isinstance(row, dict) else None
            if truth is None or "completion" not in row:
                raise ValueError("a row needs the fields completion and ground_truth (or answer); see --help")
            truth = truth if isinstance(truth, str) else json.dumps(truth, default=_refuse)
            if variant not in REFERENCE:  # the reference reads texts itself
                truth = decode_answer(truth)
            prompt = str(row.get("prompt_id", line))  # samples.jsonl has its tools in its first row
            tools = row.get("tools") or row.get("tools_json") or known.get(prompt, row.get("tools"))
            known = {prompt: tools}
            text = reply_text(row["completion"])
            reward = own(text, truth, tools or []) if own else score(text, truth, variant, lenient, tools)
        except (ValueError, TypeError, RecursionError) as error:
            raise RewardError(f"{path}:{line}: {error}") from None
        named = {key: row[key] for key in ("id", "prompt_id", "step") if key in row}
        yield {**named, "line": line, "reward": reward.total, **asdict(reward)}


def main(arguments: list[str]) -> None:
    """`FILE.jsonl[.gz] --variant NAME [--lenient] [--out FILE]`: a row of rewards for every row."""
    parser = argparse.ArgumentParser(prog="reward.py", description="Re-scores a file of completions.")
    add = parser.add_argument
    add("file", type=Path, help="JSON, JSONL or Parquet: completion, ground_truth or answer, tools")
    names = f"{', '.join(REWARDS)}, or file.py:function (default: binary)"
    add("--variant", default="binary", metavar="NAME", help=names)
    add("--lenient", action="store_true", help="compare numbers by what a row's tools declare (default: no)")
    add("--out", type=Path, metavar="FILE", help="where the scored rows go (default: standard output)")
    args = parser.parse_args(arguments)
    if args.out and args.out.exists() and args.out.samefile(args.file):
        raise RewardError(f"--out {args.out} is the file that is read; choose another name")
    reasons = Counter()
    total = 0.0
    with args.out.open("w", encoding="utf-8") if args.out else nullcontext(sys.stdout) as out:
        for row in rescore(args.file, args.variant, args.lenient):
            out.write(json.dumps(row, default=str) + "\n")
            reasons[row["reason"]] += 1
            total += row["total"]
    count = reasons.total()
    print(f"{args.variant}: {count} completions, mean reward {total / max(1, count):.4f}", file=sys.stderr)
    for reason, n in reasons.most_common():
        print(f"  {n:>9} {100 * n / count:6.2f} %  {reason}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
