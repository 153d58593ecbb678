"""The paper's argument with a real language model: SFT without and with reasoning, then RL, on real records.

    python bench/real_model.py --model FOLDER --data FILE[,FILE] --bfcl DIR --apibank DIR --jobs 2

All conditions learn from the same prompts: SFT imitates their bare calls or their demonstrations, RL goes on
from the SFT with reasoning and is rewarded on them. After each: reward on held-out records, BFCL, API-Bank.
OUT has a folder, NAME.log and NAME.json for every stage, and RESULTS.md, results.json, real_model.png and
samples.md. Finished stages are not done again, interrupted ones go on. Other --key value pairs are settings
of every training: seed of all stages, epochs of SFT, steps of RL.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

from timing import ROOT, code
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from real_model_own import SCRIPT, evaluate, select  # noqa: E402
from real_model_report import pass_figures, report  # noqa: E402

from config import Config, UserError, check_model, load_config, run_command  # noqa: E402
from corpus.sources import file_sha256, find_files, write_atomic  # noqa: E402
from evals.report import at_least  # noqa: E402
from prompts import load_template  # noqa: E402

ENOUGH_MIXED = 0.1  # share of prompts with right and wrong samples, below which RL pays for the format first
API_BANK = 4  # cases of API-Bank for each of a BFCL category, where --limit is given
# Settings that change no result, so that stages made with others are not refused.
FREE = ("run_dir resume overwrite log_samples trackers save_every keep_checkpoints background_save "
        "rollout_batch_size max_tokens_per_micro_batch gradient_checkpointing sharding offload "
        "timeout_minutes eval_every eval_cases trust_remote_code").split()
OURS = "data test_data test_share run_dir resume overwrite sft_reason reward reference".split()  # set here
UNREAD = {  # by one of the scripts
    "sft.py": ("prompts_per_step group_size minibatch_prompts num_iterations lr lr_warmup_steps lr_schedule "
               "temperature loss advantage aggregation clip_eps clip_eps_high kl_coef kl reference "
               "correction reward lenient overlong_tokens shuffle_rewards skip_zero_variance "
               "mask_truncated resample_rounds rollout_engine").split(),
    "grpo.py": ["sft_batch", "sft_lr", "sft_reason", "sft_flops"],
}


@dataclass(frozen=True)
class Stage:
    """needs: the stages before it. products: files of its folder that are there when it is done."""

    needs: tuple[str, ...]
    products: tuple[str, ...]


TRAINED, SAMPLED = ("summary.json",), ("verdicts.jsonl",)
TESTED = ("held_out/verdicts.jsonl", "bfcl/scores.json", "apibank/scores.json")
# The first that can start is started: the chain to RL never waits for an evaluation.
STAGES = {
    "data": Stage((), ("demonstrated.jsonl", "pass8.jsonl", "held_out.jsonl", "sizes.json")),
    "sft_reason": Stage(("data",), TRAINED),
    "pass8": Stage(("sft_reason",), SAMPLED),
    "rl_format": Stage(("pass8",), TRAINED),
    "rl": Stage(("sft_reason", "rl_format"), TRAINED),
    "sft_no_reason": Stage(("data",), TRAINED),
    "eval_sft_reason": Stage(("sft_reason",), TESTED),
    "eval_rl": Stage(("rl",), TESTED),
    "eval_sft_no_reason": Stage(("sft_no_reason",), TESTED),
    "eval_start": Stage(("data",), TESTED),
    "pass8_rl": Stage(("rl",), SAMPLED),
    "sampled_sft_reason": Stage(("sft_reason",), SAMPLED),
    "sampled_rl": Stage(("rl",), SAMPLED),
}


# ----------------------------------------------------------------------------------------- stages as commands


def commands_of(name: str, args: Namespace) -> list[list[str]]:
    """The commands of a stage whose needs are done, each a script with its arguments."""
    out = args.out
    if name == "data":
        listed = data_commands(args)
    elif name.startswith(("pass8", "sampled")):
        examples, samples = ("pass8", 8) if name.startswith("pass8") else ("held_out", 4)
        sampled = ["--samples", samples, "--temperature", args.settings.temperature]
        model = out / ("rl" if name.endswith("_rl") else "sft_reason") / "model"
        listed = evaluation(SCRIPT, args, out / f"data/{examples}.jsonl", model, out / name, sampled)
    elif name.startswith("eval_"):
        condition, few = name.removeprefix("eval_"), args.limit
        model = args.model if condition == "start" else out / condition / "model"
        bfcl = ["--limit", few] if few else []
        apibank = ["--levels", 1, *(["--limit", API_BANK * few] if few else [])]
        listed = evaluation(SCRIPT, args, out / "data/held_out.jsonl", model, out / name / "held_out", [])
        listed += evaluation("eval_bfcl.py", args, args.bfcl, model, out / name / "bfcl", bfcl)
        listed += evaluation("eval_apibank.py", args, args.apibank, model, out / name / "apibank", apibank)
    elif name.startswith("sft"):
        reason = ["--sft_reason", name == "sft_reason", "--steps", 0]  # epochs count
        listed = [training("sft.py", name, args, args.model, reason)]
    else:
        sft, formatted = out / "sft_reason/model", out / "rl_format/model"
        steps = args.settings.steps
        first = steps // 2 if pass_figures(out / "pass8")["mixed"] < ENOUGH_MIXED else 0
        more = ["--reward", "binary", "--steps", steps - first]
        if name == "rl_format":
            more = ["--reward", "partial_format", "--steps", first]
        elif first and args.settings.kl_coef:
            more += ["--reference", sft]
        start = formatted if first and name == "rl" else sft
        listed = [training("grpo.py", name, args, start, more)] if first or name == "rl" else []
    return [[str(word) for word in command] for command in listed]


def data_commands(args: Namespace) -> list[list]:
    """Prepared records, those that no benchmark has, and what is learnt from and held out of them."""
    config, data = args.settings, args.out / "data"
    given = ["--data", *args.data.split(","), "--out", data, "--overwrite", "--no_call_turns"]
    given += ["--test_share", 0.25, "--seed", config.seed, "--prompt_template", config.prompt_template]
    given += ["--tokenizer", args.model, "--max_prompt_tokens", config.max_prompt_tokens]
    against = ["--bfcl", args.bfcl, "--apibank", args.apibank, "--write", data / "clean.jsonl"]
    return [
        ["data.py", "prepare", *given],
        ["data.py", "overlap", data / "train.jsonl", *against],
        [SCRIPT, "select", data, args.model, args.thought_tokens, config.seed],
    ]


def evaluation(
    script: str, args: Namespace, data: str | Path, model: str | Path, folder: Path, more: list
) -> list[list]:
    """The commands for the replies of a model, greedy unless `more` says otherwise, and their verdicts."""
    config, where = args.settings, ["--data", data, "--out", folder]
    asked = ["--prompt_template", config.prompt_template]
    asked += ["--chat_template_kwargs", config.chat_template_kwargs]
    asked += ["--seed", config.seed, "--batch_size", config.rollout_batch_size]
    asked += ["--max_prompt_tokens", args.eval_prompt_tokens, "--max_new_tokens", config.max_response_tokens]
    return [
        [script, "generate", "--model", model, *where, *asked, *more],
        [script, "score", "--predictions", folder / "predictions.jsonl", *where],
    ]


def training(script: str, name: str, args: Namespace, model: str | Path, more: list) -> list:
    """The command of a run; one that was interrupted goes on. Without held-out data nothing is evaluated."""
    folder = args.out / name
    again = "--resume" if any(folder.glob("step_*/manifest.json")) else "--overwrite"
    data = ["--data", args.out / "data/demonstrated.jsonl", "--test_data", "", "--test_share", 0]
    return [script, *args.words, "--model", model, *data, "--run_dir", folder, again, "true", *more]


def changed(config: Config) -> dict:
    """The settings that are not at their defaults."""
    return {key: one for key, one in asdict(config).items() if one != getattr(Config(), key)}


def recipe(name: str, commands: list[list[str]], args: Namespace) -> dict:
    """All that decides what a stage gives, wherever OUT lies: another recipe is another stage."""
    made = {"code": hashlib.sha256(code("bench/real_model_own.py")).hexdigest()[:8]}
    template = load_template(args.settings.prompt_template)
    made["prompt"] = hashlib.sha256(template.encode()).hexdigest()[:8]
    for script, *words in commands:
        if script in UNREAD:
            free = FREE + UNREAD[script]
            settings = changed(load_config(words)).items()
            made["settings"] = {key: one for key, one in settings if key not in free}
        else:
            shown = re.sub(r" --batch_size \d+", "", shlex.join(words))
            made.setdefault(f"{script} {words[0]}", []).append(shown)
    if name == "data":
        made["data"] = [file_sha256(*find_files(path)) for path in args.data.split(",")]
        made["model"] = [file_sha256(path) for path in sorted(Path(args.model).glob("*.safetensors"))]
    made["needs"] = {need: read_record(args.out, need)["finished"] for need in STAGES[name].needs}
    return json.loads(json.dumps(made).replace(str(args.out), "OUT"))


def read_record(out: Path, name: str) -> dict:
    """What is known of a stage: recipe, commands, seconds so far, and when it was finished; {} before it."""
    path = out / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_record(out: Path, name: str, record: dict) -> None:
    """What read_record reads."""
    write_atomic(out / f"{name}.json", json.dumps(record, indent=1) + "\n")


def finished(out: Path, name: str) -> bool:
    """Whether a stage is done: it and its needs say so, and what it made is there."""
    record, stage = read_record(out, name), STAGES[name]
    if not record.get("finished") or not all(finished(out, need) for need in stage.needs):
        return False
    stamps = record["recipe"]["needs"].items()
    there = not record["commands"] or all((out / name / product).exists() for product in stage.products)
    return there and all(read_record(out, need)["finished"] == stamp for need, stamp in stamps)


def check_recipe(name: str, args: Namespace) -> dict:
    """The record that a stage begins with. Raises UserError where its folder was made from something else."""
    out = args.out
    commands = commands_of(name, args)
    kept = (out / name).exists() and (name != "data" or finished(out, name))  # data begins anew anyway
    past = read_record(out, name) if kept else {}
    now = recipe(name, commands, args)
    before = past.get("recipe", now)
    if args.accept_code:
        before = before | {"code": now["code"]}
    if other := sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key)):
        what = f"{out / name} was made with other inputs ({', '.join(other)})"
        advice = "add --accept_code to keep it" if other == ["code"] else "undo that"
        raise UserError(f"{what}; {advice}, delete this folder to do it again, or give another --out")
    return {"recipe": now, "commands": commands, "finished": None, "seconds": past.get("seconds", 0.0)}


def run_stage(name: str, args: Namespace, record: dict, children: dict) -> None:
    """Runs a stage's commands in a process of its own. Raises UserError if it fails."""
    out, began = args.out, time.perf_counter()
    write_record(out, name, record)
    if record["commands"]:
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        with (out / f"{name}.log").open("a") as log:
            command = [sys.executable, __file__, "chain", str(out / f"{name}.json")]
            children[name] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            failed = children[name].wait()
        record["seconds"] += time.perf_counter() - began
        if failed:
            write_record(out, name, record)
            last = (out / f"{name}.log").read_text(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"{name} ended with code {failed}; see {out / name}.log: {''.join(last)}")
    record["finished"] = time.strftime("%Y-%m-%d %H:%M:%S")
    write_record(out, name, record)
    tqdm.write(f"{name}: {record['seconds']:.0f} s")


