"""The tables of BFCL's report: official aggregates of v3 and v4, kinds of replies, the paper's Table 2."""

from __future__ import annotations

from collections.abc import Iterable

from evals import report
from evals.bfcl_data import CATEGORIES, LIVE, LIVE_AST, MULTI_TURN, NON_LIVE_AST, SIMPLE
from evals.report import tally

AST = (*NON_LIVE_AST, *LIVE_AST)
REFUSALS = ("irrelevance", "live_irrelevance")  # categories in which no function fits
REPLY_KINDS = {
    "empty_list": "explicit []", "no_block": "no tool-call section", "unparsable": "unparsable",
    "called": "called",
}
PAPER_SOURCE = (
    "quoted from arXiv 2505.00024, Table 2 (data of BFCL v3). Live of 6: the row fits a count over all "
    "2,251 live cases; of 4: over the 1,351 of the four AST categories; -: neither. 82.57 is not the mean of "
    "its row, which is 83.07."
)
PAPER_COLUMNS = (
    "model", "simple", "mult.", "par.", "par.mult.", "L simple", "L mult.", "L par.", "L par.mult.",
    "Non-live", "Live", "Overall", "Live of",
)
PAPER = (
    ("GPT-4o", 79.42, 95.50, 94.00, 83.50, 84.88, 79.77, 87.50, 75.00, 88.10, 79.83, 83.97, "6"),
    ("GPT-4o-mini", 80.08, 90.50, 89.50, 87.00, 81.40, 76.73, 93.75, 79.17, 86.77, 76.50, 81.64, "6"),
    ("Qwen2.5-7B-Inst", 75.33, 94.50, 91.50, 84.50, 76.74, 74.93, 62.50, 70.83, 86.46, 67.44, 76.95, "6"),
    ("xLAM-2-70b-fc-r", 78.25, 94.50, 92.00, 89.00, 77.13, 71.13, 68.75, 58.33, 88.44, 72.95, 80.70, "6"),
    ("ToolACE-8B", 76.67, 93.50, 90.50, 89.50, 73.26, 76.73, 81.25, 70.83, 87.54, 78.59, 82.57, "6"),
    ("Hammer2.1-7B", 78.08, 95.00, 93.50, 88.00, 76.74, 77.40, 81.25, 70.83, 88.65, 75.11, 81.88, "-"),
    ("Tool-N1-7B", 77.00, 95.00, 94.50, 90.50, 82.17, 80.44, 62.50, 70.83, 89.25, 80.38, 84.82, "4"),
    ("Tool-N1-14B", 80.58, 96.00, 93.50, 92.00, 84.10, 81.10, 81.25, 66.67, 90.52, 81.42, 85.97, "4"),
)


def _equal(*names: str) -> dict[str, float]:
    return {name: 1 / len(names) for name in names}


def _scaled(factor: float, weights: dict[str, float]) -> dict[str, float]:
    return {name: factor * weight for name, weight in weights.items()}


def _by_size(table: dict[str, dict], names: Iterable[str]) -> dict[str, float]:
    """Every case weighs the same: the accuracy over all cases together."""
    sizes = {name: table[name]["n"] for name in names}
    return {name: size / max(sum(sizes.values()), 1) for name, size in sizes.items()}


