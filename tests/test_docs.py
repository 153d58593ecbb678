"""The pages keep up with the code: README.md and docs/*.md.

The bash blocks run in a copy of the tree, where `python` and `torchrun` only write down their words. Every
script that they call must exist and accept its options. The first commands really run, at toy size.
"""

import argparse
import dataclasses
import importlib
import inspect
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
from torch.distributed.run import get_args_parser

from config import Config, load_config
from corpus.sources import read_jsonl
from ops.plan import Assumptions

SHARED = ROOT.parent / "shared"
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}

# The demo with a model that learns nothing, as YAML.
SMALL = """{base: full.yaml, warmup_steps: 4, tiny_hidden: 32, sft_batch: 2, steps: 2, prompts_per_step: 4,
minibatch_prompts: 2, group_size: 2, synthetic_train: 30, eval_cases: 4, save_every: 1}"""


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of the fenced blocks of a language."""
    fence = re.compile(rf"(?ms)^```{language}\n(.*?)^```$")
    return [(page, block) for page, text in PAGES.items() for block in fence.findall(text)]


def spans() -> list[tuple[str, str]]:
    """(page, text) of what stands in backticks, outside of blocks."""
    found = []
    for page, text in PAGES.items():
        inline = re.findall(r"`([^`]+)`", re.sub(r"(?ms)^```.*?^```$", "", text))
        found += [(page, " ".join(span.split())) for span in inline]
    return found


def settings_page() -> str:
    """docs/settings.md: every setting, in one table under each section comment of Config."""
    lines = ["# Settings", "", Config.__doc__.strip(), ""]
    settings = {field.name: field for field in dataclasses.fields(Config)}
    for line in inspect.getsource(Config).splitlines():
        if section := re.match(r"    # (.*)", line):
            title = section[1][0].upper() + section[1][1:]
            lines += [f"### {title}", "", "| setting | default | meaning |", "|---|---|---|"]
        elif key := re.match(r"    (\w+): \w+ = _key", line):
            default, help = settings[key[1]].default, settings[key[1]].metadata["help"].replace("|", "\\|")
            shown = str(default).lower() if isinstance(default, bool) else str(default)
            lines.append(f"| `{key[1]}` | {f'`{shown}`' if shown else 'empty'} | {help} |")
    return re.sub(r"\n(?=###)", "\n\n", "\n".join(lines)).replace("\n\n\n", "\n\n") + "\n"


def test_the_page_of_settings_is_what_config_says():
    assert PAGES["docs/settings.md"] == settings_page(), "run: python tests/test_docs.py > docs/settings.md"


def test_links_lead_somewhere():
    for page, text in PAGES.items():
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
            path = (ROOT / page).parent / target if target else ROOT / page
            assert target.startswith("http") or path.exists(), f"{page}: {target}"
            titles = re.findall(r"(?m)^#+ (.*)$", path.read_text("utf-8")) if anchor else []
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not anchor or anchor in anchors, f"{page}: {target}#{anchor}"


def test_files_names_and_options_in_backticks_exist():
    code = [path for path in ROOT.rglob("*.py") if not {".venv", "runs"} & set(path.parts)]
    text = "\n".join(path.read_text("utf-8") for path in (*code, ROOT / "run.sh"))
    options = {*re.findall(r"--([\w-]+)", text), *Config.__dataclass_fields__, *vars(Assumptions())}
    options |= {"max-restarts", "rdzv_endpoint", "signal"}  # of torchrun and Slurm
    modules = {path.stem: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in code
               if path.parent.name not in ("tests", "bench", "drill", "gpu")}
    for page, span in spans():
        for file in re.findall(r"(?<!\S)[\w./-]+\.(?:py|sh)(?!\S|:)|(?:configs|docs|tests)/[\w./-]*", span):
            assert (ROOT / file).exists(), f"{page}: there is no {file}"
        for option in re.findall(r"(?<!\S)--([\w-]+)", span):
            assert option in options, f"{page}: there is no --{option}"
        module, _, name = span.partition(".")
        if module in modules and name.isidentifier() and name not in ("py", "jsonl", "yaml"):
            assert hasattr(importlib.import_module(modules[module]), name), f"{page}: there is no {span}"


RECORDER = """#!/usr/bin/env bash
if [ "$1" = -c ]; then echo 1e9; exit; fi
printf '%s\\0' "{name}" "$@" $'\\1' >> "$RECORD"  # at once (bash flushes at \\n): run.sh test starts two
"""
OTHERS = ("pip", "vllm", "scontrol", "sbatch")  # whose options are not ours to check


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A copy of the tree beside ../shared: the demo is small, and programs only write down their words."""
    copy = tmp_path_factory.mktemp("site") / "copy"
    not_ours = shutil.ignore_patterns("runs", ".venv", ".git", "__pycache__", ".*_cache", "pytest-cache*")
    shutil.copytree(ROOT, copy, ignore=not_ours)
    if SHARED.exists():
        (copy.parent / "shared").symlink_to(SHARED)
    (copy / "configs/tiny.yaml").rename(copy / "configs/full.yaml")
    (copy / "configs/tiny.yaml").write_text(SMALL)
    (copy / "runs/demo").mkdir(parents=True)
    (copy / "runs/demo/config.yaml").write_text("steps: 2\n")
    (copy / ".venv/bin").mkdir(parents=True)
    (copy / ".venv/bin/activate").touch()
    shutil.copy(ROOT / "requirements.txt", copy / ".venv/installed.txt")
    for name in ("python", "torchrun", "srun", *OTHERS):
        (copy / ".venv/bin" / name).write_text(RECORDER.format(name=name))
        (copy / ".venv/bin" / name).chmod(0o755)
    return copy


