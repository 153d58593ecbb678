"""The drill in short: every fault of a long run at least once, on two real processes under torchrun's agent.

The cases are those of `python tests/drill/run.py`, which does them more often and kills at more moments. A
case raises AssertionError where a fault was not survived.
"""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "drill"))

import jobs  # noqa: E402
import run as drill  # noqa: E402

CASES = drill.all_cases(rounds=1)
CASES["file_event"] = drill.file_events(rounds=14, power=False)  # a run of each kind
CASES["power_cut"] = drill.file_events(rounds=10, power=True)
CHEAP = """
kill_one/0 kill_all/0 file_event/background_2 power_cut/replaced_3 restart/one sigterm/0 sigint/0
nonfinite/once nonfinite/in_a_row disk/full_late disk/log_full disk/read_only damaged/shard_flipped
damaged/shard_pickled hang/step out_of_memory/update out_of_memory/rollout two_runs/second_run
untrusted/pickled_model untrusted/remote_code
""".split()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return jobs.open_site(tmp_path_factory.mktemp("drill"))


@pytest.mark.parametrize("case", CHEAP)
def test_the_fault_is_survived(site, case):
    fault, label = case.split("/")
    tried, lost = CASES[fault][label](site, case.replace("/", "_"))
    assert tried > 0, "the fault never happened"
    assert lost <= 2 * tried, "with a checkpoint after every step, a fault costs the step that it hit"


def test_every_fault_is_here():
    assert {case.split("/")[0] for case in CHEAP} == set(CASES)


@pytest.mark.parametrize("name", ["model/model.safetensors", "samples.jsonl"])
def test_the_drill_notices_one_flipped_bit(site, tmp_path, name):
    copy = shutil.copytree(site / "whole", tmp_path / "whole")
    jobs.same_as_undisturbed(site, copy)
    drill.flip(copy / name)
    with pytest.raises(AssertionError, match=f"{name} differs"):
        jobs.same_as_undisturbed(site, copy)
