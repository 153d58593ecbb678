"""prepare: what it promises of its files, its split and its books; and the figures that stats prints."""

import gzip
import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from config import Config
from corpus import prepare
from corpus.describe import COUNTS, LENGTHS, describe, histogram, measure
from corpus.layouts import load_examples
from corpus.sources import DataError
from corpus.tiny_model import build_tiny_tokenizer
from data import load_splits
from prompts import SYSTEM_TEMPLATE, build_messages, encode_prompt, render_calls

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data" / "train"
GENUINE = [
    SHARED / f"{name}.json"
    for name in ("xlam_rawformat_repacked", "toolace_first100_rawformat_reconstructed")
]
ADD = {"name": "add", "description": "Adds.", "parameters": {"a": {"type": "int"}}}
SUB = {"name": "sub", "description": "Takes away.", "parameters": {"b": {"type": "int"}}}


def xlam(rid: int, query: str = "", **changes) -> dict:
    answers = json.dumps([{"name": "add", "arguments": {"a": rid}}])
    return {
        "id": rid,
        "query": query or f"Add {rid}.",
        "tools": json.dumps([ADD, SUB]),
        "answers": answers,
    } | changes


def toolace(rid: int, *texts: str) -> dict:
    """Turns of user, assistant and tool by turns; a call is followed by a tool, a text by a user."""
    turns, after = [], "user"
    for text in texts:
        turns.append({"from": after, "value": text})
        after = {"user": "assistant", "tool": "assistant"}.get(
            after, "tool" if text.startswith("[") else "user"
        )
    return {"id": rid, "system": f"Tools: {json.dumps([ADD])}", "conversations": turns}


def save(path: Path, *records: dict) -> str:
    path.write_text(json.dumps(records))
    return str(path)


def run(out: Path, *arguments: object) -> dict[str, list[dict]]:
    """Runs prepare in this process; every JSONL file that it wrote."""
    prepare.main([*map(str, arguments), "--out", str(out)])
    return {file.name: [json.loads(line) for line in file.open()] for file in out.glob("*.jsonl")}


def manifest(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text())


@pytest.fixture
def sources(tmp_path) -> list[object]:
    """30 good records of xLAM and a bad one; 12 of ToolACE with one step, 6 with two, one without calls. Ids
    are alike.
    """
    x = save(tmp_path / "x.json", *(xlam(i) for i in range(30)), xlam(30, answers="[{"))
    single = [toolace(i, f"go {i}", f"[add(a={i})]", "done", "It is done.") for i in range(12)]
    double = [toolace(i, f"go {i}", f"[add(a={i})]", "1", "So?", "on", "[add(a=0)]") for i in range(12, 18)]
    t = save(tmp_path / "t.json", *single, *double, toolace(18, "hello", "Which number?"))
    return ["--xlam", x, "--toolace", t]


# -------------------------------------------------------------------------------------------------- the files


def test_every_step_is_in_one_file(sources, tmp_path):
    files = run(tmp_path / "out", *sources)
    ids = Counter(row["id"] for name in ("train.jsonl", "test.jsonl") for row in files[name])
    steps = [f"toolace-{i}#{turn}" for i in range(18) for turn in ((1, 5) if i >= 12 else (1,))]
    assert ids == Counter([*(f"xlam-{i}" for i in range(30)), *steps])
    dropped = [
        (Path(row["file"]).name, row["line"], row["id"], row["reason"]) for row in files["dropped.jsonl"]
    ]
    assert dropped == [("x.json", 31, "xlam-30", "broken_json"), ("t.json", 19, "toolace-18", "no_calls")]
    assert all(row["detail"] for row in files["dropped.jsonl"])


def test_training_reads_what_was_prepared(sources, tmp_path):
    run(tmp_path / "out", *sources)
    train, test = (str(tmp_path / f"out/{name}.jsonl") for name in ("train", "test"))
    splits = load_splits(Config(data=train, test_data=test))
    assert len(splits.train) + len(splits.held_out["held_out"]) == 30 + 12 + 6 * 2


EVERYTHING = "--no_call_turns --layouts trl,verl --irrelevance 0.5 --mask 0.5".split()


@pytest.mark.parametrize("options", [[], EVERYTHING])
def test_the_same_inputs_and_options_give_the_same_bytes(sources, tmp_path, options):
    outs = [tmp_path / name for name in ("a", "b")]
    for out in outs:
        run(out, *sources, *options)
    contents = [{file.name: file.read_bytes() for file in out.iterdir()} for out in outs]
    assert contents[0] == contents[1] and len(contents[0]) == 5 + 4 * (options != [])


