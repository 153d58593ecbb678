"""Records per second and peak memory of `python data.py prepare` on files of the paper's size.

    python bench/prepare_speed.py                               70,000 records made from the demo's tools
    python bench/prepare_speed.py --data ../shared/data/train   the same number, repeating genuine records

Every record gets its own id, query and values, so that none is a duplicate. Nothing is kept.
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from corpus.synthetic import synthetic

GENUINE = ("xlam_rawformat_repacked.json", "toolace_first100_rawformat_reconstructed.json")
FILLER = "It accepts the values described below and gives back a JSON object; see the provider's pages for its limits. "
SYSTEM = "Here is a list of functions in JSON format that you can invoke:\n{}. \nAnswer as [func1(params_name=value)]\n"


def fresh(value: object, i: int) -> object:
    """Another value of the same type."""
    if isinstance(value, str):
        return f"{value} {i}"
    return value + i if type(value) in (int, float) else value


def xlam_records(records: list[dict], count: int) -> Iterator[dict]:
    """`count` records in xLAM's layout, by going round `records` with fresh ids, queries and values."""
    answers = [json.loads(record["answers"]) for record in records]
    for i, (record, calls) in enumerate(islice(cycle(zip(records, answers)), count)):
        calls = [
            {**call, "arguments": {k: fresh(v, i) for k, v in call["arguments"].items()}} for call in calls
        ]
        yield {
            "id": i, "query": f"{record['query']} (case {i})", "answers": json.dumps(calls), "tools": record["tools"],
        }


def toolace_records(records: list[dict], count: int) -> Iterator[dict]:
    """`count` records in ToolACE's layout; the texts in double quotes of every call turn get a number,
    too.
    """
    for i, record in enumerate(islice(cycle(records), count)):
        turns = []
        for turn in record["conversations"]:
            text = turn["value"]
            if turn["from"] == "user":
                text += f" (case {i})"
            elif text.startswith("["):
                text = re.sub(r'="([^"\\]*)"', rf'="\1 {i}"', text)
            turns.append({"from": turn["from"], "value": text})
        yield {"system": record["system"], "conversations": turns}


def demo_records() -> tuple[list[dict], list[dict]]:
    """Seed records from the demo's tools, with descriptions as long as those of the genuine files."""
    xlam, toolace = [], []
    for example in synthetic(400, 0, copies=0):
        tools = json.dumps(
            [{**tool, "description": tool["description"] + ". " + 2 * FILLER} for tool in example.tools]
        )
        calls = [{"name": call.name, "arguments": call.arguments} for call in example.answer]
        query = example.messages[0]["content"]
        xlam.append({"query": query, "answers": json.dumps(calls), "tools": tools})
        written = [
            f"{c['name']}({', '.join(f'{k}={json.dumps(v)}' for k, v in c['arguments'].items())})"
            for c in calls
        ]
        turns = (
            ("user", query),
            ("assistant", f"[{', '.join(written)}]"),
            ("tool", '{"done": 1}'),
            ("assistant", FILLER),
        )
        conversations = [{"from": who, "value": text} for who, text in turns]
        toolace.append({"system": SYSTEM.format(tools), "conversations": conversations})
    return xlam, toolace


def write_array(path: Path, records: Iterator[dict]) -> None:
    """A JSON array, one record after the other."""
    with path.open("w", encoding="utf-8") as file:
        for i, record in enumerate(records):
            file.write(("[" if i == 0 else ", ") + json.dumps(record))
        file.write("]")


def once(command: list[str]) -> tuple[float, float]:
    """Runs prepare in its own process: (seconds, peak MiB of the largest of such processes so far)."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"prepare failed: {done.stderr.strip()[-500:]}")
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or "unknown processor"


def main() -> None:
    """Builds the two files, runs prepare several times, and prints minimum, median and maximum."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, help=f"folder with {' and '.join(GENUINE)}")
    parser.add_argument("--xlam", type=int, default=60_000, help="records in xLAM's layout")
    parser.add_argument("--toolace", type=int, default=10_000, help="records in ToolACE's layout")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("options", nargs="*", help="further options of prepare, after --")
    args = parser.parse_args()
    xlam, toolace = (
        [json.loads((args.data / name).read_text()) for name in GENUINE] if args.data else demo_records()
    )
    with tempfile.TemporaryDirectory() as folder:
        x, t = Path(folder) / "xlam.json", Path(folder) / "toolace.json"
        write_array(x, xlam_records(xlam, args.xlam))
        write_array(t, toolace_records(toolace, args.toolace))
        size = (x.stat().st_size + t.stat().st_size) / 2**20
        command = [sys.executable, "data.py", "prepare", "--xlam", str(x), "--toolace", str(t), "--overwrite"]
        runs = [once([*command, "--out", f"{folder}/out", *args.options]) for _ in range(args.repeats)]
    count = args.xlam + args.toolace
    seconds, memory = [run[0] for run in runs], max(run[1] for run in runs)
    print(f"{count:,} records, {size:.0f} MiB, from {'genuine records' if args.data else 'the demo tools'}; prepare ran "
          f"{args.repeats} times, options: {' '.join(args.options) or 'none'}")
    print("| | minimum | median | maximum |\n|---|---|---|---|")
    rows = {"seconds": (seconds, ".1f"), "records per second": ([count / s for s in seconds], ",.0f")}
    for name, (values, form) in rows.items():
        row = (min(values), statistics.median(values), max(values))
        print(f"| {name} | {' | '.join(format(value, form) for value in row)} |")
    print(f"peak memory: {memory:,.0f} MiB (the largest of the runs)")
    load = os.getloadavg()[0]
    print(
        f"{processor()}, {os.cpu_count()} cores, load {load:.1f}; Python {platform.python_version()}, {platform.system()}"
    )


if __name__ == "__main__":
    main()
