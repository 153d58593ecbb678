"""The benchmarks run at toy size, and end with a line of JSON or a table."""

import json
import sys
from itertools import product
from types import SimpleNamespace

import pytest
from helpers import ROOT, Forked, run_forked

GOLDEN, BFCL = ROOT / "../shared/golden/bfcl_verdicts.jsonl.gz", ROOT / "../shared/data/bfcl"


def run(name: str, *words: object) -> str:
    """What a script of bench/ prints."""
    return run_forked(f"bench/{name}.py", *words)


@pytest.mark.parametrize(
    "bench, words",
    [
        ("train_step", "--case 40/6/3 --repetitions 1"),
        ("rollout_engines", "--case 20/6/2 --prompts 2 --rounds 1"),
        ("logprob_memory", "--tokens 64 --vocab 2000 --hidden 32 --repetitions 1"),
    ],
)
def test_a_benchmark_ends_with_its_ratios(bench, words):
    result = json.loads(run(bench, *words.split()).splitlines()[-1])
    assert 0 < result["ratio_min"] <= result["ratio_median"] <= result["ratio_max"]


def test_scaling_compares_one_process_and_two():
    words = "--rounds 1 --steps 1 --prompts 2 --copies 2 --response 8 --hidden 32 --layers 1".split()
    result = json.loads(run("scaling", *words).splitlines()[-1])
    for case in ("strong", "weak"):
        assert result[case]["efficiency_median"] == pytest.approx(result[case]["ratio_median"] / 2, abs=1e-3)
        assert 0 <= result[case]["waiting"] < 1


def test_the_speeds_are_measured():
    assert "| records per second |" in run("prepare_speed", "--xlam", 30, "--toolace", 10, "--repeats", 1)
    assert "no exception" in run("reward_speed", "--items", 40, "--fuzz", 20)
    if not GOLDEN.exists():
        pytest.skip("the data in ../shared is absent")
    assert "golden rows |" in run("bfcl_speed", "--golden", GOLDEN, "--data", BFCL, "--repeats", 1)


def test_agreement_shows_where_the_official_code_decides_otherwise(tmp_path):
    """The official code is a stand-in that finds every reply right."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "book", "description": "d", "parameters": parameters}
    case = {"id": "a_0", "question": "user: q", "function": [function], "time": ""}
    texts = {
        "model_eval/checker.py": "def normal_checker(*_):\n    return {'valid': True}\n",
        "data_en/data_normal_atom_bool.json": json.dumps(case),
        "data_en/possible_answer/data_normal_atom_bool.json": '{"ground_truth": {"book": {"city": "Oslo"}}}',
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shown = run("agreement", "acebench", "--official", tmp_path, "--data", tmp_path, "--count", 50)
    compared, right, different = shown.splitlines()[2].split("|")[2:5]
    assert right.strip() == "100%" and 0 < int(different) < int(compared)
    assert shown.count("official: (True, None)\n  ours: (False, None)") == 3


def test_a_toy_comparison_of_seeds_and_controls_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import mini_paper

    toy = "--seeds 1 --steps 2 --warmup_steps 4 --jobs 2".split()
    few = "--eval_cases 4 --synthetic_train 40 --prompts_per_step 4 --minibatch_prompts 4".split()
    def run(command, **options):
        return SimpleNamespace(returncode=Forked(command, **options).wait())

    monkeypatch.setattr(mini_paper, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(sys, "argv", ["mini_paper.py", "seeds", *toy, "--out", str(tmp_path), *few])
    mini_paper.main()
    assert "shuffled_rewards, 1 seed" in capsys.readouterr().out


def test_a_finished_grid_is_not_run_again_and_its_differences_are_paired_by_seed(tmp_path, monkeypatch):
    """The logs are made up. Seeds differ, but in each one condition is 0.5 above the baseline."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    from mini_paper import SPLITS, grid_parts, recipe

    parts = grid_parts(3, 4)
    for name, seed in product(parts, (401, 402)):
        right = (seed - 400) / 10 + 0.5 * (name == "overlap_egpo")
        logged = {f"{split}/{key}": right for key in ("correct_rate", "accuracy") for split in SPLITS}
        folder = tmp_path / recipe(parts) / f"{name}_{seed}"
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text(json.dumps({"flops": 1e9, **logged}))
        (folder / "summary.json").write_text('{"held_out/n": 150, "strict/n": 50}')
    shown = run("mini_paper", "grid", *"--seeds 2 --steps 3 --warmup_steps 4 --out".split(), tmp_path)
    cells = next(line for line in shown.splitlines() if line.startswith("| overlap × egpo")).split(" | ")
    assert cells[1:6] == ["0.650 ± 0.635"] * 2 + ["+0.500 ± 0.000"] * 2 + ["0.650"]
    assert (folder.parent / "mini_paper.png").exists() and not [*folder.parent.glob("*.log")]