def aggregates(categories: dict[str, dict], sizes: dict[str, int]) -> list[dict]:
    """The columns of BFCL v3 and v4, by their names in the official tables, and those of the paper (arXiv
    2505.00024, Table 2) from every category's tally.

    Each is a weighted sum of categories: {"group", "name", "accuracy", "low", "high" (percent; None = n/a),
    "n"}. sizes: cases per category, because official Overall columns count what did not run as wrong.
    """
    filled = dict(categories)
    for name in (*CATEGORIES, *MULTI_TURN):
        filled.setdefault(name, {"accuracy": 0.0, "low": 0.0, "high": 0.0, "n": sizes[name]})
    # The three languages of "simple" weigh the same, whatever their numbers of cases.
    simple, others = _equal(*SIMPLE), _equal("multiple", "parallel", "parallel_multiple")
    non_live = _scaled(0.25, simple) | _scaled(0.75, others)
    v3_non_live = _scaled(0.8, non_live) | {"irrelevance": 0.2}
    live_ast, live, refusals = _by_size(filled, LIVE_AST), _by_size(filled, LIVE), _equal(*REFUSALS)
    # Multi-turn of v3 (a third) and agentic (40 % of v4) are not run here and count 0.
    v3_overall = _scaled(1 / 3, v3_non_live) | _scaled(1 / 3, live)
    turns = _equal(*MULTI_TURN)
    v4_overall = _scaled(0.1, non_live) | _scaled(0.1, live_ast) | _scaled(0.1, refusals)
    v4_overall |= _scaled(0.3, turns)
    tenths = {"non-live": non_live, "live": live_ast, "irrelevance": refusals, "multi-turn": turns}
    zero = [name for name, weights in tenths.items() if not categories.keys() & weights.keys()]
    rows = [
        ("v3 official", "Non-Live AST Acc", non_live, categories),
        ("v3 official", "Non-Live Overall Acc", v3_non_live, filled),
        ("v3 official", "Live Acc", live, filled),
        ("v3 official", "Overall Acc (multi-turn = 0)", v3_overall, filled),
        ("v4 official", f"Overall Acc ({', '.join([*zero, 'agentic'])} = 0)", v4_overall, filled),
        ("v4 official", "Non-Live Overall Acc", non_live, filled),
        ("v4 official", "Non-Live AST Acc", non_live, categories),
        ("v4 official", "Non-Live Simple AST", simple, categories),
        ("v4 official", "Non-Live Multiple AST", _equal("multiple"), categories),
        ("v4 official", "Non-Live Parallel AST", _equal("parallel"), categories),
        ("v4 official", "Non-Live Parallel Multiple AST", _equal("parallel_multiple"), categories),
        ("v4 official", "Live Acc", live_ast, filled),
        ("v4 official", "Live AST Summary", live_ast, categories),
        ("v4 official", "Live Simple AST", _equal("live_simple"), categories),
        ("v4 official", "Live Multiple AST", _equal("live_multiple"), categories),
        ("v4 official", "Live Parallel AST", _equal("live_parallel"), categories),
        ("v4 official", "Live Parallel Multiple AST", _equal("live_parallel_multiple"), categories),
        ("v4 official", "Multi Turn Acc", turns, filled),
        ("v4 official", "Base", _equal("multi_turn_base"), categories),
        ("v4 official", "Miss Func", _equal("multi_turn_miss_func"), categories),
        ("v4 official", "Miss Param", _equal("multi_turn_miss_param"), categories),
        ("v4 official", "Long Context", _equal("multi_turn_long_context"), categories),
        ("v4 official", "Relevance Detection", _equal("live_relevance"), categories),
        ("v4 official", "Irrelevance Detection", refusals, categories),
        ("paper", "Non-live", non_live, categories),
        ("paper", "Live (4 AST categories)", live_ast, categories),
        ("paper", "Live (6 categories)", live, categories),
        ("paper", "Overall (Live of 4)", _scaled(0.5, non_live) | _scaled(0.5, live_ast), categories),
        ("paper", "Overall (Live of 6)", _scaled(0.5, non_live) | _scaled(0.5, live), categories),
    ]
    listed = []
    for group, name, weights, table in rows:
        n = sum(categories[part]["n"] for part in weights if part in categories)
        listed.append({"group": group, "name": name, **_weighted(weights, table if n else {}), "n": n})
    return listed


def _weighted(weights: dict[str, float], table: dict[str, dict]) -> dict:
    """Accuracy, low and high of a weighted sum of categories; None where one of them did not run."""
    if any(name not in table for name in weights):
        return dict.fromkeys(("accuracy", "low", "high"))
    return report.combined((weight, table[name]) for name, weight in weights.items())


def reply_rows(kinds: dict[str, list[tuple[str, str]]]) -> list[dict]:
    """What came where no call is right, the over-calling rate, and how often [] came where a call is right.

    kinds: category -> (case, reply_kind) of every row. Rows as of aggregates(), with "correct" for the count.
    """
    wanted, rows = [], []
    for part in filter(kinds.get, REFUSALS):
        wanted += [(f"{part}: {label}", [part], kind) for kind, label in REPLY_KINDS.items()]
    wanted.append(("over-calling: a call, none fits", REFUSALS, "called"))
    wanted.append(("under-calling: [], a call fits", AST, "empty_list"))
    for name, parts, kind in wanted:
        pairs = [(case, found == kind) for part in parts for case, found in kinds.get(part, ())]
        rows.append({"group": "replies", "name": name, **tally(pairs)})
    return rows


def paper_rows(categories: dict[str, dict], listed: list[dict]) -> list[tuple]:
    """Our rows of the paper's table, with Live over six and over four categories. listed: aggregates()."""
    figures = [_weighted(_equal(*SIMPLE), categories)["accuracy"]]
    for name in (*NON_LIVE_AST[3:], *LIVE_AST):
        figures.append(categories[name]["accuracy"] if name in categories else None)
    means = {row["name"]: row["accuracy"] for row in listed if row["group"] == "paper"}
    rows = []
    for live, n in (("Live (6 categories)", "6"), ("Live (4 AST categories)", "4")):
        averages = (means["Non-live"], means[live], means[f"Overall (Live of {n})"])
        rows.append(("these predictions", *figures, *averages, n))
    return rows