def calls_of(site: Path, script: str) -> list[list[str]]:
    """The words of every program that a piece of bash calls; srun's and torchrun's own words are left out."""
    (record := site / "record").write_text("")
    environment = os.environ | {"RECORD": str(record), "PYTHON": sys.executable}
    environment["PATH"] = f"{site}/.venv/bin:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], cwd=site, env=environment, capture_output=True, text=True)
    wrong = re.search(r"command not found|syntax error|run\.sh: (unknown|no such)", done.stderr)
    assert not wrong, done.stderr
    calls = []
    for line in record.read_text().split("\1\0")[:-1]:
        words = line.split("\0")[:-1]
        if words[0] == "srun":
            words = words[words.index("torchrun") :]
        if words[1:3] == ["-m", "torch.distributed.run"]:
            words = ["torchrun", *words[3:]]
        if words[0] == "torchrun":
            options = get_args_parser().parse_args(words[1:])
            script = ["-m", options.training_script] if options.module else [options.training_script]
            words = ["python", *script, *options.training_script_args]
        calls.append(words)
    return calls


def run(site: Path, words: list[str]) -> int:
    """`python SCRIPT …` or `python -m MODULE …` in this process and the copy -> the exit code."""
    with own_process_group(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(site)
        patch.setattr(sys, "argv", words[words[0] == "-m" :])
        patch.setattr(sys, "path", [*sys.path, str((ROOT / words[0]).parent)])
        try:
            if words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__")
            else:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


def ending(read):
    """The same function, and nothing after it."""

    def read_and_end(*args, **kwargs):
        read(*args, **kwargs)
        raise SystemExit

    return read_and_end


INLINE = r"(python|torchrun|bash) (-m )?[^-\s]\S* [^…]+$"  # with arguments, and all of them
COMMANDS = [*blocks("bash"), *(pair for pair in spans() if re.match(INLINE, pair[1]))]


@pytest.mark.parametrize("page, script", COMMANDS, ids=[f"{page}: {text[:40]}" for page, text in COMMANDS])
def test_commands_exist_and_have_these_options(page, script, site, monkeypatch):
    calls = calls_of(site, f"DATA=../shared/data\n{script}")
    monkeypatch.setattr("config.load_config", ending(load_config))
    monkeypatch.setattr("corpus.distill.load_config", ending(load_config))  # may be imported
    monkeypatch.setattr("corpus.layouts.load_examples", ending(str))  # data.py inspect has no options
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, ending(getattr(argparse.ArgumentParser, name)))
    for program, *words in calls:
        if words[:1] in (["bench/mini_paper.py"], ["bench/real_model.py"]):  # their own parsers run them
            words += ["--help"]
        if words[:2] == ["-m", "pytest"]:
            assert all((ROOT / word).exists() for word in words[2:] if word != "-q"), words
        elif program not in OTHERS and words[1:2] not in (["evals.bfcl_handler"], ["verl.trainer.main_ppo"]):
            assert run(site, words) == 0, f"{page}: {shlex.join(words)}"