def test_the_manifest_tells_what_was_made_from_what(sources, tmp_path):
    run(tmp_path / "out", *sources, "--layouts", "trl", "--seed", 5)
    books = manifest(tmp_path / "out")
    assert books["format"] == 1 and books["seed"] == 5 and books["options"]["layouts"] == ["trl"]
    first = books["inputs"][0]
    assert (first["given"], first["bytes"]) == (sources[1], Path(sources[1]).stat().st_size)
    assert first["sha256"] == hashlib.sha256(Path(sources[1]).read_bytes()).hexdigest()
    assert (first["records"], first["examples"], first["dropped"]) == (
        {"xlam": 31},
        {"xlam": 30},
        {"broken_json": 1},
    )
    written = {file.name for file in (tmp_path / "out").iterdir()} - {"manifest.json"}
    assert set(books["outputs"]) == written
    for name, facts in books["outputs"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert facts == {
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "lines": data.count(b"\n"),
        }
    assert books["versions"]["python"] and books["versions"]["transformers"]


def test_ids_of_several_files_never_meet(tmp_path):
    a, b = save(tmp_path / "a.json", xlam(1)), save(tmp_path / "b.json", xlam(1, "Add one."))
    files = run(tmp_path / "out", "--xlam", a, "--xlam", b, "--data", b, "--test_share", 0)
    assert [row["id"] for row in files["train.jsonl"]] == ["xlam-1", "xlam2-1"] and "test.jsonl" not in files
    [row] = files["dropped.jsonl"]
    assert (row["id"], row["reason"]) == ("data-1", "duplicate") and row["detail"].endswith("as xlam2-1")


@pytest.mark.parametrize("layout", ["trl", "verl"])
@pytest.mark.parametrize("parquet", [False, True])
def test_layouts_hold_the_same_examples(sources, tmp_path, monkeypatch, capsys, layout, parquet):
    if parquet:
        pytest.importorskip("pyarrow")
    else:
        monkeypatch.setattr("prepare.importlib.util.find_spec", lambda name: None)
    out = tmp_path / "out"
    run(out, *sources, "--layouts", layout, "--no_call_turns")
    suffix = "parquet" if parquet and layout == "verl" else "jsonl"
    for name in ("train", "test"):
        assert load_examples(out / f"{layout}_{name}.{suffix}") == load_examples(out / f"{name}.jsonl")
    assert ("Parquet needs pyarrow" in capsys.readouterr().out) == (layout == "verl" and not parquet)


# -------------------------------------------------------------------------------------------------- the split


def test_a_tenth_of_the_records_is_held_out_and_no_record_is_in_both(sources, tmp_path):
    files = run(tmp_path / "out", *sources)
    train, test = ({row["id"].split("#")[0] for row in files[f"{name}.jsonl"]} for name in ("train", "test"))
    assert len(train) == 43 and len(test) == 5 and not train & test
    again = run(tmp_path / "again", *sources, "--seed", 1)
    assert {row["id"].split("#")[0] for row in again["test.jsonl"]} != test


def test_another_file_moves_few_records_between_the_parts():
    """So two people who prepare slightly different mixtures test on nearly the same records."""
    keys = [f"xlam-{i}" for i in range(2000)]
    before = prepare.held_out_records(keys, 0.1, 0)
    after = prepare.held_out_records([*keys, *(f"toolace-{i}" for i in range(200))], 0.1, 0)
    assert len(before) == 200 and len(after) == 220 and len(before - after) < 20


def test_augmentation_leaves_the_test_part_as_it_is(sources, tmp_path):
    plain = run(tmp_path / "plain", *sources)
    files = run(tmp_path / "out", *sources, "--irrelevance", 1, "--mask", 1)
    assert files["test.jsonl"] == plain["test.jsonl"]
    added = [row for row in files["train.jsonl"] if "#irrelevant" in row["id"]]
    of_xlam = sum(
        row["source"] == "xlam" for row in plain["train.jsonl"]
    )  # ToolACE's records here have one tool only
    assert len(added) == of_xlam and all(row["answer"] == [] for row in added)
    assert len(files["train.jsonl"]) == len(plain["train.jsonl"]) + len(added)
    assert all("#masked" in row["id"] for row in files["train.jsonl"])
    assert manifest(tmp_path / "out")["augmented"]["irrelevant"] == len(added)


# ----------------------------------------------------------------------------------------- counts and reasons


def test_the_table_counts_records_and_examples_as_the_paper_does(sources, tmp_path, capsys):
    run(tmp_path / "out", *sources)
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines if line.startswith(("xLAM", "ToolACE"))]
    assert ["xLAM", "single", "31", "30", "60,000", "60,000"] in table
    assert [
        "ToolACE",
        "single-turn",
        "13",
        "12",
        "10,500",
        "8,183",
    ] in table  # the record without calls has one user turn
    assert ["ToolACE", "multi-turn", "6", "12", "800", "1,470"] in table
    assert any("the paper's Table 1" in line for line in lines)
    assert ["broken_json", "1", "0"] in [line.split() for line in lines]


