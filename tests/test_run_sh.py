"""run.sh's own mistakes; CI comes in through it and tries the rest."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def call(*arguments, **environment):
    return subprocess.run(
        ["bash", "run.sh", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=environment or None,
    )


def test_an_unknown_command_lists_the_known_ones():
    done = call("trian")
    assert done.returncode == 1
    assert "bash run.sh train CONFIG" in done.stderr and "unknown command: trian" in done.stderr


def test_a_python_that_is_too_old_or_missing_is_named():
    done = call("test", PYTHON="/nowhere/python3", PATH="/usr/bin:/bin")
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed" in done.stderr and "try: install it" in done.stderr


def test_ci_runs_the_test_command_of_the_readme():
    assert "bash run.sh test" in (ROOT / ".ci" / "run").read_text()
    assert "bash run.sh test " in (ROOT / "README.md").read_text()
