"""The checks of numerics.py as tests: `python -m pytest tests/gpu` on a machine with a GPU."""

import sys
from pathlib import Path

import pytest
import torch

sys.path += [str(Path(__file__).parents[2] / "bench"), str(Path(__file__).parent)]

from gpu_measure import Session  # noqa: E402
from numerics import checks  # noqa: E402


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return checks(Session(torch.device("cuda", 0), False, folder / "unused", folder, 0.0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here; run it where one is")
@pytest.mark.parametrize("name", checks(None))
def test_the_gpu_computes_what_fp32_does(every, name):
    figures = every[name]()
    assert figures["passed"], figures