def test_genuine_files(tmp_path, capsys):
    if not all(path.exists() for path in GENUINE):
        pytest.skip("shared/data/train is not beside this checkout")
    files = run(tmp_path / "out", "--xlam", GENUINE[0], "--toolace", GENUINE[1])
    assert Counter(row["reason"] for row in files["dropped.jsonl"]) == {
        "unknown_tool": 20, "wrong_type": 11, "unparsable_calls": 1, "no_calls": 1,
    }
    books = manifest(tmp_path / "out")["inputs"]
    assert [one["examples"] for one in books] == [{"xlam": 211}, {"toolace_single": 22, "toolace_multi": 129}]
    files = run(tmp_path / "kept", "--xlam", GENUINE[0], "--toolace", GENUINE[1], "--keep", "wrong_type")
    assert len(files["train.jsonl"]) + len(files["test.jsonl"]) == 213 + 160
    files = run(tmp_path / "texts", "--toolace", GENUINE[1], "--no_call_turns")
    assert sum(not row["answer"] for name in ("train", "test") for row in files[f"{name}.jsonl"]) == 295
    assert sum(row["reason"] == "unclear_turn" for row in files["dropped.jsonl"]) == 2  # both are empty


def test_long_prompts_are_dropped_where_there_is_a_tokenizer(tmp_path):
    tokenizer = build_tiny_tokenizer([], 259)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "template.txt").write_text("{tools}")
    x = save(tmp_path / "x.json", xlam(1), xlam(2, "long " * 99))
    options = [
        "--tokenizer",
        tmp_path / "tokenizer",
        "--prompt_template",
        tmp_path / "template.txt",
        "--test_share",
        0,
    ]
    files = run(tmp_path / "out", "--xlam", x, *options, "--max_prompt_tokens", 400)
    [example] = load_examples(tmp_path / "out/train.jsonl")[0]
    [dropped] = files["dropped.jsonl"]
    assert (example.id, dropped["id"], dropped["reason"]) == ("xlam-1", "xlam-2", "too_long")
    tokens = len(encode_prompt(tokenizer, example.messages, example.tools, "{tools}"))
    statistics = json.loads((tmp_path / "out/statistics.json").read_text())
    assert statistics["train"]["prompt tokens"]["max"] == tokens
    # Names that are masked can become longer.
    files = run(
        tmp_path / "masked", "--xlam", x, *options, "--max_prompt_tokens", tokens, "--mask", 1,
        "--irrelevance", 1,
    )
    assert [row["id"] for row in files["train.jsonl"]] == ["xlam-1#irrelevant#masked"]
    assert [row["reason"] for row in files["dropped.jsonl"]] == ["too_long"] * 2


# --------------------------------------------------------------------------------------- nothing half-written