def check_all(args: Namespace) -> None:
    """Raises UserError where a folder in OUT was made from something else, before the first stage."""
    stale = []
    for name, stage in STAGES.items():
        if all(finished(args.out, need) for need in stage.needs):
            check_recipe(name, args)
        elif (args.out / name).exists():
            stale.append(str(args.out / name))
    if stale:
        what = "made from a stage that has to be done again"
        raise UserError(f"{', '.join(stale)}: {what}; delete these folders, too")


def run_all(args: Namespace) -> None:
    """Runs what is missing, so many stages at a time, and reports after each. Raises UserError for failures,
    once nothing is left that can run.
    """
    out, jobs = args.out, args.jobs
    todo = [name for name in STAGES if not finished(out, name)]
    running, children, failures = {}, {}, []
    bar = tqdm(total=len(STAGES), initial=len(STAGES) - len(todo), disable=None)
    with ThreadPoolExecutor(jobs) as pool, bar:
        try:
            while True:
                ready = [name for name in todo if all(finished(out, need) for need in STAGES[name].needs)]
                for name in ready[: jobs - len(running)]:
                    todo.remove(name)
                    record = check_recipe(name, args)
                    running[pool.submit(run_stage, name, args, record, children)] = name
                if not running:  # what is left needs a stage that failed
                    break
                bar.set_description(" + ".join(running.values()))
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    running.pop(future)
                    failures += [str(error)] if (error := future.exception()) else []
                    bar.update()
                    tell(args)
        except BaseException:
            for child in children.values():
                child.terminate()  # trainings save and stop
            raise
    if failures:
        raise UserError("; ".join(failures))


