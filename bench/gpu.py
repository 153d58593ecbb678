"""What only a GPU can tell: is it right, does it learn, how near is it to what the card can do, against TRL?

    python bench/gpu.py [--stages numerics,run,speed,trl] [--minutes 9] [--out runs/gpu.jsonl]
    python bench/gpu.py --table runs/gpu.jsonl      the results of such a file as Markdown tables
    python bench/gpu.py --tiny      without CUDA: runs every line of it; its figures mean nothing

Models have random weights in the shapes of Qwen2.5, and run as grpo.py runs them. Every result is printed and
written to --out (JSON lines) at once; a stage ends with a line of JSON. Each part is a process of its own:
what fails, hangs or would not fit into the time is a result too, and costs the others nothing. The exit code
is 1 if a check or measurement failed. bench/README.md says what each figure means.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not start CUDA here

from common import ROOT  # noqa: E402, I001 - before torch: it sets up the allocator
import torch  # noqa: E402
import transformers  # noqa: E402
from gpu_measure import Session, attempt, emit, measure_rates, short  # noqa: E402
from gpu_speed import CASES, judged, profiles, speed  # noqa: E402

from corpus.sources import read_jsonl  # noqa: E402
from kernel.attention import attention_backend  # noqa: E402
from rollout import PEAK_TFLOPS  # noqa: E402

sys.path.append(str(ROOT / "tests/gpu"))
from numerics import checks  # noqa: E402

# Rise of greedy accuracy in the demo, minimum and maximum of eight seeds on a CPU: README.md, Results.
CPU_RISE = {"": (0.427, 0.573), "strict_": (0.373, 0.480)}
GRACE = 8.0  # seconds that a process has to end in order


def machine(session: Session) -> dict:
    """The card, versions, and the rates that every floor is made of."""
    cuda = session.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else "CPU"
    peak = next((tera for part, tera in PEAK_TFLOPS.items() if part in name), 0.0)
    session = measure_rates(session)
    return {
        "card": name, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
        "cuda": torch.version.cuda, "transformers": transformers.__version__,
        "attention": attention_backend(session.device),
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else 0.0,
        "copy_gb_per_s": session.copy_rate / 1e9, "matrix_tflops": session.matrix_rate / 1e12,
        "datasheet_tflops": peak, "meaningless": session.tiny or not cuda,
    }


def numerics(session: Session) -> None:
    """The checks of tests/gpu: everything in the product's precision against fp32, on uneven groups."""
    for name, check in checks(session).items():
        attempt(session, "numerics", name, lambda session, check=check: check(), needs=5)


# ------------------------------------------------------------------------------------------- other programs


