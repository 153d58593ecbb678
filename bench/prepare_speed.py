"""Records per second and peak memory of `python data.py prepare` on files of the paper's size.

    python bench/prepare_speed.py                               70,000 records made from the demo's tools
    python bench/prepare_speed.py --data ../shared/data/train   the same number, repeating genuine records

Every record gets its own id, query and values, so that none is a duplicate. Nothing is kept.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

from timing import ROOT, machine, run_process, table_row

sys.path.insert(0, str(ROOT))

from corpus.synthetic import synthetic  # noqa: E402

GENUINE = ("xlam_rawformat_repacked.json", "toolace_first100_rawformat_reconstructed.json")
FILLER = "It takes the values described below and returns a JSON object; see the provider's pages for more. "
SYSTEM = "Here is a list of functions in JSON format that you can invoke:\n{}. \nAnswer as [f(name=value)]\n"


def fresh(value: object, i: int) -> object:
    """Another value of the same type."""
    if isinstance(value, str):
        return f"{value} {i}"
    return value + i if type(value) in (int, float) else value


def xlam_records(records: list[dict], count: int) -> Iterator[dict]:
    """`count` records in xLAM's layout, by going round `records` with fresh ids, queries and values."""
    answers = [json.loads(record["answers"]) for record in records]
    for i, (record, calls) in enumerate(islice(cycle(zip(records, answers)), count)):
        own = [{k: fresh(v, i) for k, v in call["arguments"].items()} for call in calls]
        calls = [{**call, "arguments": arguments} for call, arguments in zip(calls, own)]
        query = f"{record['query']} (case {i})"
        yield {"id": i, "query": query, "answers": json.dumps(calls), "tools": record["tools"]}


def toolace_records(records: list[dict], count: int) -> Iterator[dict]:
    """`count` records in ToolACE's layout, with fresh queries and texts in double quotes."""
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
        tools = [{**tool, "description": f"{tool['description']}. {2 * FILLER}"} for tool in example.tools]
        tools = json.dumps(tools)
        calls = [{"name": call.name, "arguments": call.arguments} for call in example.answer]
        query, written = example.messages[0]["content"], []
        for call in calls:
            values = ", ".join(f"{key}={json.dumps(value)}" for key, value in call["arguments"].items())
            written.append(f"{call['name']}({values})")
        xlam.append({"query": query, "answers": json.dumps(calls), "tools": tools})
        turns = {"user": query, "assistant": f"[{', '.join(written)}]", "tool": '{"done": 1}'}
        conversations = [{"from": who, "value": text} for who, text in turns.items()]
        conversations.append({"from": "assistant", "value": FILLER})
        toolace.append({"system": SYSTEM.format(tools), "conversations": conversations})
    return xlam, toolace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, help=f"folder with {' and '.join(GENUINE)}; default: generated records")
    add("--xlam", type=int, default=60_000, help="records in xLAM's layout (default: %(default)s)")
    add("--toolace", type=int, default=10_000, help="records in ToolACE's layout (default: %(default)s)")
    add("--repeats", type=int, default=3, help="of each measurement (default: %(default)s)")
    add("options", nargs="*", help="further options of prepare, after --")
    args = parser.parse_args()
    genuine = [json.loads((args.data / name).read_text()) for name in GENUINE] if args.data else None
    xlam, toolace = genuine or demo_records()
    with tempfile.TemporaryDirectory() as folder:
        sources = {"xlam": xlam_records(xlam, args.xlam), "toolace": toolace_records(toolace, args.toolace)}
        command = ["data.py", "prepare", "--overwrite", "--out", f"{folder}/out", *args.options]
        for name, records in sources.items():
            path = Path(folder) / f"{name}.json"
            path.write_text("[" + ", ".join(map(json.dumps, records)) + "]", encoding="utf-8")
            command += [f"--{name}", str(path)]
        runs = [run_process(command) for _ in range(args.repeats)]
    count = args.xlam + args.toolace
    print(f"{count:,} records from {args.data or 'the demo tools'}, options {args.options}")
    print("| | minimum | median | maximum |\n|---|---|---|---|")
    print(table_row("seconds", [run.wall for run in runs], ".1f"))
    print(table_row("records per second", [count / run.wall for run in runs], ",.0f"))
    print(f"peak memory: {max(run.mib for run in runs):,.0f} MiB (the largest of the runs)\n{machine()}")


if __name__ == "__main__":
    main()
