"""Evaluation during training: held-out splits, and fixed subsets of BFCL and API-Bank, answered greedily."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from torch import nn

from config import Config, ConfigError, UserError, printable
from corpus.examples import Example, Tokenized, example_kind
from distributed.ranks import Ranks
from evals import apibank_data, bfcl_data, bfcl_multi_turn
from evals.apibank_check import apibank_verdict
from evals.bfcl_check import bfcl_verdict
from evals.bfcl_multi_turn import Dialogue, Player, Scenario, play
from evals.predict import progress
from kernel.decode import Prompt
from prompts import PromptError, encode_prompt
from reward import score
from rollout import Decoding, sample_groups

# BFCL's parts: one figure per category would be noise on a subset.
PARTS = dict.fromkeys(bfcl_data.NON_LIVE_AST, "non_live") | dict.fromkeys(bfcl_data.LIVE_AST, "live")
PARTS |= {"irrelevance": "irrelevance", "live_irrelevance": "irrelevance", "live_relevance": "relevance"}
MULTI_TURN_TOKENS = 32768  # of a prompt: max_prompt_tokens is about training examples, which are far shorter


@dataclass(frozen=True)
class Verdict:
    """right: full credit, which on held-out examples takes the thought too. calls_right: the calls alone."""

    right: bool
    calls_right: bool


@dataclass(frozen=True)
class JudgedPrompt:
    """One case, ready to be asked. part: what it counts for. judge: the verdict on a reply's text."""

    prompt: Prompt
    part: str
    judge: Callable[[str], Verdict]


@dataclass(frozen=True)
class JudgedScenario:
    """One dialogue of BFCL's multi-turn part, asked with this system template."""

    scenario: Scenario
    template: str

    @property
    def part(self) -> str:
        """What it counts for: base, miss_func, miss_param or long_context."""
        return self.scenario.category.removeprefix("multi_turn_")


def held_out_prompts(examples: Sequence[Tokenized]) -> list[JudgedPrompt]:
    """Held-out examples, each counted for its kind and judged by the binary reward."""
    prompts = []
    for one in examples:
        judge = partial(_by_reward, one.example)
        prompts.append(JudgedPrompt(Prompt(one.example.id, one.ids), example_kind(one.example), judge))
    return prompts


def _by_reward(example: Example, reply: str) -> Verdict:
    reward = score(reply, example.answer)
    return Verdict(reward.total == 1, reward.correct)


def _by_benchmark(verdict: Callable, case: object, reply: str) -> Verdict:
    right, _ = verdict(case, reply)
    return Verdict(right, right)


def check_benchmarks(config: Config) -> None:
    """Raises ConfigError where a benchmark's folder or package is not there.

    A folder's name with one / may be a hub id.
    """
    for key, folder in (("bfcl", config.bfcl), ("apibank", config.apibank)):
        if folder and folder.count("/") != 1 and not Path(folder).exists():
            raise ConfigError(f"{key}: the folder {folder!r} does not exist")
    if config.bfcl_multi_turn:
        try:
            bfcl_multi_turn.package()
        except UserError as error:
            raise ConfigError(f"bfcl_multi_turn: {error}") from None


