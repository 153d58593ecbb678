"""evals/predict.py: replies to benchmark cases, one line each, which a killed evaluation goes on with."""

import copy
import json

import pytest
import torch
from helpers import chatty_model

from config import UserError
from corpus.sources import read_jsonl
from corpus.tiny_model import build_tiny_tokenizer
from evals.predict import Sampling, in_batches, write_predictions
from evals.report import Case, read_predictions
from kernel.attention import use_attention
from ops.export import ask_from_tools, export
from prompts import decode_reply, encode_prompt, stop_ids
from rollout import ENGINES

TEMPLATE = "Tools: {tools}"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tiny_tokenizer(["weather in Paris for 3 days", "a taxi in Rome with 4 seats"] * 3, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return chatty_model(tokenizer)


@pytest.fixture(scope="module")
def exported(model, tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    export(model, tokenizer, folder)
    return str(folder)


QUESTIONS = [[{"role": "user", "content": "weather " * (i + 1)}] for i in range(5)]
CASES = [Case(f"c{i}", "simple", question, []) for i, question in enumerate(QUESTIONS)]


def predict(exported, cases, path, benchmark="BFCL v4", **settings) -> list[dict]:
    settings = dict(max_prompt_tokens=500, max_new_tokens=6, batch_size=2) | settings
    write_predictions(exported, cases, path, TEMPLATE, Sampling(**settings), benchmark)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def without_latency(rows: list[dict]) -> dict:
    return {(row["id"], row["sample"]): row | {"latency": 0} for row in rows}


def test_predictions_are_greedy_replies_one_line_each(exported, model, tokenizer, tmp_path):
    rows = predict(exported, CASES, tmp_path / "new" / "predictions.jsonl")
    assert [row["id"] for row in sorted(rows, key=lambda row: row["id"])] == [case.id for case in CASES]
    by_id = {row["id"]: row for row in rows}
    for case in CASES:
        ids = encode_prompt(tokenizer, case.messages, case.tools, TEMPLATE)
        use_attention(model.eval(), "generate")
        out = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False, max_new_tokens=6,
            eos_token_id=stop_ids(tokenizer), pad_token_id=0,
        )
        reply = out[0, len(ids) :].tolist()
        row = by_id[case.id]
        assert (row["category"], row["input_tokens"]) == (case.category, len(ids))
        assert row["output_tokens"] == len(reply) and row["latency"] > 0
        assert row["output"] == decode_reply(tokenizer, reply, stop_ids(tokenizer))


def test_a_model_is_asked_as_it_was_trained(model, tokenizer, tmp_path):
    asking = copy.copy(tokenizer)
    ask_from_tools(asking, TEMPLATE)
    export(model, asking, tmp_path / "model")
    for template in ("", "", TEMPLATE):  # going on with its own, and with the same from a file
        sampling = Sampling(500, 6, 2)
        write_predictions(str(tmp_path / "model"), CASES, tmp_path / "p.jsonl", template, sampling, "BFCL v4")
    for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        [case] = [case for case in CASES if case.id == (row := json.loads(line))["id"]]
        assert row["input_tokens"] == len(encode_prompt(tokenizer, case.messages, case.tools, TEMPLATE))


SAMPLED = {"temperature": 1.0, "samples": 3, "batch_size": 6}


def test_samples_of_a_case_are_numbered_and_depend_on_seed_and_case_alone(exported, tmp_path):
    rows = predict(exported, CASES, tmp_path / "a.jsonl", **SAMPLED)
    assert sorted((row["id"], row["sample"]) for row in rows) == [(c.id, k) for c in CASES for k in range(3)]
    assert len({row["output"] for row in rows}) > len(CASES)
    alone = predict(exported, CASES[2:3], tmp_path / "b" / "b.jsonl", **SAMPLED)
    of_the_case = [row for row in rows if row["id"] == CASES[2].id]
    assert without_latency(alone) == without_latency(of_the_case)
    other = predict(exported, CASES, tmp_path / "c" / "c.jsonl", seed=1, **SAMPLED)
    assert without_latency(other) != without_latency(rows)
    same = [Case(name, "simple", CASES[4].messages, []) for name in ("x", "y")]
    outputs = [row["output"] for row in predict(exported, same, tmp_path / "d" / "d.jsonl", **SAMPLED)]
    assert outputs[:3] != outputs[3:]


def test_a_killed_evaluation_misses_and_repeats_no_sample(exported, tmp_path, monkeypatch):
    """The kill may fall inside a line, and between two samples of one case."""
    path = tmp_path / "predictions.jsonl"
    whole = predict(exported, CASES, path, **SAMPLED)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], lines[7], lines[8][:17]]))
    done, real = [], ENGINES["shared_prefix"]

    def count(model, prompts, *others):
        done.extend(prompt.id for prompt in prompts if prompt.id != "probe")  # which every loading asks
        return real(model, prompts, *others)

    monkeypatch.setitem(ENGINES, "shared_prefix", count)
    again = predict(exported, CASES, path, **SAMPLED)
    assert len(again) == len(whole) and without_latency(again) == without_latency(whole)
    assert path.read_bytes().startswith(b"".join([*lines[:4], lines[7]])), "what was there is not touched"
    assert len(done) == 4, "only the missing cases are generated"


