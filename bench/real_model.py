"""The paper's argument with a real language model: SFT without and with reasoning, then RL, on real records.

    python bench/real_model.py --model FOLDER --data FILE[,FILE] --bfcl DIR --apibank DIR --jobs 2

All conditions learn from the same prompts: SFT imitates their bare calls or their demonstrations, RL goes on
from the SFT with reasoning and is rewarded on them. After each: reward on held-out records, BFCL, API-Bank.
OUT has a folder for every stage, beside it NAME.log and NAME.json with its commands; RESULTS.md, results.json,
real_model.png and samples.md. Finished stages are not done again, interrupted ones go on. Other --key value
pairs are settings of every training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean

from timing import ROOT, code, machine
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from config import Config, UserError, load_config, run_command  # noqa: E402
from corpus.examples import Example, example_kind, unseen  # noqa: E402
from corpus.layouts import load_examples, write_examples  # noqa: E402
from corpus.sources import file_sha256, find_files, read_jsonl, write_atomic  # noqa: E402
from evals.bfcl_data import category_of  # noqa: E402
from evals.bfcl_table import AST, REFUSALS  # noqa: E402
from evals.predict import Sampling, write_predictions  # noqa: E402
from evals.report import Case, Z, compare, mcnemar, shorten, tally  # noqa: E402
from prompts import END_THINK, THINK, load_template, render_calls  # noqa: E402
from reward import score  # noqa: E402

CONDITIONS = {"start": "start model", "sft_no_reason": "SFT, bare calls", "sft_reason": "SFT with reasoning",
              "rl": "SFT with reasoning, then RL"}
PAIRS = (("sft_reason", "rl"), ("sft_no_reason", "sft_reason"))  # compared case by case
RIGHT = {"held_out": "right", "bfcl": "valid", "apibank": "correct"}  # the key of a verdict
NAMES = {"held_out": "held-out reward", "bfcl": "BFCL", "apibank": "API-Bank level 1"}
SAMPLES, PASS_PROMPTS = 8, 64  # of pass8
ENOUGH_MIXED = 0.1  # share of prompts with right and wrong samples, below which RL pays for the format first
SENTENCE_END = re.compile(r"(?<!\d)\.(?=\s)|[!?](?=\s)|\n")  # not the point of "1. "
RL_KEYS = ("reward", "format_rate", "frac_reward_zero_std", "entropy", "kl", "completions/mean_length")
# Settings that change no result, so that stages made with others are not refused.
FREE = ("run_dir resume overwrite log_samples trackers save_every keep_checkpoints background_save "
        "rollout_batch_size max_tokens_per_micro_batch gradient_checkpointing timeout_minutes").split()


@dataclass(frozen=True)
class Stage:
    """needs: the stages before it. product: the file of its folder that is written last."""

    needs: tuple[str, ...]
    product: str


# The first that can start is started: the chain to RL never waits for an evaluation.
STAGES = {
    "data": Stage((), "held_out.jsonl"),
    "sft_reason": Stage(("data",), "summary.json"),
    "pass8": Stage(("sft_reason",), "predictions.jsonl"),
    "rl_format": Stage(("pass8",), "summary.json"),
    "rl": Stage(("sft_reason", "rl_format"), "summary.json"),
    "sft_no_reason": Stage(("data",), "summary.json"),
    "eval_sft_reason": Stage(("sft_reason",), "apibank/scores.json"),
    "eval_rl": Stage(("rl",), "apibank/scores.json"),
    "eval_sft_no_reason": Stage(("sft_no_reason",), "apibank/scores.json"),
    "eval_start": Stage(("data",), "apibank/scores.json"),
}


@dataclass(frozen=True)
class Setup:
    """What was asked for. words: those of the settings. config: of every training, without ours."""

    args: argparse.Namespace
    words: list[str]
    config: Config


# ------------------------------------------------------------------------------------------ stages as commands


def commands_of(name: str, setup: Setup) -> list[list[str]]:
    """The commands of a stage whose needs are done, each a script with its arguments."""
    args, config, out = setup.args, setup.config, setup.args.out
    folder, data = out / name, out / "data"
    asked = ["--prompt_template", config.prompt_template, "--seed", args.seed]
    asked += ["--max_prompt_tokens", args.eval_prompt_tokens, "--max_new_tokens", config.max_response_tokens]
    asked += ["--batch_size", args.eval_batch, "--chat_template_kwargs", config.chat_template_kwargs]
    sft = out / "sft_reason/model"
    if name == "data":
        given = ["--data", *args.data.split(","), "--out", data, "--overwrite", "--no_call_turns"]
        given += ["--test_share", 0.25, "--seed", args.seed, "--prompt_template", config.prompt_template]
        given += ["--tokenizer", args.model, "--max_prompt_tokens", config.max_prompt_tokens]
        against = ["--bfcl", args.bfcl, "--apibank", args.apibank, "--write", data / "clean.jsonl"]
        chosen = ["--tokenizer", args.model, "--thought_tokens", args.thought_tokens, "--seed", args.seed]
        listed = [["data.py", "prepare", *given]]
        listed += [["data.py", "overlap", data / "train.jsonl", *against, ">", data / "overlap.txt"]]
        listed += [["bench/real_model.py", "select", data, *chosen]]
    elif name == "pass8":
        sampled = ["--samples", SAMPLES, "--temperature", config.temperature]
        examples = data / "pass8.jsonl"
        listed = [["bench/real_model.py", "ask", examples, "--model", sft, "--out", folder, *asked, *sampled]]
    elif name.startswith("eval_"):
        condition = name.removeprefix("eval_")
        model = args.model if condition == "start" else out / condition / "model"
        examples = data / "held_out.jsonl"
        listed = [["bench/real_model.py", "ask", examples, "--model", model, "--out", folder / "held_out", *asked]]
        for script, place, factor, more in (
            ("bfcl", args.bfcl, 1, []), ("apibank", args.apibank, 4, ["--levels", 1])
        ):
            few = ["--limit", factor * args.limit] if args.limit else []
            where = ["--data", place, "--out", folder / script]
            listed += [[f"eval_{script}.py", "generate", "--model", model, *where, *asked, *few, *more]]
            predictions = folder / script / "predictions.jsonl"
            listed += [[f"eval_{script}.py", "score", "--predictions", predictions, *where]]
    elif name.startswith("sft"):
        ours = ["--model", args.model, "--sft_reason", name == "sft_reason", "--steps", 0, "--epochs", args.epochs]
        listed = [training("sft.py", setup, folder, ours)]
    else:
        first = args.steps // 2 if format_first(pass_figures(out)["mixed"]) else 0
        ours = ["--model", sft, "--steps", first, "--reward", "partial_format"]
        if name == "rl":
            ours = ["--model", out / "rl_format/model" if first else sft, "--steps", args.steps - first]
            ours += ["--reward", "binary", *(["--reference", sft] if first and config.kl_coef else [])]
        listed = [training("grpo.py", setup, folder, ours)] if first or name == "rl" else []
    return [[str(word) for word in command] for command in listed]


def training(script: str, setup: Setup, folder: Path, ours: Sequence) -> list:
    """The command of a run; one that was interrupted goes on. Without held-out data nothing is evaluated."""
    again = "--resume" if any(folder.glob("step_*/manifest.json")) else "--overwrite"
    fixed = ["--data", setup.args.out / "data/demonstrated.jsonl", "--test_data", "", "--test_share", 0]
    fixed += ["--seed", setup.args.seed, "--run_dir", folder, again, "true"]
    return [script, *setup.words, *fixed, *ours]


def recipe(name: str, commands: list[list[str]], setup: Setup) -> dict:
    """All that decides what a stage gives, wherever OUT lies: another recipe is another stage."""
    made = {"code": hashlib.sha256(code()).hexdigest()[:8]}
    made["prompt"] = hashlib.sha256(load_template(setup.config.prompt_template).encode()).hexdigest()[:8]
    for script, *words in commands:
        if script in ("sft.py", "grpo.py"):
            settings = asdict(load_config(words))
            changed = {key: one for key, one in settings.items() if one != getattr(Config(), key)}
            made["settings"] = {key: one for key, one in changed.items() if key not in FREE}
        else:
            words = shlex.join(words).replace(f"--batch_size {setup.args.eval_batch} ", "")
            made[f"{script} {words.split()[0]}"] = words
    if name == "data":
        made["data"] = [file_sha256(*find_files(path)) for path in setup.args.data.split(",")]
        made["model"] = [file_sha256(path) for path in sorted(Path(setup.args.model).glob("*.safetensors"))]
    made["needs"] = {need: read_record(setup.args.out, need)["finished"] for need in STAGES[name].needs}
    return json.loads(json.dumps(made).replace(str(setup.args.out), "OUT"))


def read_record(out: Path, name: str) -> dict:
    """What is known of a stage: recipe, commands, seconds so far, and when it was finished; {} before it."""
    path = out / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def finished(out: Path, name: str) -> bool:
    """Whether a stage is done: its record says so, of what its needs gave last, and its product is there."""
    record = read_record(out, name)
    if not record.get("finished") or (record["commands"] and not (out / name / STAGES[name].product).exists()):
        return False
    needs = record["recipe"]["needs"].items()
    return all(read_record(out, need).get("finished") == stamp for need, stamp in needs)


def check_recipe(name: str, setup: Setup) -> list[list[str]]:
    """The commands of a stage. Raises UserError where its folder was made from something else."""
    out = setup.args.out
    before = read_record(out, name).get("recipe") if (out / name).exists() else None
    commands = commands_of(name, setup)
    if before is not None:
        now = recipe(name, commands, setup)
        if setup.args.accept_code:
            before = before | {"code": now["code"]}
        if changed := sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key)):
            what = f"{out / name} was made with another {' and '.join(changed)}"
            advice = "add --accept_code to keep it" if changed == ["code"] else "undo that"
            raise UserError(f"{what}; {advice}, delete this folder to do it again, or give another --out")
    return commands


def run_stage(name: str, setup: Setup, commands: list[list[str]], children: dict) -> None:
    """Runs a stage's commands in a process of its own. Raises UserError if it fails."""
    out = setup.args.out
    past = read_record(out, name) if (out / name).exists() else {}
    record = {"recipe": recipe(name, commands, setup), "commands": commands, "finished": None}
    record["seconds"] = past.get("seconds", 0.0)
    write_atomic(out / f"{name}.json", json.dumps(record, indent=1) + "\n")
    began = time.perf_counter()
    if commands:
        threads = str(max(1, (os.cpu_count() or 1) // setup.args.jobs))
        command = [sys.executable, __file__, "chain", out / f"{name}.json"]
        with (out / f"{name}.log").open("a") as log:
            environment = {"OMP_NUM_THREADS": threads, **os.environ}
            children[name] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            failed = children[name].wait()
        record["seconds"] += time.perf_counter() - began
        if failed:
            write_atomic(out / f"{name}.json", json.dumps(record, indent=1) + "\n")
            raise UserError(f"{name} ended with code {failed}; see {out / name}.log")
    record["finished"] = time.strftime("%Y-%m-%d %H:%M:%S")
    write_atomic(out / f"{name}.json", json.dumps(record, indent=1) + "\n")


def run_all(setup: Setup) -> None:
    """Runs what is missing, so many stages at a time; the report follows. Raises UserError for failures."""
    out, jobs = setup.args.out, setup.args.jobs
    todo = [name for name in STAGES if not finished(out, name)]
    for name in STAGES:
        stale = [need for need in STAGES[name].needs if need in todo]
        if stale and (out / name).exists():
            raise UserError(f"{out / name} was made from a {stale[0]} that is gone; delete this folder, too")
        if not stale:
            check_recipe(name, setup)
    running, children, failures = {}, {}, []
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(STAGES), initial=len(STAGES) - len(todo)) as bar:
        try:
            while todo or running:
                ready = [name for name in todo if all(finished(out, need) for need in STAGES[name].needs)]
                for name in ready[: jobs - len(running)]:
                    todo.remove(name)
                    commands = check_recipe(name, setup)
                    running[pool.submit(run_stage, name, setup, commands, children)] = name
                bar.set_description(" + ".join(running.values()) or "done")
                if not running:
                    break  # what is left needs a stage that failed
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(future)
                    failures += [str(error)] if (error := future.exception()) else []
                    bar.update()
                    report(setup)
        except BaseException:
            for child in children.values():
                child.terminate()  # trainings save and stop
            raise
    if failures:
        raise UserError("; ".join(failures))


def chain(path: str) -> None:
    """The commands of a stage's record, one after the other in this process: torch is imported once."""
    for script, *words in json.loads(Path(path).read_text(encoding="utf-8"))["commands"]:
        said = shlex.join([script, *words]).replace("'>'", ">")
        print(f"$ python {said}", flush=True)
        words, target = (words[:-2], words[-1]) if words[-2:-1] == [">"] else (words, "")
        sys.argv = [script, *words]
        with open(target, "w") if target else nullcontext(sys.stdout) as stdout, redirect_stdout(stdout):
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as ended:
                if ended.code:
                    raise


# ------------------------------------------------------------------------------------- commands of this script


def cut_thought(reply: str, limit: int, count: Callable[[str], int]) -> str | None:
    """The reply, its thought cut behind the last sentence that ends within `limit` tokens (0: whole).

    count: text -> its tokens. None where no sentence fits; a reply without a thought stays.
    """
    before, opened, rest = reply.partition(THINK)
    thought, closed, after = rest.partition(END_THINK)
    if not limit or not closed or count(thought) <= limit:
        return reply
    starts = [thought[: end.end()].rstrip() for end in SENTENCE_END.finditer(thought)]
    fitting = [start for start in starts if start.strip() and count(start) <= limit]
    return before + opened + fitting[-1] + closed + after if fitting else None


def select(words: Sequence[str]) -> None:
    """`select FOLDER …`: demonstrated.jsonl to learn from, held_out.jsonl, pass8.jsonl and sizes.json."""
    parser = argparse.ArgumentParser(prog="real_model.py select")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--thought_tokens", type=int)
    parser.add_argument("--seed", type=int)
    args = parser.parse_args(words)
    from model import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    test = args.folder / "test.jsonl"
    clean, _ = load_examples(args.folder / "clean.jsonl")
    told = [example for example in clean if example.demonstrations]
    held_out = load_examples(test)[0] if test.exists() else []
    held_out += unseen([example for example in clean if not example.demonstrations], told)
    train, changed, lost = [], 0, 0
    for example in told:
        cut = [
            cut_thought(text, args.thought_tokens, lambda part: len(tokenizer.encode(part)))
            for text in example.demonstrations
        ]
        kept = tuple(filter(None, cut))
        lost += len(cut) - len(kept)
        changed += sum(text not in example.demonstrations for text in kept)
        train += [Example(**{**vars(example), "demonstrations": kept})] if kept else []
    if not train or not held_out:
        what = "no example with a demonstration" if held_out else "no held-out example"
        raise UserError(f"{args.folder}: {what} is left; give more --data, or a larger --thought_tokens")
    few = random.Random(f"{args.seed}/pass8").sample(train, min(PASS_PROMPTS, len(train)))
    sizes = {"demonstrations cut": changed, "demonstrations left out": lost}
    shown = [(text, example.answer) for example in train for text in example.demonstrations]
    sizes["demonstrations with reward 1"] = f"{sum(score(*one).total == 1 for one in shown)} of {len(shown)}"
    for name, examples in (("demonstrated", train), ("pass8", few), ("held_out", held_out)):
        kinds, sources = Counter(map(example_kind, examples)), Counter(one.source for one in examples)
        sizes[name] = {"examples": len(examples), **kinds, **sources}
    print(json.dumps(sizes, indent=1))
    (args.folder / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n")
    for name, examples in (("demonstrated", train), ("pass8", few), ("held_out", held_out)):
        write_examples(args.folder / f"{name}.jsonl", examples)


def ask(words: Sequence[str]) -> None:
    """`ask EXAMPLES --model M --out FOLDER …`: a model's replies to examples; resumes."""
    parser = argparse.ArgumentParser(prog="real_model.py ask")
    parser.add_argument("examples", type=Path)
    for name, default in (("model", ""), ("out", ""), ("prompt_template", ""), ("chat_template_kwargs", ""),
                          ("seed", 0), ("samples", 1), ("temperature", 0.0), ("batch_size", 32),
                          ("max_prompt_tokens", 4096), ("max_new_tokens", 1024)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    given = vars(parser.parse_args(words))
    place, model, path = given.pop("examples"), given.pop("model"), Path(given.pop("out")) / "predictions.jsonl"
    template = given.pop("prompt_template") and load_template(words[words.index("--prompt_template") + 1])
    cases = [Case(one.id, example_kind(one), one.messages, one.tools) for one in load_examples(place)[0]]
    write_predictions(model, cases, path, template, Sampling(**given), f"{place.stem} of real_model.py")


# ---------------------------------------------------------------------------------------------------- figures


def judged(examples: Path, predictions: Path) -> list[dict]:
    """The replies to examples, each with the parts of its binary reward."""
    answers = {example.id: example.answer for example in load_examples(examples)[0]}
    rows = []
    for row in read_jsonl(predictions):
        reward = score(row["output"], answers[row["id"]])
        rows.append(row | vars(reward) | {"right": reward.total == 1})
    return rows


def pass_figures(out: Path) -> dict:
    """What the samples of pass8 show: shares of its prompts, and the mean reward."""
    groups: dict[str, list[bool]] = {}
    for row in judged(out / "data/pass8.jsonl", out / "pass8/predictions.jsonl"):
        groups.setdefault(row["id"], []).append(row["right"])
    n = len(groups)
    return {
        "prompts": n, "pass": sum(map(any, groups.values())) / n,
        "mixed": sum(any(group) and not all(group) for group in groups.values()) / n,
        "reward": fmean(map(fmean, groups.values())),
    }


def format_first(mixed: float) -> bool:
    """Whether too few prompts have right and wrong samples, which are all that the binary reward teaches."""
    return mixed < ENOUGH_MIXED


def paired(fates: Sequence[tuple[bool, bool]]) -> dict:
    """B against A on the same cases: fixed, broken, McNemar's p, and B - A in percent with its 95 % interval.

    Wald's interval for paired shares (Agresti, Categorical Data Analysis, 2002, section 10.1.1).
    """
    n, fixed, broken = len(fates), fates.count((False, True)), fates.count((True, False))
    difference = (fixed - broken) / n
    half = Z * sqrt(fixed + broken - (fixed - broken) ** 2 / n) / n
    bounds = {"low": 100 * (difference - half), "high": 100 * (difference + half)}
    return {"n": n, "fixed": fixed, "broken": broken, "p": mcnemar(broken, fixed),
            "difference": 100 * difference, **bounds}


def verdicts_of(out: Path, condition: str) -> dict[str, list[dict]]:
    """The verdicts on a condition's replies, by test."""
    folder = out / f"eval_{condition}"
    rows = {name: read_jsonl(folder / name / "verdicts.jsonl") for name in ("bfcl", "apibank")}
    return {"held_out": judged(out / "data/held_out.jsonl", folder / "held_out/predictions.jsonl"), **rows}


def figures(folder: Path, verdicts: dict[str, list[dict]]) -> dict:
    """All of a condition's row in the table."""
    asked, called = verdicts["held_out"], verdicts["bfcl"]
    found = {name: tally((row["id"], row[key]) for row in verdicts[name]) for name, key in RIGHT.items()}
    for name, parts in (("AST", AST), ("irrelevance", REFUSALS)):
        found[name] = tally((row["id"], row["valid"]) for row in called if category_of(row["id"]) in parts)
    for name in ("correct", "format_ok"):
        found[name] = 100 * fmean(row[name] for row in asked)
    found["tokens"] = fmean(row["output_tokens"] for row in asked)
    listed = json.loads((folder / "bfcl/scores.json").read_text(encoding="utf-8"))["replies"]
    found["over_calling"] = next(row for row in listed if row["name"].startswith("over-calling"))
    found["reasons"] = Counter(row["reason"] for row in asked if not row["right"])
    for name in RIGHT:
        found[f"{name}_skipped"] = sum("skipped" in r for r in read_jsonl(folder / name / "predictions.jsonl"))
    return found


def results(setup: Setup, verdicts: dict[str, dict[str, list[dict]]]) -> dict:
    """All figures of what is finished."""
    out = setup.args.out
    rows = {name: figures(out / f"eval_{name}", one) for name, one in verdicts.items()}
    found = {"conditions": rows, "comparisons": {}, "rl": {}}
    for a, b in (pair for pair in PAIRS if verdicts.keys() >= set(pair)):
        for name, key in RIGHT.items():
            fates = list(compare(verdicts[a][name], verdicts[b][name], key).values())
            found["comparisons"][f"{CONDITIONS[b]} − {CONDITIONS[a]}, {NAMES[name]}"] = paired(fates)
    if finished(out, "data"):
        found["data"] = json.loads((out / "data/sizes.json").read_text())
        found["overlap"] = (out / "data/overlap.txt").read_text(encoding="utf-8").splitlines()[-1]
    if finished(out, "pass8"):
        found["pass8"] = pass_figures(out)
    for part, log in rl_logs(out).items():
        for key in (key for key in RL_KEYS if key in log[-1]):
            found["rl"][f"{part}, {key}"] = [fmean(row[key] for row in side) for side in (log[:10], log[-10:])]
    found["seconds"] = {name: round(read_record(out, name).get("seconds", 0)) for name in STAGES}
    found["code"] = {name: read_record(out, name).get("recipe", {}).get("code") for name in STAGES}
    used = {key: one for key, one in asdict(setup.config).items() if one != getattr(Config(), key)}
    return found | {"settings": {key: str(one) for key, one in vars(setup.args).items()} | used, "machine": machine()}


def rl_logs(out: Path) -> dict[str, list[dict]]:
    """The steps of the RL runs so far, by folder; without those that have none."""
    logs = {}
    for name in ("rl_format", "rl"):
        if (out / name / "log.jsonl").exists():
            logs[name] = [row for row in read_jsonl(out / name / "log.jsonl") if "reward" in row]
    return {name: log for name, log in logs.items() if log}


def table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def shown(part: dict) -> str:
    """A tally's percentage with its interval and n."""
    return f"{part['accuracy']:.1f} ({part['low']:.1f} – {part['high']:.1f}), n = {part['n']}"


def markdown(found: dict) -> str:
    """RESULTS.md."""
    rows, head = [], ["condition", *NAMES.values(), "held-out: calls right", "format", "tokens per reply"]
    for name, one in found["conditions"].items():
        cells = [CONDITIONS[name], *(shown(one[test]) for test in NAMES)]
        cells += [f"{one[key]:.1f}" for key in ("correct", "format_ok", "tokens")]
        rows.append([*cells, *(shown(one[key]) for key in ("AST", "irrelevance", "over_calling"))])
    text = "Percent, with 95 % intervals. Over-calling: a call where none fits.\n\n"
    text += table([*head, "BFCL AST", "BFCL irrelevance", "over-calling"], rows)
    pairs = []
    for name, one in found["comparisons"].items():
        difference = f"{one['difference']:+.1f} ({one['low']:+.1f} – {one['high']:+.1f})"
        pairs.append([name, one["n"], difference, one["fixed"], one["broken"], f"{one['p']:.3g}"])
    text += "\n" + table(["difference", "n", "points", "fixed", "broken", "McNemar p"], pairs)
    conditions = found["conditions"].values()
    reasons = sorted(set().union(*(one["reasons"] for one in conditions)))
    listed = [[name, *(one["reasons"].get(name, 0) for one in conditions)] for name in reasons]
    text += "\n" + table(["wrong held-out replies", *map(CONDITIONS.get, found["conditions"])], listed)
    steps = [[name, *(f"{one:.3f}" for one in both)] for name, both in found["rl"].items()]
    text += "\n" + table(["RL", "first 10 steps", "last 10 steps"], steps)
    if one := found.get("pass8"):
        text += f"\npass@{SAMPLES} of the SFT with reasoning on {one['prompts']} training prompts: "
        text += f"{one['pass']:.1%}; with right and wrong samples: {one['mixed']:.1%}; mean reward {one['reward']:.3f}\n"
    skipped = {name: {test: one[f"{test}_skipped"] for test in NAMES} for name, one in found["conditions"].items()}
    for name in ("data", "overlap", "seconds", "code", "settings", "machine"):
        text += f"\n{name}: {found.get(name, 'not there yet')}\n"
    return text + f"\nprompts too long or refused, which count as empty replies: {skipped}\n"


def samples(out: Path, verdicts: dict[str, dict[str, list[dict]]]) -> str:
    """samples.md: three held-out prompts on whose replies the conditions' verdicts differ, two where not."""
    replies = {name: {row["id"]: row for row in one["held_out"]} for name, one in verdicts.items()}
    left, text = {True: 3, False: 2}, ""
    for example in load_examples(out / "data/held_out.jsonl")[0] if replies else ():
        rows = {name: one[example.id] for name, one in replies.items()}
        differ = len({row["right"] for row in rows.values()}) > 1
        if left[differ]:
            left[differ] -= 1
            tools = ", ".join(tool["name"] for tool in example.tools)
            text += f"\n## {example.id}\n\nTools: {tools}\n\n{quoted(example.messages[-1]['content'])}"
            text += f"\nRight:\n\n{quoted(render_calls(example.answer))}"
            for name, row in rows.items():
                text += f"\n{CONDITIONS[name]}: {row['reason']}\n\n{quoted(row['output'])}"
    return text


def quoted(text: str) -> str:
    """A text as an indented block of Markdown, its middle cut out if it is long."""
    return "".join(f"    {line}\n" for line in shorten(text, 2000).splitlines() or [""])


def draw(found: dict, out: Path) -> None:
    """real_model.png: the reward of RL by step; the tests by condition."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    done = 0
    for name, log in rl_logs(out).items():
        values, steps = [row["reward"] for row in log], [done + row["step"] for row in log]
        means = [fmean(values[max(0, i - 9) : i + 1]) for i in range(len(values))]
        (line,) = left.plot(steps, means, label=f"{name}, mean of 10 steps")
        left.plot(steps, values, ".", color=line.get_color(), alpha=0.4)
        done = steps[-1]
        left.legend()
    left.set(title="RL: reward of its samples", xlabel="step", ylim=(0, 1))
    for place, (name, one) in enumerate(found["conditions"].items()):
        parts = [one[test] for test in NAMES]
        heights = [part["accuracy"] for part in parts]
        errors = [[part["accuracy"] - part["low"] for part in parts], [part["high"] - part["accuracy"] for part in parts]]
        places = [test + 0.2 * place for test in range(len(NAMES))]
        right.bar(places, heights, 0.18, yerr=errors, capsize=3, label=CONDITIONS[name])
    right.set_xticks([test + 0.3 for test in range(len(NAMES))], NAMES.values())
    right.set(title="greedy, with 95 % intervals", ylabel="percent")
    right.legend()
    figure.savefig(out / "real_model.png", dpi=110)
    pyplot.close(figure)


def report(setup: Setup) -> str:
    """Writes RESULTS.md, results.json, samples.md and the picture of what is finished; returns the text."""
    out = setup.args.out
    verdicts = {name: verdicts_of(out, name) for name in CONDITIONS if finished(out, f"eval_{name}")}
    found = results(setup, verdicts)
    write_atomic(out / "results.json", json.dumps(found, indent=1) + "\n")
    write_atomic(out / "RESULTS.md", text := markdown(found))
    write_atomic(out / "samples.md", samples(out, verdicts))
    draw(found, out)
    return text


def main(arguments: list[str]) -> None:
    """Runs what is missing, and reports. Raises UserError."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if arguments[:1] in (["chain"], ["select"], ["ask"]):
        if arguments[0] == "chain":
            return chain(arguments[1])
        return {"select": select, "ask": ask}[arguments[0]](arguments[1:])
    about = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **about)
    add = parser.add_argument
    add("--model", default="", help="folder or hub id of the start model (default: the config's)")
    add("--data", required=True, help="files of records, comma-separated, some with demonstrations")
    add("--bfcl", required=True, help="folder with BFCL_v4_*.json")
    add("--apibank", required=True, help="folder of API-Bank, as eval_apibank.py reads it")
    add("--out", type=Path, default=Path("runs/real_model"), help="(default: %(default)s)")
    add("--config", default="configs/smollm2-135m.yaml", help="of all trainings (default: %(default)s)")
    add("--seed", type=int, default=0, help="of all stages (default: %(default)s)")
    add("--jobs", type=int, default=1, help="stages at a time (default: %(default)s)")
    add("--limit", type=int, default=0, help="N cases of every BFCL category, 4 N of API-Bank; 0: all")
    add("--thought_tokens", type=int, default=0, help="thoughts are cut to whole sentences within N; 0: not")
    add("--epochs", type=float, default=1.0, help="of both SFT (default: %(default)s)")
    add("--steps", type=int, default=50, help="of RL (default: %(default)s)")
    add("--eval_prompt_tokens", type=int, default=4096, help="longer test prompts are skipped (default: %(default)s)")
    add("--eval_batch", type=int, default=32, help="replies decoded at once in tests (default: %(default)s)")
    add("--accept_code", action="store_true", help="go on with stages that other code of ours has made")
    args, words = parser.parse_known_args(arguments)
    words = ["--config", args.config, *words]
    config = load_config(words)  # a mistake shows before the first stage
    args.model = args.model or config.model
    args.out.mkdir(parents=True, exist_ok=True)
    setup = Setup(args, words, config)
    try:
        run_all(setup)
    finally:
        print(f"{report(setup)}\nall of it: {args.out}")


if __name__ == "__main__":
    run_command(main)
