"""Every command of the pages is run, or said to be for other machines: README.md, bench/README.md and
REFERENCE.md.

How a command is found and run is in pages.py. The demo's config is made small in the copy of the tree in
which all runs take place; what else must be smaller is a replacement in RUN.
"""

import re
import shutil
from pathlib import Path

import pytest
import torch
from pages import ROOT, commands, execute, make_environment
from test_reference import documented

from corpus.sources import read_jsonl

torch.set_num_threads(1)

SHARED = ROOT.parent / "shared"
PAGES = ("README.md", "bench/README.md", "REFERENCE.md")

# The demo with a model that learns nothing, of which every line runs.
SMALL = """
warmup_steps: 4
tiny_hidden: 32
sft_batch: 2
steps: 2
prompts_per_step: 4
minibatch_prompts: 2
group_size: 2
synthetic_train: 30
synthetic_test: 4
save_every: 1
"""

# The recipes that name a 7B model: the demo's instead, of which everything is kept.
SFT = {"--config configs/sft.yaml": "--config configs/tiny.yaml --model runs/demo/model"}
DISTILL = {
    "TEACHER --data train.jsonl": "runs/demo/model --data synthetic --synthetic_train 4 --max_response_tokens 8 "
    "--prompt_template configs/tiny_prompt.txt --reward always.py:one",
}
SFT_THEN_RL = {
    "configs/qwen2.5-7b.yaml": "configs/tiny.yaml --run_dir runs/sft_then_rl",
    "train.jsonl": "synthetic",
}