FIRST = (
    "python -m ops.plan --config configs/qwen2.5-7b.yaml --model tiny --gpus 8",
    "python -m ops.doctor --config configs/tiny.yaml",
    "python grpo.py --config runs/demo/config.yaml --resume true",
    "python -m ops.plot runs/demo",
    "python -m ops.samples_page runs/demo",
    "python -m ops.export runs/demo/step_2 runs/exported",
    "bash run.sh eval runs/demo/model --limit 1 --max_new_tokens 2",
    "echo '{\"name\": \"f\"}' > runs/tool.json; python -m ops.chat runs/demo/model --tools runs/tool.json hi",
)


@pytest.fixture(scope="module")
def demo(site) -> Path:
    """`bash run.sh` in the copy."""
    assert all(run(site, words[1:]) == 0 for words in calls_of(site, "bash run.sh"))
    return site / "runs/demo"


@pytest.mark.parametrize("command", FIRST)
def test_the_first_commands_of_a_newcomer_work(command, site, demo):
    if "eval" in command and not SHARED.exists():
        pytest.skip("needs ../shared, which is not here")
    assert all(run(site, words[1:]) == 0 for words in calls_of(site, command))


def documented(title: str) -> dict[str, str]:
    """{key: pattern} of the first columns under a heading of docs/scale.md; UPPERCASE may be any word."""
    after = PAGES["docs/scale.md"].split(f"\n{title}\n")[1]
    section = re.split(rf"(?m)^#{{1,{title.count('#')}}} ", after)[0]
    keys = re.findall(r"`([^`]*)`", " ".join(re.findall(r"(?m)^\| (`[^|]*) \|", section)))
    return {key: re.sub("[A-Z]+", r"\\w+", re.escape(key)) for key in keys}


@pytest.mark.parametrize("title, file", [
    ("### grpo.py, every step", "log.jsonl"), ("### sft.py", "sft/log.jsonl"),
    ("## samples.jsonl", "samples.jsonl"), ("## A run's files", ""),
])
def test_the_keys_and_files_of_a_run_are_documented(title, file, demo):
    """And what is documented is written, except files that only a fault or a setting brings about."""
    written, keys = {path.name for path in demo.iterdir()}, documented(title)
    if file:
        written = {key for row in read_jsonl(demo / file) for key in row}
    known = keys | (documented("### grpo.py, now and then") if "every step" in title else {})
    unknown = {name for name in written if not any(re.fullmatch(one, name) for one in known.values())}
    gone = {key for key, one in keys.items() if not any(re.fullmatch(one, name) for name in written)}
    assert not unknown and not (file and gone), f"docs/scale.md, {title}: add {unknown}, remove {gone}"


CHANGED = r"(?ms)^```diff\n(.*?)^```\n\n```python\n(.*?)^```$"
CHANGES = [pair for text in PAGES.values() for pair in re.findall(CHANGED, text)]
SHOWN = [block for _, block in blocks("python") if block not in [check for _, check in CHANGES]]
PYTHON = [block for block in SHOWN if "datasets" not in block]  # which needs packages of others


@pytest.mark.parametrize("diff, check", CHANGES, ids=[diff.split()[1] for diff, _ in CHANGES])
def test_a_diff_applies_and_does_what_it_says(diff, check, tmp_path):
    """The lines of Python below it pass with it and, or they would say nothing, fail without it."""
    left_out = shutil.ignore_patterns("runs", ".*", "tests", "bench")
    tree = shutil.copytree(ROOT, tmp_path / "tree", ignore=left_out)
    outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)}  # or git finds another repository

    def call(*words: str, text: str = "") -> str:
        done = subprocess.run(words, cwd=tree, env=outside, input=text, capture_output=True, text=True)
        return done.stderr if done.returncode else ""

    assert call(sys.executable, "-c", check), "the tree has this already: show something else"
    assert not call("git", "apply", "-", text=diff) and not call(sys.executable, "-c", check)


@pytest.mark.parametrize("block", PYTHON, ids=[block.split("\n")[0] for block in PYTHON])
def test_other_python_runs(block, demo, monkeypatch):
    monkeypatch.chdir(demo.parents[1])
    exec(compile(block.replace("max_new_tokens=40", "max_new_tokens=2"), "page", "exec"), {})


if __name__ == "__main__":
    print(settings_page(), end="")
