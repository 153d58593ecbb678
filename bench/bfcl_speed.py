"""How fast `eval_bfcl.py score` is: start-up, rows per second, all cases once; beside the official checker on
request.

    python bench/bfcl_speed.py --golden ../shared/golden/bfcl_verdicts.jsonl.gz --data ../shared/data/bfcl
    … --official FOLDER      the folder that holds bfcl_eval (pip install --no-deps --target FOLDER bfcl-eval)

Every measurement is a process of its own with one thread; the kinds take turns. Seconds are those of the
processor, so other work on the machine hardly counts. Ours reads, judges and writes all reports. The official
checker reads and judges, with our decoding, and writes nothing.
"""

import gzip
import json
import os
import statistics
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

from timing import ROOT, machine, options, run_process

sys.path.insert(0, str(ROOT))

from evals.bfcl_check import LANGUAGES, Problem  # noqa: E402
from evals.bfcl_data import load_problems  # noqa: E402

SCORE = """
import contextlib, io, sys, time
sys.path.insert(0, {root!r})
import eval_bfcl
cpu = time.process_time()
with contextlib.redirect_stdout(io.StringIO()):
    eval_bfcl.main({arguments!r})
print(time.process_time() - cpu)
"""
OFFICIAL = """
import gzip, json, sys, time
sys.path.insert(0, {root!r} + "/bench")
from bfcl_speed import official_checker
from evals import bfcl_check, bfcl_data
checker = official_checker({official!r})
cpu = time.process_time()
problems, valid = bfcl_data.load_problems({data!r}), 0
with gzip.open({golden!r}, "rt") as file:
    rows = [json.loads(line) for line in file]
for row in rows:
    case, calls = problems[row["id"]], bfcl_check.decode(row["output"])
    if "relevance" in case.category or calls is None:
        continue
    if any(not isinstance(*call.values(), dict) for call in calls):
        continue
    valid += checker(case, calls)["valid"]
print(time.process_time() - cpu)
"""


def official_checker(folder: str) -> Callable[[Problem, list[dict]], dict]:
    """The official checker of the bfcl_eval in this folder: (case, decoded calls) -> its result."""
    # The genuine one imports gigabytes of clients.
    models = types.ModuleType("bfcl_eval.constants.model_config")
    models.MODEL_CONFIG_MAPPING = {"m": types.SimpleNamespace(underscore_to_dot=False)}
    sys.modules[models.__name__] = models
    sys.path.insert(0, str(folder))
    with tempfile.TemporaryDirectory() as place:
        os.environ["BFCL_PROJECT_ROOT"] = place  # the import makes folders there
        from bfcl_eval.constants.enums import Language
        from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    def check(case: Problem, calls: list[dict]) -> dict:
        language = Language(LANGUAGES.get(case.category, "python"))
        return ast_checker(case.functions, calls, case.answer, language, case.category, "m")

    return check


def plausible_output(case: Problem) -> str:
    """A reply with the first allowed values, and a thought as long as a trained model's."""
    calls = []
    for call in case.answer:
        for name, wanted in call.items():
            arguments = {key: next((v for v in allowed if v != ""), "") for key, allowed in wanted.items()}
            calls.append({"name": name, "arguments": arguments})
    thought = "The request names all that is needed. " * 8
    return f"<think>{thought}</think><tool_call>{json.dumps(calls)}</tool_call>"


def main() -> None:
    golden, data = "../shared/golden/bfcl_verdicts.jsonl.gz", "../shared/data/bfcl"
    args = options(__doc__, golden=golden, data=data, official="", repeats=7)
    golden, data = str(Path(args.golden).resolve()), str(Path(args.data).resolve())
    with gzip.open(golden, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    problems = load_problems(data).values()
    with tempfile.TemporaryDirectory() as folder:
        once, several = Path(folder) / "once.jsonl", Path(folder) / "several.jsonl.gz"
        with gzip.open(several, "wt", encoding="utf-8") as file:  # ids repeat: each is a sample
            file.writelines(json.dumps(row | {"sample": i}) + "\n" for i, row in enumerate(rows))
        outputs = [json.dumps({"id": case.id, "output": plausible_output(case)}) for case in problems]
        once.write_text("\n".join(outputs) + "\n")
        score = ["score", "--data", data, "--out", folder, "--predictions"]
        codes = {
            f"score, {len(rows):,} golden rows": (SCORE, [*score, str(several)], len(rows)),
            f"score, {len(problems):,} cases": (SCORE, [*score, str(once)], len(problems)),
        }
        if args.official:
            codes[f"official checker alone, {len(rows):,} golden rows"] = (OFFICIAL, [], len(rows))
        names = {"root": str(ROOT), "data": data, "golden": golden, "official": args.official}
        seconds: dict[str, list[float]] = {name: [] for name in ("start (--help)", *codes)}
        for _ in range(args.repeats):
            seconds["start (--help)"].append(run_process(["eval_bfcl.py", "--help"]).cpu)
            for name, (code, arguments, _) in codes.items():
                done = run_process(["-c", code.format(arguments=arguments, **names)])
                seconds[name].append(float(done.output.split()[-1]))
    print("| | processor s, minimum | median | rows/s at the median |\n|---|---|---|---|")
    for name, taken in seconds.items():
        rate = f"{codes[name][2] / statistics.median(taken):,.0f}" if name in codes else ""
        print(f"| {name} | {min(taken):.3f} | {statistics.median(taken):.3f} | {rate} |")
    print(f"{args.repeats} turns; {machine()}")


if __name__ == "__main__":
    main()
