"""Lets the tests import the flat scripts, wherever pytest is started; one thread for each process."""

import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
# A shell has what it starts with & ignore Ctrl-C, also in the processes that this one starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(scope="session")
def warmed(tmp_path_factory) -> dict[str, object]:
    """helpers.warmed_up_task, which takes some seconds."""
    from helpers import warmed_up_task  # imports torch

    return warmed_up_task(tmp_path_factory.mktemp("task"))


@pytest.fixture
def ranks():
    """A process group of this process alone."""
    from helpers import one_rank  # imports torch

    with one_rank() as ranks:
        yield ranks