# Run here -> what is replaced before: placeholders by names, large numbers by small ones.
RUN: dict[str, dict[str, str]] = {
    "bash run.sh": {},
    "bash run.sh test": {},
    "python grpo.py --config configs/tiny.yaml --seed 7 --run_dir runs/seed7": {},
    "python plot.py runs/demo": {},
    "python data.py prepare --xlam $DATA/train/xlam_rawformat_repacked.json "
    "--toolace $DATA/train/toolace_first100_rawformat_reconstructed.json --layouts trl,verl --out runs/prepared": {},
    "python data.py overlap runs/prepared/train.jsonl --bfcl $DATA/bfcl --apibank $DATA/apibank": {},
    "python data.py stats runs/prepared/train.jsonl": {},
    "python data.py inspect runs/prepared/train.jsonl 1": {},
    "python grpo.py --config configs/qwen2.5-7b.yaml --plan --gpus 8 --gpu_memory 80": {"--gpus": "--model tiny --gpus"},
    "python grpo.py --help": {},
    "bash run.sh train runs/demo/config.yaml --resume true": {},
    "python grpo.py --export runs/demo/step_140 OUT": {"step_140": "step_2", "OUT": "runs/export"},
    "bash run.sh test tests/test_plan.py": {},
    "bash run.sh test tests/test_bfcl_check.py tests/test_apibank_check.py": {},
    "bash run.sh test tests/test_reward.py": {},
    "bash run.sh eval runs/demo/model --bfcl $DATA/bfcl --apibank $DATA/apibank --limit 20 --max_new_tokens 32": {
        "--limit 20 --max_new_tokens 32": "--limit 1 --max_new_tokens 2",
    },
    "python eval_bfcl.py generate --model M --data DIR --out OUT": {
        "M --data DIR --out OUT": "runs/demo/model --data $DATA/bfcl --out runs/a --limit 1 --max_new_tokens 2",
    },
    "python eval_bfcl.py score --predictions OUT/predictions.jsonl --data DIR --out OUT": {
        "OUT": "runs/a", "DIR": "$DATA/bfcl",
    },
    "python eval_bfcl.py --diff OUT_A OUT_B": {"OUT_A": "runs/a", "OUT_B": "runs/eval/runs_demo_model/bfcl"},
    "python eval_bfcl.py score … --official-dir DIR": {
        "…": "--predictions runs/a/predictions.jsonl --data $DATA/bfcl --out runs/a", "DIR": "runs/official",
    },
    "python grpo.py --model runs/demo/model --run_dir runs/real --steps 2 --prompts_per_step 4 --minibatch_prompts 2 "
    "--group_size 2 --data $DATA/train/xlam_rawformat_repacked.json,"
    "$DATA/train/toolace_first100_rawformat_reconstructed.json --max_prompt_tokens 2048 --max_response_tokens 128 "
    "--eval_cases 8 --gradient_checkpointing false": {"--steps 2": "--steps 1", "--eval_cases 8": "--eval_cases 1"},
    "python sft.py --config configs/qwen2.5-0.5b.yaml --data FILE --run_dir runs/sft --epochs 1": {
        "FILE": "synthetic --synthetic_train 8 --eval_cases 2 --max_response_tokens 8 --model runs/demo/model "
        "--prompt_template configs/tiny_prompt.txt",
    },
    "python reward.py $DATA/../golden/reward_verdicts.jsonl.gz --variant tool_n1_v0 --out runs/rescored.jsonl": {},
    "python bench/simulate.py --gpus 8,64,512": {"8,64,512": "8 --draws 1"},
    "python bench/simulate.py --response_p99 600": {"600": "600 --gpus 8 --draws 1"},
    "grep '^{' bench.log": {"bench.log": "runs/demo/log.jsonl"},
    "tail -n 1 runs/demo/samples.jsonl": {},
    "sed -i.bak 's/\"partial_format\": Variant(1.0, 0.8, 0.2/\"partial_format\": Variant(1.0, 0.8, 0.6/' reward.py": {},
    "grep -n '\"partial_format\": Variant(1.0, 0.8, 0.6' reward.py": {},
    "python grpo.py --config configs/tiny.yaml --model runs/demo/warmup/model --warmup_steps 0 --steps 60 "
    "--run_dir runs/binary": {"60": "1"},
    "python grpo.py --config configs/tiny.yaml --model runs/demo/warmup/model --warmup_steps 0 --steps 60 "
    "--run_dir runs/partial --reward partial_format": {"60": "1"},
    "python plot.py runs/binary runs/partial": {},
    "bash run.sh eval runs/partial/model --limit 2 --max_new_tokens 32": {
        "--limit 2 --max_new_tokens 32": "--limit 1 --max_new_tokens 2 --bfcl ../shared/data/bfcl",
    },
    "from transformers import AutoModelForCausalLM": {"max_new_tokens=40": "max_new_tokens=2"},
    "python samples_page.py runs/demo": {},
    "python grpo.py --config configs/tiny.yaml --model runs/demo/warmup/model --warmup_steps 0 --steps 2 "
    "--run_dir runs/two": {},
    "python plot.py runs/demo runs/seed7": {},
    "python sft.py --config configs/sft.yaml --data train.jsonl --sft_reason false --run_dir runs/no_reason":
    SFT | {"train.jsonl": "synthetic"},
    "python distill.py --model TEACHER --data train.jsonl --samples 4 --out runs/traces.jsonl":
    DISTILL,
    "python sft.py --config configs/sft.yaml --data runs/traces.jsonl --run_dir runs/reason":
    SFT | {"runs/traces.jsonl": "synthetic"},
    "python distill.py --model TEACHER --data train.jsonl --data_to 0.5 --out runs/half.jsonl":
    DISTILL,
    "python sft.py --config configs/sft.yaml --data runs/half.jsonl --run_dir runs/reason_half":
    SFT | {"runs/half.jsonl": "synthetic"},
    "python grpo.py --config configs/qwen2.5-7b.yaml --model runs/reason_half/model "
    "--data train.jsonl --data_from 0.5": SFT_THEN_RL,
    "python config.py REFERENCE.md": {},
    "python grpo.py --config configs/tiny.yaml --doctor": {},
    "python data.py inspect FILE": {"FILE": "runs/prepared/train.jsonl"},
    "python data.py overlap FILE --bfcl DIR": {"FILE": "runs/prepared/test.jsonl", "DIR": "../shared/data/bfcl"},
}