def test_a_prepared_set_is_replaced_only_on_request(sources, tmp_path):
    out = tmp_path / "out"
    run(out, *sources, "--layouts", "trl")
    (out / "notes.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(DataError, match="out holds a prepared set already .*--overwrite"):
        run(out, *sources)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    run(out, *sources, "--seed", 1, "--overwrite")
    left = {file.name for file in out.iterdir()}
    assert left == {
        "notes.txt",
        "train.jsonl",
        "test.jsonl",
        "dropped.jsonl",
        "statistics.json",
        "manifest.json",
    }
    assert manifest(out)["seed"] == 1


@pytest.mark.parametrize("phase", ["measure", "split", "write_layout", "manifest"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_the_folder_as_it_was(sources, tmp_path, monkeypatch, phase, error):
    fresh, old = tmp_path / "fresh", tmp_path / "old"
    run(old, *sources)
    before = {file.name: file.read_bytes() for file in old.iterdir()}

    def stop(*_):
        raise error

    monkeypatch.setattr(prepare, phase, stop)
    for out, options in ((fresh, []), (old, ["--overwrite"])):
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else DataError):
            run(out, *sources, "--layouts", "trl", *options)
    assert not fresh.exists() and {file.name: file.read_bytes() for file in old.iterdir()} == before


def test_a_run_killed_while_it_publishes_leaves_no_manifest(sources, tmp_path, monkeypatch):
    out, moved = tmp_path / "out", []
    run(out, *sources)
    monkeypatch.setattr("prepare.os.replace", lambda a, b: moved.append(b) if len(moved) < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(out, *sources, "--overwrite")
    assert not (out / "manifest.json").exists()


def test_a_full_disk_is_noticed_at_the_start(sources, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr("prepare.shutil.disk_usage", lambda path: usage)
    with pytest.raises(DataError, match="out: about 0 MiB are needed and 0 free; choose another disk"):
        run(tmp_path / "out", *sources)


# --------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "prepare: no input; give --xlam FILE, --toolace FILE, --data FILE or several of them"),
        (["--xlam", "missing.json"], "missing.json does not exist; check the path"),
        (
            ["--xlam", "t.json"],
            "t.json:1: the layout is that of toolace, not of xlam; give another file or option",
        ),
        (["--data", "bad.json"], "prepare: no example is left to train on; dropped: {'broken_json': 1}"),
        (
            ["--xlam", "x.json", "--keep", "typo"],
            "prepare: --keep: unknown typo; known are missing_argument, wrong_type",
        ),
        (
            ["--xlam", "x.json", "--layouts", "trl,csv"],
            "prepare: --layouts: unknown csv; known are trl, verl",
        ),
        (
            ["--xlam", "x.json", "--test_share", "1"],
            "prepare: --test_share must be a share from 0 to 1, not 1.0",
        ),
        (["--xlam", "x.json", "--mask", "nan"], "prepare: --mask must be a share from 0 to 1, not nan"),
        (["--xlam", "x.json", "--max_prompt_tokens", "0"], "prepare: --max_prompt_tokens must be at least 1"),
        (
            ["--xlam", "x.json", "--sed", "1"],
            "prepare: unrecognized arguments: --sed 1; see python data.py prepare --help",
        ),
        (["--xlam", "x.json", "--prompt_template", "no.txt"], "prompt_template: cannot read no.txt"),
    ],
)
def test_a_mistake_is_one_sentence(sources, tmp_path, monkeypatch, arguments, complaint):
    save(tmp_path / "bad.json", xlam(1, answers="[{"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        run(tmp_path / "out", *arguments)
    assert (
        complaint in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    )


def test_the_command_line(sources, tmp_path):
    """One subprocess of each command: what a user sees."""

    def data_py(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "data.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, encoding="utf-8")

    done = data_py("prepare", *sources, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (
        0,
        "",
    ) and "2 dropped records and steps are listed" in done.stdout
    done = data_py("stats", tmp_path / "out/train.jsonl")
    assert (done.returncode, done.stderr) == (0, "") and "prompt characters: min " in done.stdout
    done = data_py("prepare", *sources, "--out", tmp_path / "out")
    assert (
        (done.returncode, done.stdout) == (1, "")
        and done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
    )


# ------------------------------------------------------------------------------------------------- statistics


def test_histograms_count_every_value_once():
    values = [0, 31, 32, 63, 64, 100, 10**9]
    one = histogram(values, LENGTHS)
    assert (one["min"], one["median"], one["max"]) == (0, 63, 10**9)
    assert {name: count for name, count in one["bins"].items() if count} == {
        "0-31": 2,
        "32-63": 2,
        "64-127": 2,
        "65536-": 1,
    }
    assert histogram([2, 4], COUNTS)["bins"] == {"2": 1, "3": 0, "4": 1}
    assert histogram([], COUNTS) == {"bins": {}}


def test_sizes_are_those_of_the_prompt_that_the_model_sees(sources, tmp_path):
    run(tmp_path / "out", *sources)
    examples = load_examples(tmp_path / "out/train.jsonl")[0]
    tokenizer = build_tiny_tokenizer([], 259)
    for example in examples[:3]:
        chat = build_messages(example.messages, example.tools)
        size = measure(example, SYSTEM_TEMPLATE)
        assert size.prompt == sum(len(message["content"]) for message in chat)
        assert (size.answer, size.tools, size.calls) == (
            len(render_calls(example.answer)),
            len(example.tools),
            1,
        )
        assert measure(example, SYSTEM_TEMPLATE, tokenizer).prompt == len(
            encode_prompt(tokenizer, example.messages, example.tools)
        )
    described = describe([measure(example, "{tools}") for example in examples], "characters")
    assert (
        described["examples"]
        == sum(described["kinds"].values())
        == sum(described["sources"].values())
        == len(examples)
    )
    assert described["calls per answer"]["bins"] == {"1": len(examples)}


def test_gzipped_inputs_are_read_too(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(xlam(i)) + "\n" for i in range(10)).encode())
    )
    files = run(tmp_path / "out", "--data", tmp_path / "x.jsonl.gz")
    assert len(files["train.jsonl"]) == 9 and len(files["test.jsonl"]) == 1
