"""Lets the tests import the flat scripts, wherever pytest is started; one thread for each process."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture
def ranks():
    """A process group of this process alone."""
    from helpers import one_rank  # imports torch

    with one_rank() as ranks:
        yield ranks
