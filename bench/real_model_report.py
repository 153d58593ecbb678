"""The figures of real_model.py, from the folders of its stages: tables, comparisons, picture, samples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean

from timing import machine

from config import UserError
from corpus.layouts import load_examples
from corpus.sources import read_jsonl, write_atomic
from evals.bfcl_data import category_of
from evals.bfcl_table import AST, REFUSALS
from evals.report import Z, compare, mcnemar, shorten, tally
from prompts import render_calls

CONDITIONS = {"start": "start model", "sft_no_reason": "SFT, bare calls", "sft_reason": "SFT with reasoning",
              "rl": "SFT with reasoning, then RL"}
PAIRS = (("sft_reason", "rl"), ("sft_no_reason", "sft_reason"))  # compared case by case
TESTS = {"held_out": "held-out", "bfcl": "BFCL", "apibank": "API-Bank"}
# What is compared -> the test, and the key of its verdicts.
FIGURES = {
    "held-out reward": ("held_out", "right"), "held-out calls": ("held_out", "correct"),
    "BFCL, all asked": ("bfcl", "valid"), "API-Bank level 1": ("apibank", "correct"),
}
RL_KEYS = ("reward", "format_rate", "frac_reward_zero_std", "entropy", "kl", "completions/mean_length")
WINDOW = 10  # steps


def samples_of(folder: Path) -> dict[str, list[bool]]:
    """Whether each sample of a prompt is right, by its id. Raises UserError where there are none."""
    groups: dict[str, list[bool]] = {}
    for row in read_jsonl(folder / "verdicts.jsonl"):
        groups.setdefault(row["id"], []).append(row["right"])
    if not groups:
        raise UserError(f"{folder} holds no verdicts; delete the folder to do it again")
    return groups


def pass_figures(folder: Path) -> dict[str, float]:
    """What the samples of pass8 or pass8_rl show: the share of its prompts with a right one, with both."""
    groups = samples_of(folder).values()
    mixed = [any(group) and not all(group) for group in groups]
    solved, reward = fmean(map(any, groups)), fmean(map(fmean, groups))
    return {"prompts": len(groups), "pass@8": solved, "mixed": fmean(mixed), "reward": reward}


def paired_means(a: dict[str, list[bool]], b: dict[str, list[bool]]) -> dict[str, float]:
    """B's samples against A's of the same prompts: the difference of the mean reward in percent, with its
    normal 95 % interval over the prompts; fixed and broken: prompts with more and with fewer right samples.
    """
    differences = [fmean(b[name]) - fmean(a[name]) for name in a]
    n, mean = len(differences), fmean(differences)
    half = Z * sqrt(sum((one - mean) ** 2 for one in differences) / max(1, n - 1) / n)
    fixed, broken = sum(one > 0 for one in differences), sum(one < 0 for one in differences)
    found = {"n": n, "difference": 100 * mean, "low": 100 * (mean - half), "high": 100 * (mean + half)}
    return found | {"fixed": fixed, "broken": broken, "p": mcnemar(broken, fixed)}


def paired(fates: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """B against A on the same cases: fixed, broken, McNemar's p, and B - A in percent with its 95 % interval.

    The interval has half a case added to each of the four counts (Agresti and Min 2005, Wald+2).
    """
    n, fixed, broken = len(fates), fates.count((False, True)), fates.count((True, False))
    middle = (fixed - broken) / (n + 2)
    half = Z * sqrt(fixed + broken + 1 - (fixed - broken) ** 2 / (n + 2)) / (n + 2)
    found = {"n": n, "difference": 100 * (fixed - broken) / n}
    found |= {"low": 100 * (middle - half), "high": 100 * (middle + half)}
    return found | {"fixed": fixed, "broken": broken, "p": mcnemar(broken, fixed)}


def condition_figures(folder: Path, verdicts: dict[str, list[dict]]) -> dict:
    """A condition's row in the table, the reasons of its wrong held-out replies, and its skipped prompts."""
    asked = verdicts["held_out"]
    found: dict = {}
    for label, (name, key) in FIGURES.items():
        found[label] = tally((row["id"], row[key]) for row in verdicts[name])
    for name, parts in (("AST", AST), ("irrelevance", REFUSALS)):
        own = [row for row in verdicts["bfcl"] if category_of(row["id"]) in parts]
        found[name] = tally((row["id"], row["valid"]) for row in own)
    listed = json.loads((folder / "bfcl/scores.json").read_text(encoding="utf-8"))["replies"]
    found["over-calling"] = next(row for row in listed if row["name"].startswith("over-calling"))
    found["format"] = 100 * fmean(row["format_ok"] for row in asked)
    found["tokens"] = fmean(row["output_tokens"] for row in asked)
    found["reasons"] = Counter(row["reason"] for row in asked if not row["right"])
    rows = {name: read_jsonl(folder / name / "predictions.jsonl") for name in TESTS}
    return found | {"skipped": {name: sum("skipped" in row for row in part) for name, part in rows.items()}}