def tell(args: Namespace, picture: bool = False) -> str:
    """The report of what is finished."""
    out = args.out
    records = {name: read_record(out, name) for name in STAGES}
    used = {key: one for key, one in changed(args.settings).items() if key not in OURS}
    options = {key: str(value) for key, value in vars(args).items() if key not in ("words", "settings")}
    about = {"seconds": {name: round(one.get("seconds", 0)) for name, one in records.items()}}
    about["code"] = {name: one.get("recipe", {}).get("code") for name, one in records.items()}
    done = [name for name in STAGES if finished(out, name)]
    return report(out, done, about | {"settings": used | options}, picture)


def chain(path: str) -> None:
    """The commands of a stage's record, one after the other in this process: torch is imported once."""
    for command in json.loads(Path(path).read_text(encoding="utf-8"))["commands"]:
        print(f"$ python {shlex.join(command)}", flush=True)
        sys.argv = command
        try:
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise


def main(arguments: list[str]) -> None:
    """Runs what is missing, and reports. Raises UserError."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if arguments[:1] == ["chain"]:
        return chain(arguments[1])
    if arguments[:1] == ["select"]:
        return select(arguments[1:])
    if arguments[:1] in (["generate"], ["score"]):
        sys.exit(evaluate(arguments))
    about = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **about)
    add, whole = parser.add_argument, at_least(0)
    add("--model", default="", help="folder or hub id of the start model (default: the config's)")
    add("--data", required=True, help="files of records, comma-separated, those with demonstrations first")
    add("--bfcl", required=True, help="folder with BFCL_v4_*.json")
    add("--apibank", required=True, help="folder of API-Bank, as eval_apibank.py reads it")
    add("--out", type=Path, default=Path("runs/real_model"), help="(default: %(default)s)")
    add("--config", default="configs/smollm2-135m.yaml", help="of all trainings (default: %(default)s)")
    add("--jobs", type=at_least(1), default=1, help="stages at a time (default: %(default)s)")
    add("--limit", type=whole, default=0, help="first N cases of a BFCL category, 4 N of API-Bank; 0: all")
    add("--thought_tokens", type=whole, default=0, help="thoughts end with a sentence within N; 0: whole")
    add("--eval_prompt_tokens", type=whole, default=4096, help="of tests' prompts (default: %(default)s)")
    add("--accept_code", action="store_true", help="go on with stages that other code of ours has made")
    args, words = parser.parse_known_args(arguments)
    args.words = ["--config", args.config, *words]
    args.settings = load_config(args.words)  # a mistake shows before the first stage
    if taken := [key for key in OURS if any(word.partition("=")[0] == f"--{key}" for word in words)]:
        raise UserError(f"{taken[0]} is set by the stages themselves; leave it out")
    if not args.settings.steps:
        raise UserError("steps of RL must be greater than 0")
    args.model = args.model or args.settings.model
    check_model(args.model)
    for name in ("data", "bfcl", "apibank"):
        for path in getattr(args, name).split(","):
            local = path.startswith((".", "/", "~")) or path.count("/") != 1  # else it may be a hub id
            if local and not Path(path).exists():
                raise UserError(f"{name}: {path!r} does not exist; check the path")
    args.out.mkdir(parents=True, exist_ok=True)
    check_all(args)
    try:
        run_all(args)
    finally:
        if any(finished(args.out, name) for name in STAGES):
            print(f"{tell(args, picture=True)}all of it: {args.out}")


if __name__ == "__main__":
    run_command(main)
