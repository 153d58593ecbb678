"""BFCL and API-Bank during training: a fixed subset, answered greedily, judged as the evaluation scripts
judge it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from config import Config, ConfigError
from corpus.examples import KINDS, Tokenized, example_kind
from distributed.ranks import Ranks
from eval_apibank import choose_cases
from eval_apibank import prompt_cases as apibank_cases
from evals import apibank_check, bfcl_check
from evals.apibank_data import load_cases
from evals.bfcl_data import LIVE_AST, NON_LIVE_AST, choose_problems
from evals.bfcl_data import prompt_cases as bfcl_cases
from evals.predict import Case
from evals.report import ReportError
from kernel.decode import Prompt
from prompts import encode_prompt
from reward import score
from rollout import sample_groups

# One figure per category would be noise on a subset: these parts are logged.
PARTS = dict.fromkeys(NON_LIVE_AST, "non_live") | dict.fromkeys(LIVE_AST, "live")
PARTS |= {"irrelevance": "irrelevance", "live_irrelevance": "irrelevance", "live_relevance": "relevance"}


@dataclass(frozen=True)
class JudgedPrompt:
    """One benchmark case, ready to be asked: `part` is what it counts for, `judge` the verdict on a reply's
    text.
    """

    prompt: Prompt
    part: str
    judge: Callable[[str], bool]


def check_folders(config: Config) -> None:
    """Raises ConfigError where a benchmark's folder is not there. A name with one / may be a hub id."""
    for key in ("bfcl", "apibank"):
        folder = getattr(config, key)
        if folder and folder.count("/") != 1 and not Path(folder).exists():
            raise ConfigError(f"{key}: the folder {folder!r} does not exist")


def load_benchmarks(
    config: Config, tokenizer, template: str, quiet: bool = False
) -> dict[str, list[JudgedPrompt]]:
    """The first `benchmark_cases` cases of every category of the benchmarks whose folders the config names.

    Raises ConfigError when a folder is none, or when no prompt is short enough; longer ones are counted and
    left out.
    """
    judged: dict[str, list[tuple[Case, str, Callable[[str], bool]]]] = {}
    try:
        if config.bfcl:
            problems = choose_problems(config.bfcl, ["single_turn"], max(1, config.eval_cases // 20))
            judged["bfcl"] = [
                (case, PARTS[problem.category], partial(_right, bfcl_check.check, problem))
                for case, problem in zip(bfcl_cases(problems), problems)
            ]
        if config.apibank:
            golds = list(load_cases(config.apibank).values())
            golds = choose_cases([gold for gold in golds if gold.history], "", max(1, config.eval_cases // 20))
            judged["apibank"] = [
                (case, f"level{gold.level}", partial(_right, apibank_check.check, gold))
                for case, gold in zip(apibank_cases(golds), golds)
            ]
    except ReportError as error:
        raise ConfigError(f"bfcl or apibank: {error}") from None
    benchmarks = {}
    for name, cases in judged.items():
        asked = [
            JudgedPrompt(
                Prompt(case.id, encode_prompt(tokenizer, case.messages, case.tools, template)), part, judge
            )
            for case, part, judge in cases
        ]
        fits = [one for one in asked if len(one.prompt.ids) <= config.max_prompt_tokens]
        if not fits:
            raise ConfigError(
                f"{name}: every prompt is longer than max_prompt_tokens ({config.max_prompt_tokens})"
            )
        if not quiet:
            longer = len(asked) - len(fits)
            print(
                f"{name}: {len(fits)} cases"
                + (f", {longer} more are longer than max_prompt_tokens" if longer else "")
            )
        benchmarks[name] = fits
    return benchmarks


def _right(check: Callable, case: object, output: str) -> bool:
    return bool(check(case, output)[0])


def evaluate_benchmark(
    model: nn.Module, tokenizer, cases: Sequence[JudgedPrompt], config: Config, ranks: Ranks, name: str
) -> dict[str, float]:
    """Collective. Greedy accuracy as log entries: `{name}/accuracy`, `{name}/n`, and both for every part."""
    own = cases[ranks.rank :: ranks.world]
    groups = sample_groups(
        model, tokenizer, [case.prompt for case in own], group_size=1, temperature=0,
        max_new_tokens=config.max_response_tokens, batch_size=config.rollout_batch_size, engine=config.rollout_engine,
        heartbeat=ranks.heartbeat,
    )
    totals = Counter(case.part for case in cases)
    hits = Counter(case.part for case, group in zip(own, groups) if case.judge(group.texts[0]))
    right = dict(zip(totals, ranks.sum([float(hits[part]) for part in totals])))
    entries = {f"{name}/accuracy": sum(right.values()) / len(cases), f"{name}/n": len(cases)}
    for part, n in totals.items():
        entries |= {f"{name}/accuracy_{part}": right[part] / n, f"{name}/n_{part}": n}
    return entries


# ------------------------------------------------------------------------------------------------- evaluation


def evaluate(
    model: nn.Module, tokenizer, examples: Sequence[Tokenized], config: Config, ranks: Ranks, name: str
) -> dict[str, float]:
    """Collective. Greedy accuracy (binary reward) on held-out examples, overall and by kind, as log entries.

    Keys: `{name}/accuracy`, `{name}/n`, `{name}/accuracy_KIND` and `{name}/n_KIND` for every kind that
    occurs, and `{name}/correct_rate`: the calls alone, as benchmarks judge.
    """
    own = examples[ranks.rank :: ranks.world]
    groups = sample_groups(
        model, tokenizer, [Prompt(t.example.id, t.ids) for t in own], group_size=1, temperature=0,
        max_new_tokens=config.max_response_tokens, batch_size=config.rollout_batch_size, engine=config.rollout_engine,
        heartbeat=ranks.heartbeat,
    )
    hits, correct = Counter({kind: 0.0 for kind in KINDS}), 0
    for item, group in zip(own, groups):
        one = score(group.texts[0], item.example.answer)
        hits[example_kind(item.example)] += one.total
        correct += one.correct
    totals = Counter(example_kind(t.example) for t in examples)
    *sums, correct = ranks.sum([*(hits[kind] for kind in KINDS), correct])
    right = dict(zip(KINDS, sums))
    entries = {f"{name}/accuracy": sum(right.values()) / len(examples), f"{name}/n": len(examples)}
    entries[f"{name}/correct_rate"] = correct / len(examples)
    for kind, n in totals.items():
        entries |= {f"{name}/accuracy_{kind}": right[kind] / n, f"{name}/n_{kind}": n}
    return entries
