"""The pages keep up with the code: README.md and docs/*.md.

The bash blocks of the pages run in a copy of the tree, in which `python`, `torchrun` and other programs only
write down their words. So bash itself reads the blocks. Every script that they call must exist and accept its
options. The first commands of a newcomer then really run, at toy size and in this process: importing torch
once is enough.
"""

import argparse
import ast
import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, own_process_group

from config import Config, load_config, settings_table
from corpus.sources import read_jsonl

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
SHARED = ROOT.parent / "shared"
MODULES = [path for path in ROOT.rglob("*.py") if not {"tests", "bench", ".venv", "runs"} & set(path.parts)]

# The demo with a model that learns nothing, of which every line runs.
SMALL = """base: full.yaml
warmup_steps: 4
tiny_hidden: 32
sft_batch: 2
steps: 2
prompts_per_step: 4
minibatch_prompts: 2
group_size: 2
synthetic_train: 30
eval_cases: 4
save_every: 1
"""


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of the fenced blocks of a language."""
    found = [(page, re.findall(rf"(?ms)^```{language}\n(.*?)^```$", text)) for page, text in PAGES.items()]
    return [(page, block) for page, own in found for block in own]


def spans() -> list[tuple[str, str]]:
    """(page, text) of what stands in backticks, outside of blocks."""
    found = []
    for page, text in PAGES.items():
        prose = re.sub(r"(?ms)^```.*?^```$", "", text)
        found += [(page, " ".join(span.split())) for span in re.findall(r"`([^`]+)`", prose)]
    return found


# ------------------------------------------------------------------------------------- names, links, settings


def test_the_page_of_settings_is_what_config_prints():
    assert settings_table() in PAGES["docs/settings.md"], "run: python config.py > docs/settings.md"


def test_links_lead_somewhere():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", text):
            assert target.startswith("http") or ((ROOT / page).parent / target).exists(), f"{page}: {target}"
        for target, anchor in re.findall(r"\]\((\w*\.?m?d?)#([^)]+)\)", text):
            linked = ((ROOT / page).parent / target).read_text("utf-8") if target else text
            titles = re.findall(r"(?m)^#+ (.*)$", linked)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, f"{page}: {target}#{anchor}"


def test_files_and_names_in_backticks_exist():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in MODULES}
    short = {name.rpartition(".")[2]: name for name in names}
    for page, span in spans():
        if re.fullmatch(r"[\w./-]+\.(py|sh)|(configs|docs|tests|bench)/[\w./-]*", span):
            assert (ROOT / span).exists(), f"{page}: there is no {span}"
        module, _, name = span.partition(".")
        if module in short and re.fullmatch(r"[a-z_]\w*|[A-Z_]+", name) and name not in ("py", "jsonl"):
            assert hasattr(importlib.import_module(short[module]), name), f"{page}: {span}"


def test_settings_and_options_in_backticks_exist():
    code = "\n".join(path.read_text("utf-8") for path in (*MODULES, ROOT / "run.sh"))
    known = {*Config.__dataclass_fields__, *re.findall(r"--([\w-]+)", code)}
    known |= {"gpus", "max-restarts", "rdzv_endpoint"}  # of ops.plan, by its dataclass; of torchrun
    for page, span in spans():
        for option in re.findall(r"(?<!\S)--([\w-]+)", span):
            assert option in known, f"{page}: there is no --{option}"


def test_quoted_messages_are_what_the_code_says():
    said = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [one.value if isinstance(one, ast.Constant) else "…" for one in parts]
            said.append("".join(text for text in texts if isinstance(text, str)))
    for quote in re.findall("“([^”]*)”", PAGES["docs/troubleshooting.md"]):
        pattern = ".*".join(re.escape(part.strip()) for part in quote.split("…"))
        assert quote == "quotes" or any(re.search(pattern, text, re.DOTALL) for text in said), quote


# ------------------------------------------------------------------------------------------------ the commands

RECORDER = """#!/usr/bin/env bash
if [ "$1" = -c ]; then echo 1e9; exit; fi
printf '%s\\0' "{name}" "$@" >> "$RECORD"; printf '\\n' >> "$RECORD"
"""
PROGRAMS = ("python", "torchrun", "pip", "vllm", "srun", "scontrol", "sbatch")
OTHERS = ("pip", "vllm", "scontrol", "sbatch", "bfcl_eval")  # whose options are not ours to check


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A copy of the tree beside ../shared, with the small demo, raw data and programs that write down words."""
    copy = tmp_path_factory.mktemp("site") / "copy"
    ignored = shutil.ignore_patterns("runs", ".venv", ".git", "__pycache__", ".*_cache", "tests")
    shutil.copytree(ROOT, copy, ignore=ignored)
    if SHARED.exists():
        (copy.parent / "shared").symlink_to(SHARED)
    (copy / "configs/tiny.yaml").rename(copy / "configs/full.yaml")
    (copy / "configs/tiny.yaml").write_text(SMALL)
    (copy / ".venv/bin").mkdir(parents=True)
    (copy / ".venv/bin/activate").touch()
    shutil.copy(ROOT / "requirements.txt", copy / ".venv/installed.txt")
    for name in PROGRAMS:
        (copy / ".venv/bin" / name).write_text(RECORDER.format(name=name))
        (copy / ".venv/bin" / name).chmod(0o755)
    tool = {"name": "add", "description": "adds", "parameters": {"a": {"type": "int"}}}
    calls = [[{"name": "add", "arguments": {"a": i}}] for i in range(20)]
    rows = [{"id": i, "query": f"add {i}", "tools": [tool], "answers": calls[i]} for i in range(20)]
    (copy / "xlam_60k.json").write_text(json.dumps(rows))
    turns = [{"from": "user", "value": "add 1"}, {"from": "assistant", "value": "[add(a=1)]"}]
    (copy / "toolace.json").write_text(json.dumps([{"system": json.dumps([tool]), "conversations": turns}]))
    return copy


