"""What the tests of BFCL share: cases, replies and data folders made by hand, and where the real ones lie."""

import ast
import gzip
import inspect
import json
from importlib import import_module
from pathlib import Path

import pytest

import eval_bfcl
from evals.bfcl_check import Problem

SHARED = Path(__file__).parents[2] / "shared"
DATA = SHARED / "data" / "bfcl"
GOLDEN = SHARED / "golden" / "bfcl_verdicts.jsonl.gz"
needs_shared = pytest.mark.skipif(not GOLDEN.exists(), reason="the data in ../shared is absent")


def reply(*calls):
    """A model output that makes calls given as (name, arguments)."""
    listed = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return f"<think>t</think><tool_call>{json.dumps(listed)}</tool_call>"


def problem(declared, allowed, item=None, category="simple_python", required=True):
    """A case whose one function `f` has one parameter `p`."""
    details = {"type": declared, "description": "d", **({"items": {"type": item}} if item else {})}
    parameters = {"type": "dict", "properties": {"p": details}, "required": ["p"] if required else []}
    function = {"name": "f", "description": "F.", "parameters": parameters}
    messages, answer = [{"role": "user", "content": "q"}], [{"f": {"p": allowed}}]
    return Problem("simple_python_0", category, messages, [function], answer)


def gold_steps(scenario):
    """Per turn a reply for every gold call, which the package writes as Python text."""
    from evals.bfcl_multi_turn import package  # here, because it needs bfcl-eval

    methods = {}
    for world in scenario.entry["involved_classes"]:
        module = import_module(package().execution.CLASS_FILE_PATH_MAPPING[world])
        methods |= dict(inspect.getmembers(getattr(module, world), inspect.isfunction))

    def step(text):
        call = ast.parse(text, mode="eval").body
        names = list(inspect.signature(methods[call.func.id]).parameters)[1:]
        values = dict(zip(names, call.args)) | {keyword.arg: keyword.value for keyword in call.keywords}
        return reply((call.func.id, {name: ast.literal_eval(value) for name, value in values.items()}))

    return [[step(text) for text in turn] for turn in scenario.answer]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def write_data(folder, version="v4", name="simple_python", count=2, suffix="json"):
    """A data folder with `count` cases f(p=1)."""
    case = problem("integer", [1])
    ids = [f"{name}_{i}" for i in range(count)]
    questions = [{"id": i, "question": [case.messages], "function": case.functions} for i in ids]
    write_jsonl(folder / f"BFCL_{version}_{name}.{suffix}", questions)
    answers = [{"id": i, "ground_truth": case.answer} for i in ids]
    write_jsonl(folder / "possible_answer" / f"BFCL_{version}_{name}.{suffix}", answers)
    return folder


RIGHT = {"id": "simple_python_0", "output": reply(("f", {"p": 1}))}
WRONG = {"id": "simple_python_1", "output": reply(("f", {"p": 2}))}


def score(tmp_path, rows, data, *options, main=eval_bfcl.main):
    """Runs `score` of a script on rows; returns a reader for the .json and .jsonl files that it writes."""
    predictions, out = write_jsonl(tmp_path / "p.jsonl.gz", rows), tmp_path / "o"
    paths = ["--predictions", str(predictions), "--data", str(data), "--out", str(out)]
    assert main(["score", *paths, *options]) == 0

    def read(name):
        text = (out / name).read_text()
        return json.loads(text) if name.endswith(".json") else [json.loads(row) for row in text.splitlines()]

    return read
