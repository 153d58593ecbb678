"""prepare: what it promises of its files, its split and its counts; and the figures that stats prints."""

import json
from collections import Counter
from pathlib import Path

import pytest

from config import Config, UserError
from corpus import prepare
from corpus.examples import hold_out
from corpus.layouts import load_examples
from corpus.sources import DataError, file_sha256
from corpus.tiny_model import build_tiny_tokenizer
from data import load_splits
from model import load_tokenizer
from prompts import SYSTEM_TEMPLATE, build_messages, encode_prompt

SHARED = Path(__file__).parents[2] / "shared" / "data" / "train"
ADD = {"name": "add", "description": "Adds.", "parameters": {"a": {"type": "int"}}}
SUB = {"name": "sub", "description": "Takes away.", "parameters": {"b": {"type": "int"}}}


def xlam(rid: int, query: str = "", **changes) -> dict:
    answers = json.dumps([{"name": "add", "arguments": {"a": rid}}])
    row = {"id": rid, "query": query or f"Add {rid}.", "tools": json.dumps([ADD, SUB]), "answers": answers}
    return row | changes


def toolace(rid: int, *texts: str) -> dict:
    """Turns of user, assistant and tool by turns; a call is followed by a tool, a text by a user."""
    turns, who = [], "user"
    for text in texts:
        turns.append({"from": who, "value": text})
        after_assistant = "tool" if text.startswith("[") else "user"
        who = after_assistant if who == "assistant" else "assistant"
    return {"id": rid, "system": f"Tools: {json.dumps([ADD])}", "conversations": turns}


def save(path: Path, *records: dict) -> str:
    path.write_text(json.dumps(records))
    return str(path)


def run(out: Path, *arguments: object) -> dict[str, list[dict]]:
    """Runs prepare in this process; every JSONL file that it wrote."""
    prepare.main([*map(str, arguments), "--out", str(out)], load_tokenizer)
    return {file.name: [json.loads(line) for line in file.open()] for file in out.glob("*.jsonl")}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def records(ids) -> set[str]:
    return {rid.split("#")[0] for rid in ids}


