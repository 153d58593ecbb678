"""REFERENCE.md keeps up with the code: settings, keys of the logs, messages that it quotes, and diffs that
apply.
"""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import grpo
import rollout
import sft
from config import settings_table
from evals import in_training as benchmarks

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "REFERENCE.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under a heading, up to the next one of its level or above."""
    level = title.split()[0]
    return re.split(rf"(?m)^#{{1,{len(level)}}} ", PAGE.split(f"\n{title}\n", 1)[1], maxsplit=1)[0]


def documented(title: str) -> dict[str, str]:
    """{key: pattern} of the code spans in the first column of a section's tables; what is UPPERCASE may be
    any word.
    """
    rows = re.findall(r"(?m)^\| (`[^|]*) \|", section(title))
    keys = [key for row in rows for key in re.findall(r"`([^`]*)`", row)]
    return {key: re.sub(r"[A-Z]+", r"\\w+", re.escape(key)) for key in keys}


def test_the_table_of_settings_is_the_one_in_the_code():
    assert settings_table() in PAGE, "REFERENCE.md is out of date: run python config.py REFERENCE.md"


# -------------------------------------------------------------------------------------------- keys of the log

# Of a checkpoint's state, of the optimizer, what becomes `flops`, of a call.
NOT_LOGGED = {"best", "score", "lr", "step_flops", "name", "arguments"}
WRITERS = {  # section: the functions whose dict keys end up there
    "### grpo.py, every step": (
        grpo.train_step, grpo.finish_step, grpo.update_policy, grpo.sampler_difference, rollout.rollout_metrics,
        rollout.speed_metrics, rollout.evaluate, benchmarks.evaluate_benchmark,
    ),
    "### sft.py": (sft.sft_update, sft.sft_step, sft.finish_step, rollout.evaluate),
    "## samples.jsonl": (rollout.sample_rows,),
}


def written(function) -> set[str]:
    """Keys of the dicts that a function makes, and those that it assigns to; X for what an f-string fills
    in.
    """
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(function))):
        keys = (
            node.keys if isinstance(node, ast.Dict) else [node.key] if isinstance(node, ast.DictComp) else []
        )
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            keys = [node.slice]
        found |= {text_of(key) for key in keys if isinstance(key, (ast.Constant, ast.JoinedStr))}
    return found


def text_of(node: ast.Constant | ast.JoinedStr, filled_in: str = "X") -> str:
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else filled_in for part in parts)


@pytest.mark.parametrize("title", WRITERS)
def test_the_page_has_the_keys_that_the_code_writes_and_no_others(title):
    """Also those that only an option, a GPU or a benchmark brings about."""
    keys = documented(title) | (
        documented("### grpo.py, now and then") if title.startswith("### grpo") else {}
    )
    made = set().union(*map(written, WRITERS[title])) - NOT_LOGGED
    missing = {key for key in made if not any(re.fullmatch(pattern, key) for pattern in keys.values())}
    assert not missing, f"REFERENCE.md, {title}: document {missing}"
    patterns = [re.escape(key).replace("X", r"\w+") for key in made]
    gone = {key for key in keys if not any(re.fullmatch(pattern, key) for pattern in patterns)}
    assert not gone, f"REFERENCE.md, {title}: nothing writes {gone}"


# ------------------------------------------------------------------------------------ messages and file names


def literals() -> list[str]:
    """Every string of the code, with … for what is filled in."""
    found = []
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.JoinedStr)
                or isinstance(node, ast.Constant)
                and isinstance(node.value, str)
            ):
                found.append(text_of(node, "…"))
    return found


def test_quoted_messages_are_what_the_code_says():
    said = literals()
    for quote in re.findall("“([^”]*)”", section("## Troubleshooting")):
        pattern = ".*".join(re.escape(part.strip()) for part in quote.split("…"))
        assert any(re.search(pattern, text, re.DOTALL) for text in said), (
            f"REFERENCE.md: no message says “{quote}”"
        )


def test_the_files_of_a_run_are_named_in_the_code():
    said = literals()
    for name in documented("## A run's files"):
        assert any(name.replace("N", "…") in text for text in said), f"REFERENCE.md: nothing writes {name}"


# ------------------------------------------------------------------------------------------- adding something

DIFFS = dict(re.findall(r"(?s)### (A[^\n]*)\n[^#]*?```diff\n(.*?)```", section("## Adding something")))
CHECKS = dict(re.findall(r"(?s)### (A[^\n]*)\n.*?```python\n(.*?)```", section("## Adding something")))


def test_there_is_a_diff_for_everything():
    assert list(DIFFS) == list(CHECKS) == ["A data set", "A reward", "A model family", "A loss"]


@pytest.mark.parametrize("title", DIFFS)
def test_a_diff_applies_and_does_what_it_says(title, tmp_path):
    """The lines of Python below it pass with it and, or they would say nothing, fail without it."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)

    def check() -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", CHECKS[title]], cwd=tmp_path, capture_output=True, text=True
        )

    assert check().returncode, "the tree has this already: show something else"
    outside = os.environ | {
        "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)
    }  # or git looks for these files in a repository
    done = subprocess.run(
        ["git", "apply", "-"], input=DIFFS[title], cwd=tmp_path, env=outside, capture_output=True, text=True
    )
    assert not done.returncode, f"REFERENCE.md, {title}: the diff does not apply any more: {done.stderr}"
    done = check()
    assert not done.returncode, done.stderr
