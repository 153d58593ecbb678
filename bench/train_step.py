"""Forward + backward of a training step: groups packed with a shared prompt against a row per response.

    python bench/train_step.py [--case 1000/150/5] [--groups 1] [--repetitions 7]

--case P/R/G: prompt and response tokens, responses per prompt. A random Qwen2 of about 4M parameters, fp32,
one thread. Both sides pack the same tokens, compute the same log-probs and the backward; they take turns, and
every repetition gives one ratio of CPU times. The floor is the packed step's FLOPs at the machine's matrix
rate.
"""

import statistics
import time

import common
import torch
from common import CPU, Shape
from timing import options

from kernel.packing import pack

SHAPE = Shape(hidden=256, inner=896, layers=4, heads=4, kv_heads=2, vocab=2048)


def timed(model: torch.nn.Module, groups: list, shared: bool) -> tuple[float, float, float]:
    """CPU seconds of the forward, packing included, and of all; the loss."""
    model.zero_grad(set_to_none=True)
    start = time.process_time()
    loss = -common.logprobs(model, pack(groups, CPU, shared)).mean()
    middle = time.process_time()
    loss.backward()
    return middle - start, time.process_time() - start, loss.item()


def main() -> None:
    args = options(__doc__, case="1000/150/5", groups=1, repetitions=7)
    case = prompt, response, copies = tuple(map(int, args.case.split("/")))
    torch.set_num_threads(1)
    model = common.random_model(SHAPE).train()
    groups = common.random_groups(SHAPE.vocab, [(prompt, [response] * copies)] * args.groups)
    sides = {"packed": lambda: timed(model, groups, True), "rows": lambda: timed(model, groups, False)}
    pairs = list(zip(*common.take_turns(sides, args.repetitions).values()))
    assert all(abs(ours[2] - rows[2]) < 1e-4 for ours, rows in pairs), "both sides must have the same loss"
    rate = common.matrix_rate(prompt + copies * response, SHAPE.hidden, SHAPE.inner)
    floor = args.groups * common.group_flops(SHAPE, case, linear=3, attention=3.5) / rate
    common.print_result(
        "train_step", **common.spread([rows[1] / ours[1] for ours, rows in pairs]),
        forward_ratio_median=statistics.median(rows[0] / ours[0] for ours, rows in pairs),
        token_ratio=copies * (prompt + response) / (prompt + copies * response),
        packed_s=statistics.median(ours[1] for ours, _ in pairs), floor_s=floor,
        gflops=rate / 1e9, **vars(args),
    )


if __name__ == "__main__":
    main()
