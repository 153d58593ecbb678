"""How fast `eval_bfcl.py score` is: start-up, rows per second, and all cases once; beside the official
checker on request.

    python bench/bfcl_speed.py --golden ../shared/golden/bfcl_verdicts.jsonl.gz --data ../shared/data/bfcl
    … --official FOLDER      the folder that holds bfcl_eval (pip install --no-deps --target FOLDER bfcl-eval)

Every measurement is a process of its own with one thread; the kinds take turns. Seconds are those of the
processor, so other work on the machine hardly counts; the wall clock's minimum stands beside them. Ours
reads, judges and writes all reports. The official checker reads and judges, with our decoding, and writes
nothing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evals.bfcl_check import Problem
from evals.bfcl_data import load_problems

SCORE = """
import contextlib, io, sys, time
sys.path.insert(0, {root!r})
import eval_bfcl
cpu, wall = time.process_time(), time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()):
    eval_bfcl.main({arguments!r})
print(time.process_time() - cpu, time.perf_counter() - wall)
"""
OFFICIAL = """
import gzip, json, sys, time, types
sys.path[:0] = [{official!r}, {root!r}]
models = types.ModuleType("bfcl_eval.constants.model_config")  # the genuine one imports gigabytes of clients
models.MODEL_CONFIG_MAPPING = {{"m": types.SimpleNamespace(underscore_to_dot=False)}}
sys.modules[models.__name__] = models
from bfcl_eval.constants.enums import Language
from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
import bfcl_check, bfcl_data
languages = {{"simple_java": Language.JAVA, "simple_javascript": Language.JAVASCRIPT}}
cpu, wall = time.process_time(), time.perf_counter()
problems, valid = bfcl_data.load_problems({data!r}), 0
with gzip.open({golden!r}, "rt") as file:
    rows = [json.loads(line) for line in file]
for row in rows:
    case, calls = problems[row["id"]], bfcl_check.decode(row["output"])
    if "relevance" in case.category or calls is None or any(not isinstance(*call.values(), dict) for call in calls):
        continue
    language = languages.get(case.category, Language.PYTHON)
    valid += ast_checker(case.functions, calls, case.answer, language, case.category, "m")["valid"]
print(time.process_time() - cpu, time.perf_counter() - wall)
"""


def plausible_output(case: Problem) -> str:
    """A reply with the expected calls and the first allowed values, and a thought as long as a trained
    model's.
    """
    calls = [
        {
            "name": name,
            "arguments": {key: next((v for v in allowed if v != ""), "") for key, allowed in wanted.items()},
        }
        for call in case.answer
        for name, wanted in call.items()
    ]
    return f"<think>{'The request names all that is needed. ' * 8}</think><tool_call>{json.dumps(calls)}</tool_call>"


def measure(code_or_arguments: str | list[str]) -> tuple[float, float]:
    """(processor, wall) seconds of one Python process; of code, the seconds that it prints itself, without
    its start.
    """
    wall, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    tail = ["-c", code_or_arguments] if isinstance(code_or_arguments, str) else code_or_arguments
    environment = os.environ | {"BFCL_PROJECT_ROOT": tempfile.gettempdir()}
    done = subprocess.run([sys.executable, *tail], cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"a measured process failed: {done.stderr.strip()[-500:]}")
    if isinstance(code_or_arguments, str):
        own, passed = map(float, done.stdout.split()[-2:])
        return own, passed
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime - cpu.ru_utime - cpu.ru_stime, time.perf_counter() - wall


def main() -> None:
    """Measures in turn and prints one table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--golden", type=Path, required=True, help="bfcl_verdicts.jsonl.gz")
    parser.add_argument("--data", type=Path, required=True, help="folder with BFCL_v4_*.json")
    parser.add_argument("--official", type=Path, help="folder that holds the package bfcl_eval")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    golden, data = str(args.golden.resolve()), str(args.data.resolve())
    with gzip.open(golden, "rt", encoding="utf-8") as file:
        rows = sum(1 for _ in file)
    problems = load_problems(data).values()
    with tempfile.TemporaryDirectory() as folder:
        once = f"{folder}/once.jsonl"
        Path(once).write_text(
            "".join(json.dumps({"id": p.id, "output": plausible_output(p)}) + "\n" for p in problems)
        )
        command = ["score", "--data", data, "--out", folder, "--predictions"]
        names = {"root": str(ROOT), "data": data, "golden": golden}
        kinds = {
            "start (--help)": (["eval_bfcl.py", "--help"], 0),
            f"score, {rows:,} golden rows, with start": (["eval_bfcl.py", *command, golden], rows),
            f"score, {rows:,} golden rows": (
                SCORE.format(root=str(ROOT), arguments=[*command, golden]),
                rows,
            ),
            f"score, {len(problems):,} cases": (
                SCORE.format(root=str(ROOT), arguments=[*command, once]),
                len(problems),
            ),
        }
        if args.official:
            code = OFFICIAL.format(official=str(args.official.resolve()), **names)
            kinds[f"official checker alone, {rows:,} golden rows"] = (code, rows)
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for _ in range(args.repeats):
            for name, (what, _) in kinds.items():
                taken[name].append(measure(what))
    print(
        "| | processor s, minimum | median | rows/s at the median | wall s, minimum |\n|---|---|---|---|---|"
    )
    for name, (_, count) in kinds.items():
        cpu, wall = zip(*taken[name])
        rate = format(count / statistics.median(cpu), ",.0f") if count else ""
        print(f"| {name} | {min(cpu):.3f} | {statistics.median(cpu):.3f} | {rate} | {min(wall):.3f} |")
    load = os.getloadavg()[0]
    print(f"{args.repeats} turns; {platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {load:.1f}; "
          f"Python {platform.python_version()}")


if __name__ == "__main__":
    main()