# Not run here -> why not, or the test that runs it. The page must say why; the options are checked all the
# same.
SAYS = {
    "GPUs": r"needs? (\S+ ){0,3}GPU|on an NVIDIA GPU",
    "packages": r"pip install",
    "time": r"\d (s|min|minutes)\b",
}
NOT_RUN = {
    "bash run.sh train configs/qwen2.5-1.5b.yaml --data xlam_function_calling_60k.json,toolace/data.json": "GPUs",
    "torchrun --nproc_per_node=8 grpo.py --config configs/qwen2.5-7b.yaml --data xlam_function_calling_60k.json": "GPUs",
    "torchrun --nnodes=2 --nproc_per_node=8 --max-restarts=3 --rdzv_backend=c10d --rdzv_endpoint=node1:29500 "
    "--rdzv_id=run1 grpo.py --config configs/qwen2.5-7b.yaml --data train.json --sharding hsdp "
    "--run_dir /shared/runs/7b": "GPUs",
    "sbatch job.sh": "GPUs",
    "#!/bin/bash": "GPUs",
    "pip install bfcl-eval soundfile": "packages",
    "BFCL_PROJECT_ROOT=DIR python bfcl_handler.py MODEL generate --test-category single_turn --backend vllm": "packages",
    "pip install -r bench/requirements.txt": "packages",
    "python bench/demo_seeds.py": "time",
    "python bench/train_step.py --case 1000/150/5": "time",
    "python bench/logprob_memory.py": "time",
    "python bench/rollout.py --case 512/64/8": "time",
    "python bench/step_vs_trl.py --case 512/64/8": "time",
    "python bench/reward_speed.py": "time",
    "python bench/bfcl_speed.py --golden ../shared/golden/bfcl_verdicts.jsonl.gz --data ../shared/data/bfcl": "time",
    "python bench/prepare_speed.py": "time",
    "python bench/scaling.py": "tests/test_bench_scaling.py::test_scaling_runs_from_end_to_end",
    "python bench/faults.py": "time",
    "python bench/gpu.py": "GPUs",
    "python bench/gpu.py --out gpu.jsonl": "GPUs",
    "python bench/gpu.py --parts rollout --minutes 20": "GPUs",
    "python bench/gpu.py --table gpu.jsonl": "tests/test_bench_gpu.py::test_tables_keep_every_figure",
    "python bench/gpu.py --tiny": "tests/test_bench_gpu.py::test_every_part_runs_on_tiny_models_and_the_checks_pass",
    "from datasets import load_dataset": "packages",
    "python -m verl.trainer.main_ppo algorithm.adv_estimator=grpo actor_rollout_ref.model.path=Qwen/Qwen2.5-7B-Instruct "
    "data.train_files=runs/prepared/verl_train.parquet data.val_files=runs/prepared/verl_test.parquet "
    "reward.custom_reward_function.path=reward.py reward.custom_reward_function.name=compute_score": "GPUs",
    "vllm serve runs/qwen2.5-7b/model --generation-config vllm": "GPUs",
    "pip install trl": "packages",
    "pip install verl pyarrow": "packages",
    "pip install vllm": "packages",
    "bash run.sh train configs/ablations/rl_50.yaml": "GPUs",
    "torchrun --nproc_per_node=8 sft.py --config configs/ablations/sft_reason_50.yaml": "GPUs",
    "bash run.sh eval runs/ablations/rl_50/model": "GPUs",
    "bash run.sh eval Qwen/Qwen2.5-7B-Instruct": "GPUs",
    "python bench/mini_paper.py": "time",
    "{ for case in 1000/150/5": "time",
}