def rl_logs(out: Path) -> dict[str, list[dict]]:
    """The steps of the RL runs so far, by folder."""
    paths = {name: out / name / "log.jsonl" for name in ("rl_format", "rl")}
    logs = {name: read_jsonl(path) for name, path in paths.items() if path.exists()}
    steps = {name: [row for row in log if "reward" in row] for name, log in logs.items()}
    return {name: log for name, log in steps.items() if log}


def results(out: Path, done: Sequence[str], verdicts: dict[str, dict[str, list[dict]]]) -> dict:
    """All figures of what is finished. done: the finished stages."""
    rows = {name: condition_figures(out / f"eval_{name}", one) for name, one in verdicts.items()}
    found = {"conditions": rows, "comparisons": {}, "rl": {}}
    for a, b in (pair for pair in PAIRS if verdicts.keys() >= set(pair)):
        for label, (name, key) in FIGURES.items():
            fates = list(compare(verdicts[a][name], verdicts[b][name], key).values())
            found["comparisons"][f"{label}: {CONDITIONS[b]} − {CONDITIONS[a]}"] = paired(fates)
    if "data" in done:
        found["data"] = json.loads((out / "data/sizes.json").read_text(encoding="utf-8"))
    for name in ("pass8", "pass8_rl"):
        if name in done:
            found[name] = pass_figures(out / name)
    for before, after in (("pass8", "pass8_rl"), ("sampled_sft_reason", "sampled_rl")):
        if {before, after} <= set(done):
            sides = samples_of(out / before), samples_of(out / after)
            label = "training" if before == "pass8" else "held-out"
            compared = f"mean reward of {label} samples: {CONDITIONS['rl']} − {CONDITIONS['sft_reason']}"
            found["comparisons"][compared] = paired_means(*sides)
            found[f"{label} samples"] = [fmean(map(fmean, side.values())) for side in sides]
    for part, log in rl_logs(out).items():
        for key in RL_KEYS:
            if values := [row[key] for row in log if row.get(key) is not None]:
                found["rl"][f"{part}: {key}"] = [fmean(values[:WINDOW]), fmean(values[-WINDOW:])]
    return found


# ----------------------------------------------------------------------------------------------------- shown


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table, with an empty line behind it."""
    lines = (head, ["---"] * len(head), *rows)
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines) + "\n"


def shown(part: dict) -> str:
    """A tally's percentage with its interval and n."""
    return f"{part['accuracy']:.1f} ({part['low']:.1f} – {part['high']:.1f}), n = {part['n']}"


def markdown(found: dict) -> str:
    """RESULTS.md."""
    conditions = found["conditions"]
    names = list(map(CONDITIONS.get, conditions))
    tallies = {**{label: label for label in FIGURES}, "AST": "BFCL AST", "irrelevance": "BFCL irrelevance"}
    tallies["over-calling"] = "over-calling"
    plain = {"format": "format", "tokens": "tokens per reply"}
    rows = []
    for name, one in zip(names, conditions.values()):
        rows.append([name, *(shown(one[key]) for key in tallies), *(f"{one[key]:.1f}" for key in plain)])
    text = "Percent, with 95 % intervals. The reward asks for a thought, which bare calls lack: compare "
    text += "these by held-out calls. Over-calling: a call where none fits.\n\n"
    text += table(["condition", *tallies.values(), *plain.values()], rows)
    rows = []
    for name, one in found["comparisons"].items():
        points = f"{one['difference']:+.1f} ({one['low']:+.1f} – {one['high']:+.1f})"
        rows.append([name, one["n"], points, one["fixed"], one["broken"], f"{one['p']:.3g}"])
    text += table(["difference", "n", "points", "fixed", "broken", "McNemar p"], rows)
    reasons = sorted(set().union(*(one["reasons"] for one in conditions.values())))
    rows = [[reason, *(one["reasons"].get(reason, 0) for one in conditions.values())] for reason in reasons]
    text += table(["wrong held-out replies", *names], rows)
    rows = [[name, *(f"{mean:.3f}" for mean in means)] for name, means in found["rl"].items()]
    text += table(["RL, means", f"first {WINDOW} steps", f"last {WINDOW} steps"], rows)
    rows = [[name, *one["skipped"].values()] for name, one in zip(names, conditions.values())]
    text += table(["prompts too long or refused, which count as empty replies", *TESTS.values()], rows)
    kinds = "pass8,pass8_rl,training samples,held-out samples,data,seconds,code,settings,machine"
    for name in kinds.split(","):
        text += f"{name}: {found.get(name, 'not there yet')}\n\n"
    return text


