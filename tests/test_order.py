"""distributed/batches.py: which examples a step takes is a function of the seed and the step alone."""

from collections import Counter

import pytest
import torch

from distributed.batches import batch_for_step


def slow_batches(count: int, size: int, seed: int, steps: int) -> list[list[int]]:
    """All batches from the start: the passes one after the other, cut into pieces."""
    line = []
    while len(line) < steps * size:
        line += [batch_for_step(count, place, 1, seed)[0] for place in range(len(line), len(line) + count)]
    return [line[i * size : (i + 1) * size] for i in range(steps)]


@pytest.mark.parametrize(("count", "size"), [(10, 4), (10, 10), (3, 8), (1, 3), (7, 1)])
def test_every_example_comes_once_per_pass(count, size):
    batches = [batch_for_step(count, step, size, 0) for step in range(count)]  # `size` whole passes
    assert batches == slow_batches(count, size, 0, count)
    line = [index for batch in batches for index in batch]
    for start in range(0, len(line), count):
        assert sorted(line[start : start + count]) == list(range(count))


def test_a_batch_spans_two_passes():
    first, second, third = (batch_for_step(10, step, 4, 0) for step in range(3))
    assert len(third) == 4 and set(third[:2]) == set(range(10)) - set(first) - set(second)


def test_the_order_depends_on_seed_and_pass_alone():
    """Resume computes the order of step 5 without the steps before it."""
    torch.manual_seed(0)
    one = batch_for_step(100, 5, 16, seed=1)
    torch.manual_seed(1)
    assert batch_for_step(100, 5, 16, seed=1) == one
    assert batch_for_step(100, 5, 16, seed=2) != one
    passes = [tuple(batch_for_step(16, step, 16, seed=1)) for step in range(20)]
    assert len(set(passes)) == 20, "a fresh shuffle per pass"
    firsts = Counter(batch_for_step(4, step, 4, seed=0)[0] for step in range(400))
    assert all(60 < firsts[index] < 140 for index in range(4)), "no example is always first"