COMMANDS = [command for page in PAGES for command in commands(page)]
COMMANDS = [
    c for c in COMMANDS if not (c.language == "python" and c.place.startswith("REFERENCE"))
]  # test_reference.py's


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A copy of the tree beside ../shared, with the small demo, and an environment whose python is this
    process.
    """
    copy = tmp_path_factory.mktemp("site") / "copy"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns("runs", ".venv", ".git", "__pycache__", ".*_cache")
    )
    if SHARED.exists():
        (copy.parent / "shared").symlink_to(SHARED)
    (copy / "configs" / "tiny.yaml").rename(copy / "configs" / "full.yaml")
    (copy / "configs" / "tiny.yaml").write_text(f"base: full.yaml{SMALL}", encoding="utf-8")
    (copy / "always.py").write_text("def one(completion, answer, tools):\n    return 1.0\n")
    make_environment(copy)
    return copy


# A command is run once, wherever it stands. What is in ../shared, or made from it, may be absent.
ONCE = [
    command
    for i, command in enumerate(COMMANDS)
    if command.text not in [other.text for other in COMMANDS[:i]]
]
OF_SHARED = ("$DATA", "../shared", "runs/prepared", "runs/a", "runs/eval")


def is_absent(command) -> bool:
    asked = command.text + str(RUN.get(command.known(RUN)))
    return not SHARED.exists() and any(word in asked for word in OF_SHARED)


@pytest.fixture(scope="module")
def outcome(place):
    """A function: place among ONCE -> what went wrong there, or "". Each runs once, after those before it in
    the pages.
    """
    outcomes: list[str] = []

    def of(index: int) -> str:
        for command in ONCE[len(outcomes) : index + 1]:
            key = command.known(RUN)
            skip = is_absent(command) or not key and not command.known(NOT_RUN)
            outcomes.append("" if skip else execute(command, RUN[key] if key else None, place))
        return outcomes[index]

    return of


# -------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("command", ONCE, ids=[f"{command.place} {command.text[:50]}" for command in ONCE])
def test_a_command_of_a_page_works(command, outcome):
    known = command.known(RUN) or command.known(NOT_RUN)
    assert known, (
        f"{command.place}: no test knows the command {command.text!r}; add it to RUN in tests/test_readme.py, with "
        f"replacements that make it small, or to NOT_RUN with one of {', '.join(SAYS)} or the name of the test that runs it"
    )
    if is_absent(command):
        pytest.skip("needs ../shared, which is not here")
    problem = outcome(ONCE.index(command))
    assert not problem, f"{command.place}: {problem}"


@pytest.mark.parametrize("key", NOT_RUN)
def test_what_is_not_run_here_says_why(key):
    reason = NOT_RUN[key]
    if "::" in reason:
        path, name = reason.split("::")
        assert f"def {name}(" in (ROOT / path).read_text(), f"{key}: {reason} does not exist any more"
        return
    text = next(command.text for command in COMMANDS if command.known({key: 0}))
    for script in set(re.findall(r"python bench/\w+\.py", text)) or {text}:
        contexts = [" ".join(command.context.split()) for command in COMMANDS if script in command.text]
        assert any(re.search(SAYS[reason], context) for context in contexts), (
            f"{script}: no page says, in words like {SAYS[reason]!r}, that it needs {reason}"
        )


def test_no_entry_is_left_over():
    for table in (RUN, NOT_RUN):
        gone = set(table) - {command.known(table) for command in COMMANDS}
        assert not gone, f"no page has these commands any more: {gone}"


def test_what_the_runs_left_is_in_the_reference(outcome, place):
    outcome(len(ONCE) - 1)

    def check(title: str, names: set[str], where: Path) -> None:
        patterns = documented(title).values()
        unknown = {name for name in names if not any(re.fullmatch(pattern, name) for pattern in patterns)}
        assert not unknown, f"REFERENCE.md, {title}: {where.relative_to(place)} has {unknown}"

    logs = list((place / "runs").rglob("log.jsonl"))
    assert len(logs) > 3
    for log in logs:
        rows, samples = read_jsonl(log), read_jsonl(log.with_name("samples.jsonl"))
        keys = {key for row in rows for key in row}
        check("## log.jsonl" if "reward" in keys else "### sft.py", keys, log)
        check("## samples.jsonl", {key for row in samples for key in row}, log)
        check("## A run's files", {entry.name for entry in log.parent.iterdir()}, log.parent)