@pytest.fixture
def sources(tmp_path) -> list[str]:
    """30 good records of xLAM and a bad one; of ToolACE 12 with one step, 6 with two, and one without calls.
    Ids are alike.
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
    dropped = [(Path(r["file"]).name, r["line"], r["id"], r["reason"]) for r in files["dropped.jsonl"]]
    assert dropped == [("x.json", 31, "xlam-30", "broken_json"), ("t.json", 19, "toolace-18", "no_calls")]
    assert all(row["detail"] for row in files["dropped.jsonl"])


@pytest.mark.parametrize("options", ["", "--no_call_turns --layouts trl,verl --irrelevance 0.5 --mask 0.5"])
def test_the_same_inputs_and_options_give_the_same_bytes(sources, tmp_path, options):
    outs = [tmp_path / name for name in ("a", "b")]
    for out in outs:
        run(out, *sources, *options.split())
    assert contents(outs[0]) == contents(outs[1]) and len(contents(outs[0])) == 5 + 4 * bool(options)


def test_the_manifest_tells_what_was_made_from_what(sources, tmp_path):
    out = tmp_path / "out"
    run(out, *sources, "--layouts", "trl", "--seed", 5)
    facts = json.loads((out / "manifest.json").read_text())
    assert facts["options"]["seed"] == 5 and facts["options"]["layouts"] == ["trl"]
    first = facts["inputs"][0]
    assert (first["given"], first["sha256"]) == (sources[1], file_sha256(Path(sources[1])))
    assert (first["records"], first["examples"]) == ({"xlam": 31}, {"xlam": 30})
    assert first["dropped"] == {"broken_json": 1}
    made = [file for file in out.iterdir() if file.name != "manifest.json"]
    assert facts["outputs"] == {file.name: file_sha256(file) for file in made}


def test_ids_of_several_files_never_meet(tmp_path):
    a, b = save(tmp_path / "a.json", xlam(1)), save(tmp_path / "b.json", xlam(1, "Add one."))
    files = run(tmp_path / "out", "--xlam", a, "--xlam", b, "--data", b, "--test_share", 0)
    assert [row["id"] for row in files["train.jsonl"]] == ["xlam-1", "xlam2-1"] and "test.jsonl" not in files
    [row] = files["dropped.jsonl"]
    assert (row["id"], row["reason"]) == ("data-1", "duplicate")
    assert row["detail"].endswith("as xlam2-1 of b.json")


@pytest.mark.parametrize(("layout", "suffix"), [("trl", "jsonl"), ("verl", "jsonl"), ("verl", "parquet")])
def test_layouts_hold_the_same_examples(sources, tmp_path, monkeypatch, layout, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run(tmp_path, *sources, "--layouts", layout, "--no_call_turns")
    for name in ("train", "test"):
        expected = load_examples(tmp_path / f"{name}.jsonl")
        assert load_examples(tmp_path / f"{layout}_{name}.{suffix}") == expected


# -------------------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize("seed", [0, 1])
def test_training_on_the_raw_files_holds_out_the_same_records(sources, tmp_path, seed):
    """One split for all: else a model trained on raw files has seen what the prepared test file asks."""
    for kind, path in (sources[:2], sources[2:]):
        files = run(tmp_path / kind.strip("-"), kind, path, "--seed", seed)
        prepared = {name: {row["id"].split("-")[1] for row in files[f"{name}.jsonl"]} for name in ("train", "test")}
        splits = load_splits(Config(data=path, seed=seed, test_share=0.1))
        assert {example.id for example in splits.held_out["held_out"]} == prepared["test"]
        assert {example.id for example in splits.train} == prepared["train"]


def test_later_steps_stay_with_their_record(sources, tmp_path):
    files = run(tmp_path / "out", *sources, "--test_share", 0.5)
    train, test = (records(row["id"] for row in files[f"{name}.jsonl"]) for name in ("train", "test"))
    assert len(train) + len(test) == 30 + 18 and not train & test
    other = run(tmp_path / "other", *sources, "--test_share", 0.5, "--seed", 1)
    assert records(row["id"] for row in other["test.jsonl"]) != test


def test_another_file_moves_few_records_between_the_parts():
    """So two people who prepare slightly different mixtures test on nearly the same records."""
    keys = [f"x{i}" for i in range(2000)]
    before = hold_out(keys, 0.1, 0)
    after = hold_out([*keys, *(f"t{i}" for i in range(200))], 0.1, 0)
    assert len(before) == 200 and len(after) == 220 and len(before - after) < 20


def test_augmentation_leaves_the_test_part_as_it_is(sources, tmp_path):
    plain = run(tmp_path / "plain", *sources)
    files = run(tmp_path / "out", *sources, "--irrelevance", 1, "--mask", 1)
    assert files["test.jsonl"] == plain["test.jsonl"]
    added = [row for row in files["train.jsonl"] if "#irrelevant" in row["id"]]
    of_xlam = sum(row["source"] == "xlam" for row in plain["train.jsonl"])  # ToolACE's have one tool only
    assert len(added) == of_xlam and all(row["answer"] == [] for row in added)
    assert len(files["train.jsonl"]) == len(plain["train.jsonl"]) + len(added)
    assert all("#masked" in row["id"] for row in files["train.jsonl"])


# ------------------------------------------------------------------------------- counts, reasons, statistics


def test_the_table_counts_records_and_examples_as_the_paper_does(sources, tmp_path, capsys):
    run(tmp_path / "out", *sources)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["xLAM", "single", "31", "30", "60,000", "60,000"] in lines
    assert ["ToolACE", "single-turn", "13", "12", "10,500", "8,183"] in lines  # one user turn, without calls
    assert ["ToolACE", "multi-turn", "6", "12", "800", "1,470"] in lines
    assert ["broken_json", "1", "0"] in lines


@pytest.mark.parametrize(("option", "kept"), [("", 362), ("--keep=wrong_type", 373), ("--no_call_turns", 657)])
def test_genuine_files(tmp_path, option, kept):
    names = ("xlam_rawformat_repacked.json", "toolace_first100_rawformat_reconstructed.json")
    if not SHARED.exists():
        pytest.skip("shared/data/train is not beside this checkout")
    files = run(tmp_path / "out", "--xlam", SHARED / names[0], "--toolace", SHARED / names[1], *option.split())
    assert len(files["train.jsonl"]) + len(files["test.jsonl"]) == kept


def test_long_prompts_are_dropped_where_there_is_a_tokenizer(tmp_path):
    tokenizer = build_tiny_tokenizer([], 259)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "template.txt").write_text("{tools}")
    x = save(tmp_path / "x.json", xlam(1), xlam(2, "long " * 99))
    options = ["--xlam", x, "--tokenizer", tmp_path / "tokenizer", "--test_share", 0]
    options += ["--prompt_template", tmp_path / "template.txt"]
    files = run(tmp_path / "out", *options, "--max_prompt_tokens", 400)
    [example] = load_examples(tmp_path / "out/train.jsonl")[0]
    [dropped] = files["dropped.jsonl"]
    assert (example.id, dropped["id"], dropped["reason"]) == ("xlam-1", "xlam-2", "too_long")
    tokens = len(encode_prompt(tokenizer, example.messages, example.tools, "{tools}"))
    assert json.loads((tmp_path / "out/statistics.json").read_text())["train"]["prompt tokens"]["max"] == tokens
    # Names that are masked can become longer.
    files = run(tmp_path / "masked", *options, "--max_prompt_tokens", tokens, "--mask", 1, "--irrelevance", 1)
    assert [row["id"] for row in files["train.jsonl"]] == ["xlam-1#irrelevant#masked"]
    assert [row["reason"] for row in files["dropped.jsonl"]] == ["too_long"] * 2


def test_statistics_are_those_of_the_prompts_that_the_model_sees(sources, tmp_path):
    examples = load_examples(sources[1])[0]
    part = [(example, prepare.prompt_length(example, SYSTEM_TEMPLATE)) for example in examples]
    chats = [build_messages(example.messages, example.tools) for example in examples]
    lengths = sorted(sum(len(message["content"]) for message in chat) for chat in chats)
    described = prepare.describe(part, "characters")
    assert described["examples"] == 30 and described["kinds"] == {"choice": 30}
    assert described["sources"] == {"xlam": 30}
    spread = described["prompt characters"]
    assert [spread[key] for key in ("min", "p90", "p99", "max")] == [lengths[i] for i in (0, 26, 29, 29)]
    assert described["calls per answer"]["mean"] == 1


# --------------------------------------------------------------------------------------- nothing half-written


def test_a_prepared_set_is_replaced_only_on_request(sources, tmp_path):
    out = tmp_path / "out"
    run(out, *sources, "--layouts", "trl")
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with pytest.raises(DataError, match="out holds a prepared set already; .*--overwrite"):
        run(out, *sources)
    assert contents(out) == before
    run(out, *sources, "--seed", 1, "--overwrite")
    made = {"train.jsonl", "test.jsonl", "dropped.jsonl", "statistics.json", "manifest.json"}
    assert set(contents(out)) == made | {"notes.txt"} and contents(out)["train.jsonl"] != before["train.jsonl"]


@pytest.mark.parametrize("phase", ["prompt_length", "split", "write_rows", "manifest"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_the_folder_as_it_was(sources, tmp_path, monkeypatch, phase, error):
    fresh, old = tmp_path / "fresh", tmp_path / "old"
    run(old, *sources)
    before = contents(old)

    def stop(*_, **__):
        raise error

    monkeypatch.setattr(prepare, phase, stop)
    for out, options in ((fresh, []), (old, ["--overwrite"])):
        with pytest.raises((KeyboardInterrupt, OSError, DataError)):
            run(out, *sources, "--layouts", "trl", *options)
    assert not fresh.exists() and contents(old) == before


def test_a_run_killed_while_it_publishes_leaves_no_manifest(sources, tmp_path, monkeypatch):
    run(tmp_path / "out", *sources)
    monkeypatch.setattr(prepare.Path, "replace", None)
    monkeypatch.setattr(prepare.os, "replace", lambda a, b: 1 / 0 if b.parent == tmp_path / "out" else b.write_bytes(a.read_bytes()))
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "out", *sources, "--overwrite")
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "prepare: no input; give --xlam FILE"),
        (["--xlam", "missing.json"], "missing.json does not exist; check the path"),
        (["--xlam", "t.json"], "t.json:1: the layout is that of toolace, not of xlam; give another file"),
        (["--data", "bad.json"], "prepare: no example is left to train on; dropped: {'broken_json': 1}"),
        (["--xlam", "x.json", "--prompt_template", "no.txt"], "prompt_template: cannot read no.txt"),
    ],
)
def test_a_mistake_is_one_sentence(sources, tmp_path, monkeypatch, arguments, complaint):
    save(tmp_path / "bad.json", xlam(1, answers="[{"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        run(tmp_path / "out", *arguments)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", ["--keep typo", "--layouts trl,csv", "--test_share 2", "--mask nan", "--sed 1"])
def test_options_that_cannot_be_end_with_the_usage(sources, tmp_path, capsys, wrong):
    with pytest.raises(SystemExit):
        run(tmp_path / "out", *sources, *wrong.split())
    assert wrong.split()[0] in capsys.readouterr().err and not (tmp_path / "out").exists()