def words_of(site: Path, script: str) -> list[list[str]]:
    """What a piece of bash runs: the words of every call of PROGRAMS, srun and torchrun's own words left out."""
    record = site / "record"
    record.write_text("")
    path = f"{site}/.venv/bin:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "RECORD": str(record), "PYTHON": sys.executable}
    done = subprocess.run(["bash", "-c", script], cwd=site, env=environment, capture_output=True, text=True)
    errors = re.search(r"command not found|syntax error|run\.sh: (unknown|no such config).*", done.stderr)
    assert not errors, f"{script}: {done.stderr}"
    calls = []
    for line in record.read_text().splitlines():
        words = line.split("\0")[:-1]
        if words[0] == "srun":
            words = words[next(i for i, word in enumerate(words) if word == "torchrun"):]
        if words[1:3] == ["-m", "torch.distributed.run"]:
            words = ["torchrun", *words[3:]]
        if words[0] == "torchrun":
            from torch.distributed.run import get_args_parser
            options = get_args_parser().parse_args(words[1:])
            module = ["-m"] if options.module else []
            words = ["python", *module, options.training_script, *options.training_script_args]
        calls.append(words)
    return calls


def run(site: Path, words: list[str]) -> int:
    """`python SCRIPT …` or `python -m MODULE …` in this process and the copy -> the exit code."""
    module, arguments = (words[1], words[2:]) if words[0] == "-m" else ("", words[1:])
    with own_process_group(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(site)
        patch.setattr(sys, "argv", [words[0], *arguments])
        patch.setattr(sys, "path", [*sys.path, str(ROOT / "bench"), str(ROOT / "tests/drill")])
        try:
            if module:
                runpy.run_module(module, run_name="__main__")
            else:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


class Accepted(BaseException):
    """The options of a command are right; it is not run any further."""


def accepts(site: Path, words: list[str]) -> bool:
    """Whether the script is there and takes these options; runs nothing but the reading of options."""

    def stop(read):
        def then_stop(*args, **kwargs):
            read(*args, **kwargs)
            raise Accepted
        return then_stop

    words = ["configs/tiny.yaml" if word.startswith("runs/") and word.endswith(".yaml") else word for word in words]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("config.load_config", stop(load_config))
        patch.setattr("corpus.layouts.load_examples", stop(lambda path: None))  # data.py inspect has no options
        patch.setattr(argparse.ArgumentParser, "parse_args", stop(argparse.ArgumentParser.parse_args))
        try:
            return run(site, words) == 0
        except Accepted:
            return True


INLINE = [(page, span) for page, span in spans() if re.match(r"(python|torchrun|bash run\.sh) [^…]*$", span)]
SCRIPTS = [*blocks("bash"), *INLINE]


@pytest.mark.parametrize("page, script", SCRIPTS, ids=[f"{page}: {script[:40]}" for page, script in SCRIPTS])
def test_commands_exist_and_have_these_options(page, script, site):
    for program, *words in words_of(site, f"DATA=../shared/data\n{script}"):
        if program in OTHERS or words[:2] in (["-m", "pip"], ["-m", "verl.trainer.main_ppo"]):
            continue
        if words[:2] == ["-m", "pytest"]:
            assert all((ROOT / word).exists() for word in words[2:]), words
        elif words[:2] == ["-m", "evals.bfcl_handler"]:  # needs the official package
            assert (ROOT / "evals/bfcl_handler.py").exists()
        else:
            assert accepts(site, words), f"{page}: {shlex.join(words)}"


# ------------------------------------------------------------------------------------- a newcomer's first hour


@pytest.fixture(scope="module")
def demo(site) -> Path:
    """`bash run.sh` in the copy, without its bash."""
    for _, *words in words_of(site, "bash run.sh"):
        assert run(site, words) == 0, words
    return site / "runs/demo"


FIRST = (
    "python data.py prepare --xlam xlam_60k.json --toolace toolace.json --out runs/prepared",
    "python data.py inspect runs/prepared/train.jsonl 1",
    "python -m ops.plan --config configs/qwen2.5-7b.yaml --model tiny --gpus 8",
    "python -m ops.doctor --config configs/tiny.yaml",
    "python grpo.py --config runs/demo/config.yaml --resume true",
    "python -m ops.plot runs/demo",
    "python -m ops.samples_page runs/demo",
    "python -m ops.export runs/demo/step_2 runs/exported",
    "bash run.sh eval runs/demo/model --limit 1 --max_new_tokens 2",
)


@pytest.mark.parametrize("command", FIRST)
def test_the_first_commands_of_a_newcomer_work(command, site, demo):
    if "eval" in command and not SHARED.exists():
        pytest.skip("needs ../shared, which is not here")
    for _, *words in words_of(site, command):
        assert run(site, words) == 0, words


def documented(title: str) -> dict[str, str]:
    """{key: pattern} of the first columns under a heading of docs/scale.md; UPPERCASE and the N of a step
    may be any word.
    """
    level = title.split()[0]
    section = re.split(rf"(?m)^#{{1,{len(level)}}} ", PAGES["docs/scale.md"].split(f"\n{title}\n")[1])[0]
    keys = [key for cell in re.findall(r"(?m)^\| (`[^|]*) \|", section) for key in re.findall(r"`([^`]*)`", cell)]
    return {key: re.sub("[A-Z]+", r"\\w+", re.escape(key)) for key in keys}


@pytest.mark.parametrize("title, folder, complete", [
    ("### grpo.py, every step", "", True), ("### sft.py", "sft", True), ("## samples.jsonl", "", True),
    ("## A run's files", "", False),
])
def test_the_keys_and_files_of_a_run_are_documented(title, folder, complete, demo):
    """And the documented ones are there, except files that only a fault or a setting brings about."""
    if title == "## A run's files":
        written = {path.name for path in demo.iterdir()}
    else:
        rows = read_jsonl(demo / folder / ("samples.jsonl" if "samples" in title else "log.jsonl"))
        written = {key for row in rows for key in row}
    keys = documented(title)
    known = keys | (documented("### grpo.py, now and then") if "every step" in title else {})
    unknown = {name for name in written if not any(re.fullmatch(one, name) for one in known.values())}
    assert not unknown, f"docs/scale.md, {title}: document {unknown}"
    gone = {key for key, one in keys.items() if not any(re.fullmatch(one, name) for name in written)}
    assert not (complete and gone), f"docs/scale.md, {title}: nothing writes {gone}"


# ------------------------------------------------------------------------------------------- diffs and Python

CHANGES = [(page, *pair) for page, text in PAGES.items()
           for pair in re.findall(r"(?ms)^```diff\n(.*?)^```\n\n```python\n(.*?)^```$", text)]
PYTHON = [block for _, block in blocks("python") if block not in [check for *_, check in CHANGES]]


@pytest.mark.parametrize("page, diff, check", CHANGES, ids=[diff.split()[1] for _, diff, _ in CHANGES])
def test_a_diff_applies_and_does_what_it_says(page, diff, check, site, tmp_path):
    """The lines of Python below it pass with it and, or they would say nothing, fail without it."""
    tree = shutil.copytree(site, tmp_path / "tree", ignore=shutil.ignore_patterns("runs", ".venv"))
    outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}  # or git finds another repository

    def call(*words: str, text: str = "") -> subprocess.CompletedProcess:
        return subprocess.run(words, cwd=tree, env=outside, input=text, capture_output=True, text=True)

    assert call(sys.executable, "-c", check).returncode, "the tree has this already: show something else"
    applied = call("git", "apply", "-", text=diff)
    assert not applied.returncode, f"{page}: the diff does not apply any more: {applied.stderr}"
    done = call(sys.executable, "-c", check)
    assert not done.returncode, done.stderr


@pytest.mark.parametrize("block", PYTHON, ids=[block.split("\n")[0] for block in PYTHON])
def test_other_python_runs_or_imports_what_is_there(block, demo):
    """What needs packages of others is only checked for the names that it imports from us."""
    if "datasets" not in block:
        os.chdir(demo.parents[1])
        exec(compile(block.replace("max_new_tokens=40", "max_new_tokens=2"), "page", "exec"), {})
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module}.py").exists():
            assert hasattr(importlib.import_module(node.module), node.names[0].name), node.module