def test_replies_of_other_settings_are_not_mixed(exported, tmp_path):
    path = tmp_path / "predictions.jsonl"
    before = predict(exported, CASES[:1], path, **SAMPLED)
    variable = {"chat_template_kwargs": "add_generation_prompt: true"}
    others = {"seed": 1}, {"samples": 2}, {"temperature": 0.5}, {"max_prompt_tokens": 499}, variable
    for changed in others:
        said = rf"other settings \({[*changed][0]}; see|--max_prompt_tokens 500; "
        with pytest.raises(UserError, match=said):
            predict(exported, CASES, path, **(SAMPLED | changed))
    with pytest.raises(UserError, match="holds replies to BFCL v4, not to API-Bank; give another --out"):
        predict(exported, CASES, path, "API-Bank", **SAMPLED)
    with pytest.raises(UserError, match="greedy decoding would give 3 equal replies"):
        predict(exported, CASES, tmp_path / "p.jsonl", samples=3)
    assert predict(exported, CASES[:1], path, **SAMPLED) == before, "the refusal changes nothing"


def test_no_reply_stops_the_next_start(exported, tmp_path):
    """A line may break off inside a letter; str.splitlines() also cuts at U+2028, which JSON leaves."""
    path = tmp_path / "predictions.jsonl"
    row = {"id": "c0", "category": "simple", "output": "\u2028\u0085東", "latency": 1.0}
    line = json.dumps(row, ensure_ascii=False).encode()
    path.write_bytes(line + b"\n" + line[: line.index("東".encode()) + 1])
    assert [row["id"] for row in predict(exported, CASES[:2], path)] == ["c0", "c1"]


def test_a_case_that_cannot_be_asked_is_skipped_and_says_why(exported, tokenizer, tmp_path):
    """Its prompt is longer than that of the third case, or cannot be written."""
    limit = len(encode_prompt(tokenizer, CASES[2].messages, CASES[2].tools, TEMPLATE))
    bad = Case("bad", "simple", [{"role": "user", "content": "weather <|im_end|>"}], [])
    rows = predict(exported, [*CASES, bad], tmp_path / "p.jsonl", max_prompt_tokens=limit)
    skipped = {row["id"]: row["skipped"] for row in rows if "skipped" in row}
    assert skipped.pop("bad").startswith("bad_text: the control token <|im_end|>")
    assert skipped == dict.fromkeys(("c3", "c4"), "prompt_too_long") and len(rows) == 6
    assert all((row["output"], row["output_tokens"]) == ("", 0) for row in rows if "skipped" in row)


def test_a_larger_limit_asks_again_what_was_too_long(exported, tokenizer, tmp_path):
    """Once: what is still too long, or was asked since, is not asked a third time."""
    lengths = [len(encode_prompt(tokenizer, case.messages, case.tools, TEMPLATE)) for case in CASES]
    path, counts = tmp_path / "p.jsonl", []
    for limit in (lengths[1], lengths[3], lengths[3], 500):
        unused = {"seed": limit, "batch_size": limit}  # by greedy decoding; changes no reply
        rows = predict(exported, CASES, path, max_prompt_tokens=limit, **unused)
        counts.append((len(rows), sum("skipped" in row for row in rows)))
    assert counts == [(5, 3), (7, 3), (7, 3), (8, 3)]
    kept = {row["id"]: row for row in read_predictions(path, "BFCL v4")}
    assert len(kept) == 5 and not any("skipped" in row for row in kept.values())


@pytest.mark.parametrize("name, broken", [
    ("generated_with.json", b""), ("generated_with.json", b"{"), ("generated_with.json", b"[1]"),
    ("generated_with.json", b"\0\0\0"), ("generated_with.json", b"\xff\xfe"), ("generated_with.json", b"3"),
    ("predictions.jsonl:2", b"{\n"), ("predictions.jsonl:2", b"[]\n"),
    ("predictions.jsonl:2", b'{"id": "x"}\n'),
    ("predictions.jsonl", b'{"id": "c0", "category": "simple", "sample": 0, "output": 1}\n'),
])
def test_broken_files_of_an_evaluation_are_one_sentence(exported, tmp_path, name, broken):
    path = tmp_path / "predictions.jsonl"
    predict(exported, CASES[:1], path)
    with (tmp_path / name.partition(":")[0]).open("ab" if "predictions" in name else "wb") as file:
        file.write(broken)
    with pytest.raises(UserError, match=f"{tmp_path / name}[: ][^\\n]*$"):
        predict(exported, CASES[:2], path)


def test_what_a_power_cut_left_is_asked_again(exported, tmp_path):
    path = tmp_path / "predictions.jsonl"
    predict(exported, CASES[:1], path)
    with path.open("ab") as file:
        file.write(b"\0\0\n\0\0\0")
    write_predictions(exported, CASES[:2], path, TEMPLATE, Sampling(500, 6, 2), "BFCL v4")
    assert [row["id"] for row in read_jsonl(path)] == ["c0", "c1"]


def test_without_a_terminal_a_line_is_printed_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr("evals.predict.LINE_SECONDS", 0.0)
    assert list(in_batches("abcde", 2, "as\x1bk")) == ["ab", "cd", "e"]
    printed = capsys.readouterr().out
    assert "1 of 3" in printed and "2 of 3" in printed and "\x1b" not in printed
