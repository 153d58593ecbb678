"""Strong and weak scaling of one GRPO step from 1 to 2 processes: same batch, and a batch that grows with the
processes.

    python bench/scaling.py [--rounds 3] [--steps 2] [--prompts 8] [--copies 4] [--response 48]

A random Qwen2 of some 7 million parameters on generated data, fp32, one thread per process, on the CPU under
torchrun. A round starts three runs one after the other, so that a slow minute meets all: 1 process, 2 on the
same batch, 2 on twice the batch. Each does one step to warm up and then --steps that count. A ratio is tokens
per second (prompts and responses) of 2 processes over those of 1 in the same step of the same round;
efficiency is half of it. On the same batch both sample the same completions.

Two processes on one machine are not two machines: they share the memory's bandwidth, the last cache, the
clock that a chip lowers when more cores work, and perhaps one core's units; and what they send passes the
loopback interface, which no network equals. Work beside the benchmark takes one of two cores from 2 processes
and none from 1.

waiting: the share of a step in which a process's CPU was idle after its rollout and rewards, during which it
waits for nobody: it waited for the slower process, for data on its way, or for a core that something else
had. imbalance: the part of it that is the slower process's doing for certain: seconds of rollout and rewards,
longest minus mean.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import grpo  # noqa: E402
from config import load_config
from corpus.sources import append_jsonl, read_jsonl
from corpus.tiny_model import build_tiny_model, build_tiny_tokenizer
from distributed.batches import batch_for_step, gather_groups, own_places
from distributed.ranks import Clock, start_ranks
from losses import group_std
from model import count_parameters
from ops.export import export

VOCAB = 2048
PHASES = ("rollout", "reward", "gather", "reference", "update")  # one update per step: no old log-probs
CASES = {"alone": (1, 1), "strong": (2, 1), "weak": (2, 2)}  # processes, and how many times the prompts


def build(folder: Path, hidden: int, layers: int) -> int:
    """Writes the start model and its tokenizer; returns the number of parameters."""
    template = (ROOT / "configs" / "tiny_prompt.txt").read_text("utf-8")
    tokenizer = build_tiny_tokenizer(
        [template, "weather of a city in days with names and numbers 0123456789"], VOCAB
    )
    model = build_tiny_model(tokenizer, hidden, layers, seed=0)
    export(model, tokenizer, folder)
    return count_parameters(model)


def settings(args: argparse.Namespace, model: Path, prompts: int) -> dict[str, object]:
    """The settings of a run that this bench measures."""
    return dict(
        model=model, data="synthetic", prompt_template=ROOT / "configs" / "tiny_prompt.txt", prompts_per_step=prompts,
        minibatch_prompts=prompts, group_size=args.copies, temperature=1.0, max_prompt_tokens=2000,
        max_response_tokens=args.response, max_tokens_per_micro_batch=args.micro_batch, gradient_checkpointing="false",
        lr=1e-6, kl_coef=1e-3, synthetic_train=64, eval_cases=2, timeout_minutes=5,
    )


# ---------------------------------------------------------------------------------------------------- one run


def measured_step(run: grpo.Run, step: int) -> dict[str, float]:
    """Collective. One step as grpo.train does it, without its log; this rank's wall and CPU seconds by phase.

    Ends when all ranks have ended it.
    """
    config, ranks, clock = run.config, run.ranks, Clock(None, step)
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    batch = batch_for_step(len(run.train), step - 1, config.prompts_per_step, config.seed)
    places = own_places(len(batch), ranks)
    groups, scores = grpo.sample_and_score(run, [run.train[batch[p]] for p in places], step, places, clock)
    alone, alone_cpu = clock.seconds["rollout"] + clock.seconds["reward"], time.process_time() - cpu
    with clock("gather"):  # the first moment at which a rank waits for those that still sample
        everyone, rewards = gather_groups(groups, grpo.reward_table(scores, config), ranks)
    # The random model's rewards are all 0. Other advantages, of no meaning, so that there is a gradient.
    advantages = group_std(rewards + torch.arange(config.group_size) % 2)
    grpo.learn(run, everyone, advantages, clock)
    dist.barrier()
    row = {"step": step, "rank": ranks.rank, "seconds": time.perf_counter() - wall}
    row |= {f"time/{phase}_s": clock.seconds.get(phase, 0.0) for phase in PHASES}
    row |= {"alone_s": alone, "busy_s": alone + time.process_time() - cpu - alone_cpu}
    row["num_tokens"] = sum(len(g.prompt.ids) + sum(map(len, g.responses)) for g in everyone)
    return row


def worker(out: str, steps: str, *arguments: str) -> None:
    """Collective. What torchrun starts: `steps` steps, and one before them; each rank writes rows to
    OUT.RANK.
    """
    config = load_config(list(arguments))
    ranks = start_ranks(config.timeout_minutes, config.threads)
    run = grpo.set_up(config, ranks, examined=True)
    for step in range(1, int(steps) + 2):
        row = measured_step(run, step)
        if step > 1:
            append_jsonl(Path(f"{out}.{ranks.rank}"), [row])
    dist.destroy_process_group()


def run_case(args: argparse.Namespace, model: Path, case: str, folder: Path) -> list[dict[str, float]]:
    """Starts one run and waits for it: a record per measured step, see `join`. Raises RuntimeError if it
    fails.
    """
    processes, times = CASES[case]
    own = settings(args, model, args.prompts * times) | {"run_dir": folder / "run"}
    words = [word for key, value in own.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [__file__, "--worker", str(folder / "rows"), str(args.steps), *words]
    environment = {k: v for k, v in os.environ.items() if k != "RANK"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the run of {case} failed; its last lines:\n{done.stderr[-3000:]}")
    return [
        join(rows)
        for rows in zip(*(read_jsonl(Path(f"{folder / 'rows'}.{rank}")) for rank in range(processes)))
    ]


# ---------------------------------------------------------------------------------------------------- figures


def join(rows: tuple[dict[str, float], ...]) -> dict[str, float]:
    """The ranks' rows of one step -> one record: seconds of the slowest rank, the mean of waiting over
    ranks.
    """
    seconds = max(row["seconds"] for row in rows)
    alone = [row["alone_s"] for row in rows]
    record = {key: max(row[key] for row in rows) for key in rows[0] if key.startswith("time/")}
    record |= {"step": rows[0]["step"], "seconds": seconds, "tokens_per_s": rows[0]["num_tokens"] / seconds}
    record["imbalance"] = (max(alone) - statistics.mean(alone)) / seconds
    record["waiting"] = max(0.0, 1 - statistics.mean(row["busy_s"] for row in rows) / seconds)
    return record


def compare(rounds: list[dict[str, list[dict[str, float]]]]) -> dict[str, dict[str, float]]:
    """Per case of 2 processes: minimum, median and maximum over all steps of the ratio of tokens per second
    to 1 process, and medians of waiting and imbalance.
    """
    result = {}
    for case in ("strong", "weak"):
        pairs = [(one, two) for r in rounds for one, two in zip(r["alone"], r[case])]
        ratios = sorted(two["tokens_per_s"] / one["tokens_per_s"] for one, two in pairs)
        figures = {"ratio_min": ratios[0], "ratio_median": statistics.median(ratios), "ratio_max": ratios[-1]}
        figures["efficiency_median"] = figures["ratio_median"] / CASES[case][0]
        result[case] = figures | {
            k: statistics.median(two[k] for _, two in pairs) for k in ("waiting", "imbalance")
        }
    return result


def table(rounds: list[dict[str, list[dict[str, float]]]]) -> list[str]:
    """Lines: seconds of each phase (the slowest rank's), minimum / median / maximum over rounds and steps."""
    heads = ("1 process", "2, same batch", "2, twice it")
    lines = [f"{'seconds, min/median/max':<26}" + "".join(f"{name:>22}" for name in heads)]
    keys = [(phase, f"time/{phase}_s") for phase in PHASES] + [
        ("step", "seconds"),
        ("tokens per second", "tokens_per_s"),
    ]
    for name, key in [*keys, ("waiting, share", "waiting"), ("imbalance, share", "imbalance")]:
        cells = []
        for case in CASES:
            values = [record[key] for r in rounds for record in r[case]]
            parts = (min(values), statistics.median(values), max(values))
            cells.append(" / ".join(f"{x:.0f}" if key == "tokens_per_s" else f"{x:.2f}" for x in parts))
        lines.append(f"{name:<26}" + "".join(f"{cell:>22}" for cell in cells))
    return lines


def main(arguments: list[str]) -> None:
    """Runs the rounds, prints the table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="each starts all three runs")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of a run")
    parser.add_argument(
        "--prompts", type=int, default=8, help="prompts of a step; twice as many in the weak case"
    )
    parser.add_argument("--copies", type=int, default=4, help="completions per prompt")
    parser.add_argument("--response", type=int, default=48, help="most tokens of a completion")
    parser.add_argument("--micro_batch", type=int, default=2048, help="tokens per forward/backward")
    parser.add_argument("--hidden", type=int, default=320, help="hidden size of the model, a multiple of 8")
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args(arguments)
    if min(args.rounds, args.steps) < 1 or args.prompts < 2:
        parser.error("--rounds and --steps must be at least 1, --prompts at least 2: one for each process")
    torch.set_num_threads(1)
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        parameters = build(Path(scratch) / "model", args.hidden, args.layers)
        for index in range(args.rounds):
            order = list(CASES) if index % 2 == 0 else list(CASES)[::-1]
            folders = {case: Path(scratch) / f"{index}_{case}" for case in order}
            for folder in folders.values():
                folder.mkdir()
            rounds.append(
                {case: run_case(args, Path(scratch) / "model", case, folders[case]) for case in order}
            )
            print(
                f"round {index + 1} of {args.rounds} is done, load {os.getloadavg()[0]:.1f}", file=sys.stderr
            )
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
          f"{parameters:,} parameters, {args.rounds} rounds of {args.steps} steps")
    print("\n".join(table(rounds)))
    result = compare(rounds)
    for case, x in result.items():
        print(f"{case} scaling: {x['ratio_min']:.2f} / {x['ratio_median']:.2f} / {x['ratio_max']:.2f} times the tokens per "
              f"second (min / median / max), efficiency {x['efficiency_median']:.2f}")
    line = (
        {"bench": "scaling"}
        | result
        | vars(args)
        | {"parameters": parameters, "threads": 1, "cores": os.cpu_count()}
    )
    line |= {"repetitions": args.rounds * args.steps, "torch": torch.__version__}
    print(json.dumps(line | {case: {k: round(v, 4) for k, v in x.items()} for case, x in result.items()}))


if __name__ == "__main__":
    worker(*sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main(sys.argv[1:])