def command(session: Session, words: list, log: Path, until: Callable[[], bool] | None = None) -> int:
    """Runs Python with these words and returns its exit code. It is killed at once when `until` says so, and
    asked to end shortly before the session's deadline. What it printed is shown if it failed.
    """
    with log.open("w") as file:
        started = [sys.executable, *map(str, words)]
        process = subprocess.Popen(started, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    while process.poll() is None and session.left() > GRACE:
        if until and until():
            process.kill()
        time.sleep(0.05)
    process.terminate()  # nothing where it has ended; if it does not, it is killed with this process
    code = process.wait()
    if code not in (0, -signal.SIGKILL):
        said = log.read_text(errors="replace")[-3000:]
        print(f"$ python {shlex.join(started[1:])}: {code}\n{said}", flush=True)
    return code


def demo(session: Session) -> dict:
    """The demo on this device: killed at its first checkpoint, gone on with by torchrun, to its end.

    A rise inside the CPU's spread of seeds says that CUDA learns as well.
    """
    folder, log, start = session.folder / "demo", session.folder / "demo.log", time.perf_counter()
    config = "--config configs/tiny.yaml --save_every 10"
    if session.tiny:
        config += " --save_every 1 --steps 2 --warmup_steps 2 --synthetic_train 16 --eval_cases 1"
        config += " --prompts_per_step 2 --minibatch_prompts 2 --group_size 2"
    settings = [*config.split(), "--run_dir", folder]
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=1 grpo.py".split()
    begun = ["grpo.py", *settings, "--overwrite", "true"]
    killed = command(session, begun, log, until=(folder / "latest").exists) == -signal.SIGKILL
    resumed = command(session, [*torchrun, *settings, "--resume", "true"], log) == 0
    lines, end = folder / "log.jsonl", folder / "summary.json"
    rows = [row for row in read_jsonl(lines) if "reward" in row] if lines.exists() else []
    summary = json.loads(end.read_text()) if end.exists() else {}
    columns = {"step": "step", "reward": "reward", "length": "completions/mean_length", "kl": "kl"}
    columns["gap"] = "sampling/sampling_logp_difference/mean"
    some = rows[:: max(1, len(rows) // 20)]
    curve = {name: [float(f"{row.get(key, math.nan):.3g}") for row in some] for name, key in columns.items()}
    finite = all(math.isfinite(row["loss"]) for row in rows)
    figures = {"killed": killed, "resumed": resumed, "finite": finite, "steps": len(rows), "curve": curve}
    for kind, spread in CPU_RISE.items() if summary else ():
        before, after = (summary[f"{kind}accuracy_{when}"] for when in ("before", "after"))
        figures |= {f"{kind}before": before, f"{kind}after": after, f"{kind}rise": after - before}
        figures |= {f"{kind}cpu_rise": spread, f"{kind}inside": spread[0] <= after - before <= spread[1]}
    passed = killed and resumed and bool(summary) and finite
    return figures | {"wall_s": time.perf_counter() - start, "passed": passed}


def against_trl(session: Session) -> dict:
    """bench/step_vs_trl.py on this device, the two in turn."""
    if missing := [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]:
        return {"skipped": f"{' and '.join(missing)} not installed; bench/README.md says what to bring along"}
    case, log = "--case 1000/150/8 --prompts 8 --rounds 2 --micro_batch 4800 --trl_batch 4", "trl.log"
    if session.tiny:
        case = "--case 16/4/2 --prompts 2 --rounds 1"
    words = ["bench/step_vs_trl.py", *case.split(), "--device", session.device.type]
    code = command(session, words, session.folder / log)
    lines = (session.folder / log).read_text(errors="replace").splitlines()
    if code or not lines:
        return {"error": f"step_vs_trl.py ended with code {code}: {''.join(lines[-1:])[:200]}"}
    return judged(json.loads(lines[-1]), "ratio_median", 3.0)


# ----------------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Part:
    """What one process does, in so many seconds and what those before it left over; it may make attempts of
    its own.
    """

    function: Callable[[Session], dict | None]
    seconds: float


STAGES = {  # in this order, most important first
    "machine": {"rates": Part(machine, 30)},
    "numerics": {"checks": Part(numerics, 150)},
    "run": {"demo": Part(demo, 200)},
    "speed": {name: Part(partial(speed, name=name), case.limit) for name, case in CASES.items()},
    "trl": {"step": Part(against_trl, 85)},
    "profile": {"1.5B": Part(profiles, 90)},
}
USUAL = "numerics,run,speed,trl"
TOGETHER = {"numerics": "checks", "run": "demo"}  # no speed is told by them, so they may share the GPU


def start(session: Session, stage: str, name: str, due: float) -> tuple[Session, multiprocessing.Process]:
    """Starts a part in a process, and the session as it is for this part: with a deadline of its own."""
    session = replace(session, deadline=min(session.deadline, due))
    context = multiprocessing.get_context("fork")  # which needs no imports
    process = context.Process(target=work, args=(session, stage, name))
    process.start()
    return session, process


def finish(stage: str, name: str, session: Session, process: multiprocessing.Process) -> None:
    """Waits until a part is done, a little longer than its deadline; reports it if it did not end well."""
    process.join(max(0.0, session.left()) + GRACE)
    code = process.exitcode
    end(process)
    if code is None:
        emit(session.out, stage, name, {"skipped": "it hung and was ended"})
    elif code:
        emit(session.out, stage, name, {"error": f"its process ended with code {code}"})


def end(process: multiprocessing.Process) -> None:
    """Ends a part and what it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        process.join(GRACE)


def work(session: Session, stage: str, name: str) -> None:
    """The process of a part."""
    os.setpgrp()  # so that what it starts can be ended with it
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # until an attempt can tell
    signal.setitimer(signal.ITIMER_REAL, max(0.01, session.left()))
    cuda = torch.cuda.is_available() or not session.tiny
    session = replace(session, device=torch.device("cuda", 0) if cuda else torch.device("cpu"))
    torch.set_float32_matmul_precision("highest")  # fp32 is what everything is compared with
    transformers.utils.logging.set_verbosity_error()
    attempt(session, stage, name, STAGES[stage][name].function)
    sys.stdout.flush()
    os._exit(0)  # libraries may hang at the end


def run_stages(session: Session, stages: list[str]) -> None:
    """Every part of the stages, and a line of JSON for each stage."""
    due = time.perf_counter() + STAGES["machine"]["rates"].seconds
    finish("machine", "rates", *start(session, "machine", "rates", due))
    measured = read_jsonl(session.out)[0]
    if "copy_gb_per_s" not in measured:
        return
    session = replace(
        session, copy_rate=1e9 * measured["copy_gb_per_s"], matrix_rate=1e12 * measured["matrix_tflops"],
        datasheet=1e12 * measured["datasheet_tflops"],
    )
    running = {}
    try:
        for stage, name in TOGETHER.items():
            if stage in stages:
                limit = STAGES[stage][name].seconds
                running[stage, name] = start(session, stage, name, time.perf_counter() + limit)
        for stage in stages:
            since = time.perf_counter()
            for name, part in STAGES[stage].items():
                if (stage, name) not in running:
                    due = max(due, time.perf_counter()) + part.seconds
                    running[stage, name] = start(session, stage, name, due)
                finish(stage, name, *running[stage, name])
                del running[stage, name]
            told = {"stage": stage, "seconds": round(time.perf_counter() - since)}
            print(json.dumps(told | summary(session.out, stage)), flush=True)  # a fork would print it again
    finally:
        for _, process in running.values():  # after an interrupt
            end(process)


def summary(out: Path, stage: str = "") -> dict:
    """The names of what failed, of what is absent, and of what missed its target, in one stage or in all."""
    rows = [(f"{row['part']}: {row['name']}", row) for row in read_jsonl(out) if stage in ("", row["part"])]
    return {
        "failed": [name for name, row in rows if "error" in row or row.get("passed") is False],
        "missing": [name for name, row in rows if "skipped" in row or "out_of_memory" in row],
        "missed": [name for name, row in rows if False in row.get("targets", {}).values()],
    }


def tables(path: Path) -> str:
    """The results of a file as a Markdown table for every part and kind of result."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in read_jsonl(path):
        groups.setdefault((row.pop("part"), *row), []).append(row)
    parts = []
    for (part, *keys), rows in groups.items():
        lines = [[part, *keys[1:]], ["---"] * len(keys), *([short(row[key]) for key in keys] for row in rows)]
        parts.append("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(parts)


def main(arguments: list[str]) -> int:
    """Runs the stages and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--stages", default=USUAL, help="of these and profile (default: %(default)s)")
    add("--minutes", type=float, default=9.0, help="for all; the rest is skipped (default: %(default)s)")
    add("--out", type=Path, default=ROOT / "runs/gpu.jsonl", help="(default: runs/gpu.jsonl)")
    add("--tiny", action="store_true", help="tiny models, also without a GPU")
    add("--table", type=Path, help="print the results of this file as Markdown")
    args = parser.parse_args(arguments)
    if args.table:
        if not args.table.is_file():
            parser.error(f"--table: there is no file {args.table}")
        print(tables(args.table), end="")
        return 0
    stages = args.stages.split(",")
    if unknown := sorted(set(stages) - set(STAGES)):
        parser.error(f"there is no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device here; --tiny tries the program on the CPU (its figures mean nothing)")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("")
    with tempfile.TemporaryDirectory() as folder:
        session = Session(
            torch.device("cpu"), args.tiny, args.out.resolve(), Path(folder),
            time.perf_counter() + 60 * args.minutes,
        )
        run_stages(session, [stage for stage in STAGES if stage in stages and stage != "machine"])
        told = summary(args.out)
    print(json.dumps({"bench": "gpu", **told, "out": str(args.out)}))
    return 1 if told["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
