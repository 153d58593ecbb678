"""configs/ablations: a file is the main run but for what its name says, and says how to run it."""

import dataclasses
import re

import pytest
from helpers import ROOT

from config import load_config
from reward import REWARDS

FOLDER = ROOT / "configs" / "ablations"
# settings that change no result
UNSEEN = {"rollout_batch_size", "max_tokens_per_micro_batch", "save_every", "eval_every"}
DIFFERS = {  # what each file may set otherwise than default.yaml
    "default": {},
    "reward_no_reason": {"reward": "no_reason"},
    "reward_partial_format": {"reward": "partial_format"},
    "reward_partial_names": {"reward": "partial_names"},
    "data_xlam": {"data": "Salesforce/xlam-function-calling-60k"},
    "data_toolace": {"data": "Team-ACE/ToolACE"},
    "size_0.5b": {"model": "Qwen/Qwen2.5-0.5B-Instruct"},
    "size_1.5b": {"model": "Qwen/Qwen2.5-1.5B-Instruct"},
    "size_3b": {"model": "Qwen/Qwen2.5-3B-Instruct"},
    "size_14b": {"model": "Qwen/Qwen2.5-14B-Instruct"},
    "backbone_llama3.1_8b": {"model": "meta-llama/Llama-3.1-8B-Instruct"},
    # 8,192 positions: prompt and response must share them
    "backbone_llama3_8b": {"model": "meta-llama/Meta-Llama-3-8B-Instruct", "max_response_tokens": 4096},
}
TRACES = {"data": "traces.jsonl", "test_share": 0.0}
SFT = {"epochs": 20.0, "lora_rank": 8, "lora_alpha": 16.0}
RECIPES = {  # on the examples with distilled traces; RL takes the half that SFT leaves
    "rl_100": {},
    "rl_50": {"data_to": 0.5},
    "sft_reason_100": SFT,
    "sft_reason_50": SFT | {"data_to": 0.5},
    "sft_no_reason_100": SFT | {"sft_reason": False},
    "sft_no_reason_50": SFT | {"sft_reason": False, "data_to": 0.5},
    "sft_reason_50_rl_50": {"data_from": 0.5, "model": "runs/ablations/sft_reason_50/model"},
}
DIFFERS |= {name: TRACES | settings for name, settings in RECIPES.items()}


def settings(path: str) -> dict:
    return dataclasses.asdict(load_config(["--config", str(FOLDER / f"{path}.yaml")]))


def test_every_file_is_listed_here():
    assert {path.name.removesuffix(".yaml") for path in FOLDER.iterdir()} == set(DIFFERS)


@pytest.mark.parametrize("name", DIFFERS)
def test_a_row_differs_from_the_main_run_only_in_what_its_name_says_and_tells_its_command(name):
    row, main_run = settings(name), settings("default")
    changed = {key: value for key, value in row.items() if value != main_run[key] and key not in UNSEEN}
    assert changed.pop("run_dir", "runs/ablations/default") == f"runs/ablations/{name}"
    assert changed == DIFFERS[name]
    comment = "".join(re.findall(r"(?m)^#.*\n", (FOLDER / f"{name}.yaml").read_text()))
    script = "sft.py --config" if name.startswith("sft") and "rl" not in name else "bash run.sh train"
    assert f"{script} configs/ablations/{name}.yaml" in comment
    assert f"bash run.sh eval runs/ablations/{name}/model" in comment
    assert set(re.findall(r"--reward (\w+)", comment)) <= set(REWARDS)


def test_the_main_run_is_the_papers():
    run, of_the_config = settings("default"), settings("../qwen2.5-7b")
    assert {key for key in run if run[key] != of_the_config[key]} == {"data", "run_dir"}
    assert run["data"] == "Salesforce/xlam-function-calling-60k,Team-ACE/ToolACE"
    assert run["reward"] == "binary" and run["epochs"] == 7 and run["lr"] == 1e-6
    assert (run["sft_lr"], run["sft_batch"]) == (2e-5, 4 * 8)