def load_benchmarks(
    config: Config, tokenizer, template: str, quiet: bool = False
) -> dict[str, list[JudgedPrompt] | list[JudgedScenario]]:
    """About `eval_cases` cases of each benchmark that the config names, equally many of every category, and
    `bfcl_multi_turn` scenarios.

    Prompts that are too long or refused are left out. Raises ConfigError for a folder without data, or where
    none is left, and without the package that multi-turn needs.
    """
    judged = {}
    try:
        if config.bfcl:
            limit = max(1, config.eval_cases // len(bfcl_data.CATEGORIES))
            problems = bfcl_data.choose_problems(config.bfcl, ["single_turn"], limit)
            judged["bfcl"] = bfcl_verdict, problems, bfcl_data.prompt_cases(problems)
        if config.apibank:
            limit = max(1, config.eval_cases // len(apibank_data.LEVELS))
            golds = [gold for gold in apibank_data.load_cases(config.apibank).values() if gold.history]
            golds = apibank_data.choose_cases(golds, "", limit)
            judged["apibank"] = apibank_verdict, golds, apibank_data.prompt_cases(golds)
    except UserError as error:
        raise ConfigError(f"bfcl or apibank: {error}") from None
    benchmarks, limit = {}, config.max_prompt_tokens
    for name, (verdict, golds, cases) in judged.items():
        fits, refused = [], []
        for gold, case in zip(golds, cases):
            try:
                ids = encode_prompt(tokenizer, case.messages, case.tools, template)
            except PromptError as error:
                refused.append(f"{case.id}: {error}")
                continue
            if len(ids) <= limit:
                part = PARTS.get(case.category, case.category.replace("-", ""))  # API-Bank: level1 to level3
                judge = partial(_by_benchmark, verdict, gold)
                fits.append(JudgedPrompt(Prompt(case.id, ids), part, judge))
        why = printable(f"; {len(refused)} are refused, such as {refused[0]}") if refused else ""
        if not fits:
            raise ConfigError(f"{name}: every prompt is longer than max_prompt_tokens ({limit}){why}")
        if not quiet:
            long = len(cases) - len(fits) - len(refused)
            print(f"{name}: {len(fits)} cases; {long} are longer than max_prompt_tokens ({limit}){why}")
        benchmarks[name] = fits
    if config.bfcl_multi_turn:
        each = -(-config.bfcl_multi_turn // len(bfcl_data.MULTI_TURN))
        parts = [bfcl_multi_turn.load_scenarios([name], each) for name in bfcl_data.MULTI_TURN]
        scenarios = list(chain(*zip(*parts)))[: config.bfcl_multi_turn]  # of every part in turn; 800 in all
        if not quiet:
            print(f"bfcl_multi_turn: {len(scenarios)} scenarios, played at every evaluation")
        benchmarks["bfcl_multi_turn"] = [JudgedScenario(scenario, template) for scenario in scenarios]
    return benchmarks


def evaluate(
    model: nn.Module, tokenizer, sets: dict[str, list[JudgedPrompt] | list[JudgedScenario]], config: Config,
    ranks: Ranks,
) -> dict[str, float]:
    """Collective. Greedy accuracy on every set of `sets`, by name, as log entries.

    Keys: `{name}/accuracy`, `{name}/n`, `{name}/correct_rate` (the calls alone), and `{name}/accuracy_PART`
    and `{name}/n_PART` for every part that occurs: a kind of held-out examples, or a part of a benchmark.
    """
    entries: dict[str, float] = {}
    for name, cases in sets.items():
        own = cases[ranks.rank :: ranks.world]
        ask = _play if name == "bfcl_multi_turn" else _ask
        verdicts = ask(model, tokenizer, own, config, ranks)
        hits = Counter(case.part for case, verdict in zip(own, verdicts) if verdict.right)
        calls_right = sum(verdict.calls_right for verdict in verdicts)
        totals = Counter(case.part for case in cases)
        *right, calls_right = ranks.sum([*(float(hits[part]) for part in totals), float(calls_right)])
        entries[f"{name}/accuracy"] = sum(right) / len(cases)
        entries[f"{name}/n"] = len(cases)
        entries[f"{name}/correct_rate"] = calls_right / len(cases)
        for (part, n), hit in zip(totals.items(), right):
            entries[f"{name}/accuracy_{part}"] = hit / n
            entries[f"{name}/n_{part}"] = n
    return entries


def _ask(
    model: nn.Module, tokenizer, cases: Sequence[JudgedPrompt], config: Config, ranks: Ranks
) -> list[Verdict]:
    prompts = [case.prompt for case in cases]
    groups = sample_groups(model, tokenizer, prompts, Decoding.greedy(config), heartbeat=ranks.heartbeat)
    return [case.judge(group.texts[0]) for case, group in zip(cases, groups)]


def _play(
    model: nn.Module, tokenizer, cases: Sequence[JudgedScenario], config: Config, ranks: Ranks
) -> list[Verdict]:
    template = cases[0].template if cases else ""
    limit, beat = MULTI_TURN_TOKENS, ranks.heartbeat
    player = Player(model, tokenizer, template, Decoding.greedy(config), limit, heartbeat=beat)
    dialogues = [Dialogue(case.scenario) for case in cases]
    played = play(dialogues, player.answer, config.rollout_batch_size)
    for _ in progress(played, len(dialogues), "bfcl_multi_turn", "dialogues") if ranks.main else played:
        pass
    faults = [bfcl_multi_turn.find_fault(one.scenario, one.outputs, one.skipped) for one in dialogues]
    return [Verdict(fault is None, fault is None) for fault in faults]
