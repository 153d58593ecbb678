"""bench/faults.py in short: every fault of a long run at least once, on two real processes, and what became
of the run.

The cases are those of the drill, `python bench/faults.py`, which does them more often, under torchrun, and
kills at more moments. Here the ranks are forked from one process that has imported torch, so that a run takes
a second or two. A case raises Failed where a fault was not survived; "survived" is defined in the drill's own
docstring.
"""

import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))

import faults  # noqa: E402
from fault_cases import flip  # noqa: E402
from fault_runs import Failed, digest, open_site, same_as_undisturbed  # noqa: E402

CASES = faults.all_cases(rounds=2, quick=True)
CHEAP = """
kill_one/0 kill_all/0 sigterm/0 sigint/0 nonfinite/once nonfinite/in_a_row disk_full/stop disk_full/go_on disk_full/log
read_only/go_on damaged/shard_flipped hang/step out_of_memory/update out_of_memory/rollout
two_runs/second_run two_runs/changed_config untrusted/checkpoint untrusted/pickled_model untrusted/remote_code
""".split()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with open_site(tmp_path_factory.mktemp("faults"), quick=True) as site:
        yield site


@pytest.mark.parametrize("case", CHEAP)
def test_the_fault_is_survived(site, case):
    fault, label = case.split("/")
    tried, lost = CASES[fault][label](site, case.replace("/", "_"))
    assert tried > 0, "the fault never happened"
    assert lost <= 2 * tried, "with a checkpoint after every step, a fault costs the step that it hit"


def test_every_fault_is_here():
    """What needs torchrun itself (restarts) is in test_runtime.py and in the drill."""
    assert {case.split("/")[0] for case in CHEAP} == set(CASES)


# ----------------------------------------------------------- the drill must notice what it claims to rule out


@pytest.mark.parametrize("name", ["model/model.safetensors", "samples.jsonl"])
def test_one_flipped_bit_does_not_pass_for_the_undisturbed_run(site, tmp_path, name):
    run = shutil.copytree(site.folder / "whole", tmp_path / "run")
    flip(run / name)
    with pytest.raises(Failed, match=f"{name} differs"):
        same_as_undisturbed(site, run)


def test_a_step_that_is_logged_twice_does_not_pass(site, tmp_path):
    run = shutil.copytree(site.folder / "whole", tmp_path / "run")
    same_as_undisturbed(site, run)
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join([*lines, lines[-1]]))
    with pytest.raises(Failed, match="log.jsonl has the steps"):
        same_as_undisturbed(site, run)


def test_the_digest_of_weights_sees_every_byte_but_not_the_order_of_the_header(tmp_path):
    def write(header: bytes, body: bytes) -> str:
        path = tmp_path / "x.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + body)
        return digest(path)

    one = write(b'{"a": 1, "b": 2}', b"body")
    assert one == write(b'{"b": 2, "a": 1}', b"body")
    assert one != write(b'{"a": 1, "b": 2}', b"bodY") and one != write(b'{"a": 1, "b": 3}', b"body")
