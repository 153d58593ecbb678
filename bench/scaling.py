"""Strong and weak scaling of one GRPO step from 1 to 2 processes: the same batch, and twice the batch.

    python bench/scaling.py [--rounds 3] [--steps 2] [--prompts 8] [--copies 4] [--response 48]

A random Qwen2 of some 7 million parameters on generated data, fp32, one thread per process, on the CPU under
torchrun's agent. A round starts three runs one after the other, so that a slow minute meets all: 1 process,
2 on the same batch, 2 on twice the batch. Each does one step to warm up and then --steps that count. A ratio
is tokens per second (prompts and responses) of 2 processes over those of 1 in the same step of the same
round; efficiency is half of it.

Two processes on one machine are not two machines: they share the memory's bandwidth, the last cache, the
clock and perhaps one core's units, and what they send passes the loopback interface. waiting: the share of a
step in which a process's CPU was idle. imbalance: seconds of rollout and rewards, longest minus mean, over
those of the step.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import common
import torch
import torch.distributed as dist
from timing import options
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from corpus.sources import append_jsonl, read_jsonl
from corpus.tiny_model import build_tiny_model, build_tiny_tokenizer
from ops.export import export

PROMPT = common.ROOT / "configs/tiny_prompt.txt"
CASES = {"alone": (1, 1), "strong": (2, 1), "weak": (2, 2)}  # processes, and how many times the prompts
PHASES = ("rollout", "reward", "reference", "update")  # one update per step: no old log-probs


def parity(completion: str, answer: list, tools: list) -> float:
    """A reward that a random model gets too, so that there is a gradient."""
    return len(completion) % 2


def worker(out: Path, steps: int, arguments: list[str]) -> None:
    """Collective. What the agent starts: `steps` steps after one to warm up; rank 0 writes a row for each."""
    run = common.start_run(arguments)
    for step in range(1, steps + 2):
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        seconds, tokens = common.run_step(run)
        busy = time.process_time() - cpu
        dist.barrier()
        wall = time.perf_counter() - wall
        everyone = run.ranks.gather((seconds["rollout"] + seconds["reward"], busy))
        alone, busy = zip(*everyone)
        row = {f"{phase}_s": seconds[phase] for phase in PHASES}
        row |= {"step_s": wall, "tokens_per_s": tokens / wall}
        row["waiting"] = max(0.0, 1 - statistics.mean(busy) / wall)
        row["imbalance"] = (max(alone) - statistics.mean(alone)) / wall
        if step > 1 and run.ranks.main:
            append_jsonl(out, [row])
    dist.destroy_process_group()


def run_case(args: Namespace, model: Path, case: str, folder: Path) -> list[dict[str, float]]:
    """The rows of one run."""
    processes, times = CASES[case]
    prompts = args.prompts * times
    settings = dict(
        model=model, data="synthetic", prompt_template=PROMPT, prompts_per_step=prompts,
        minibatch_prompts=prompts, group_size=args.copies, temperature=1.0, max_prompt_tokens=2000,
        max_response_tokens=args.response, max_tokens_per_micro_batch=args.micro_batch, lr=1e-6, kl_coef=1e-3,
        gradient_checkpointing="false", synthetic_train=64, eval_cases=2, reward=f"{__file__}:parity",
        run_dir=folder / "run",
    )
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=0, run_id=folder.name,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork",
    )
    elastic_launch(config, worker)(folder / "rows.jsonl", args.steps, words)
    return read_jsonl(folder / "rows.jsonl")


def main() -> None:
    args = options(
        __doc__, rounds=3, steps=2, prompts=8, copies=4, response=48, micro_batch=2048, hidden=320, layers=6
    )
    torch.set_num_threads(1)  # forks have it too
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rows: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        texts = [PROMPT.read_text("utf-8"), "weather of a city in days with names and numbers 0123456789"]
        tokenizer = build_tiny_tokenizer(texts, 2048)
        export(build_tiny_model(tokenizer, args.hidden, args.layers, seed=0), tokenizer, model)
        for turn in range(args.rounds):
            for case in list(CASES)[:: -1 if turn % 2 else 1]:
                rows[case] += run_case(args, model, case, Path(tempfile.mkdtemp(dir=scratch)))
    for key in rows["alone"][0]:
        medians = {case: statistics.median(row[key] for row in rows[case]) for case in CASES}
        print(f"{key:<14}" + "".join(f"{case:>10}{value:>9.2f}" for case, value in medians.items()))
    result = {}
    for case in ("strong", "weak"):
        pairs = list(zip(rows["alone"], rows[case]))
        figures = common.spread([two["tokens_per_s"] / one["tokens_per_s"] for one, two in pairs])
        figures["efficiency_median"] = figures["ratio_median"] / 2
        for key in ("waiting", "imbalance"):
            figures[key] = statistics.median(row[key] for row in rows[case])
        result[case] = figures
    common.print_result("scaling", **result, **vars(args))


if __name__ == "__main__":
    main()