def samples(out: Path, verdicts: dict[str, dict[str, list[dict]]]) -> str:
    """samples.md: three held-out prompts on whose replies the conditions' verdicts differ, two where not."""
    replies = {name: {row["id"]: row for row in one["held_out"]} for name, one in verdicts.items()}
    left, text = {True: 3, False: 2}, ""
    for example in load_examples(out / "data/held_out.jsonl")[0] if replies else ():
        rows = {name: one[example.id] for name, one in replies.items()}
        differ = len({row["right"] for row in rows.values()}) > 1
        if left[differ]:
            left[differ] -= 1
            text += f"## {example.id}\n\nTools: {', '.join(tool['name'] for tool in example.tools)}\n\n"
            text += block(example.messages[-1]["content"] or "")
            text += f"Right:\n\n{block(render_calls(example.answer))}"
            for name, row in rows.items():
                text += f"{CONDITIONS[name]}: {row['reason']}\n\n{block(row['output'])}"
    return text


def block(text: str) -> str:
    """A text as a block of Markdown, its middle cut out where it is long."""
    return "".join(f"    {line}\n" for line in shorten(text, 2000).splitlines() or [""]) + "\n"


def draw(found: dict, out: Path) -> None:
    """real_model.png: the reward of RL by step; the tests by condition."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    before = 0
    for name, log in rl_logs(out).items():
        steps, values = [before + row["step"] for row in log], [row["reward"] for row in log]
        means = [fmean(values[max(0, end - WINDOW) : end]) for end in range(1, len(values) + 1)]
        (line,) = left.plot(steps, means, label=f"{name}, mean of {WINDOW} steps")
        left.plot(steps, values, ".", color=line.get_color(), alpha=0.4)
        before = steps[-1]
    left.set(title="reward of RL's samples", xlabel="step", ylim=(0, 1))
    for place, (name, one) in enumerate(found["conditions"].items()):
        parts = [one[label] for label in FIGURES]
        heights = [part["accuracy"] for part in parts]
        below, above = ([abs(part[key] - part["accuracy"]) for part in parts] for key in ("low", "high"))
        places = [test + 0.2 * place for test in range(len(parts))]
        right.bar(places, heights, 0.18, yerr=[below, above], capsize=3, label=CONDITIONS[name])
    right.set_xticks([test + 0.3 for test in range(len(FIGURES))], FIGURES)
    right.set(title="greedy replies that are right, 95 % intervals", ylabel="percent")
    right.margins(y=0.4)  # room for the legend
    for axis in (left, right):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    figure.savefig(out / "real_model.png", dpi=110)
    pyplot.close(figure)


def report(out: Path, done: Sequence[str], about: dict, picture: bool) -> str:
    """Writes RESULTS.md, results.json, samples.md and perhaps the picture; returns the first.

    done: the finished stages. about: what else belongs into the results.
    """
    verdicts = {}
    for name in (name for name in CONDITIONS if f"eval_{name}" in done):
        folder = out / f"eval_{name}"
        verdicts[name] = {test: read_jsonl(folder / test / "verdicts.jsonl") for test in TESTS}
    found = results(out, done, verdicts) | about | {"machine": machine()}
    write_atomic(out / "results.json", json.dumps(found, indent=1) + "\n")
    write_atomic(out / "RESULTS.md", text := markdown(found))
    write_atomic(out / "samples.md", samples(out, verdicts))
    if picture:
        draw(found, out)
    return text
