"""Contamination: planted copies of held-out queries and tools are found under their ids, and nothing else."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from corpus import overlap
from corpus.examples import Example
from corpus.layouts import load_examples, write_examples
from corpus.overlap import HeldOutCase, count_matches, load_apibank, load_bfcl, normalise
from corpus.sources import DataError

SHARED = Path(__file__).parents[2] / "shared" / "data"
QUERY = "Please find the cheapest direct flight from Oslo to Rome on 2024-05-03, and book a seat by the window."


def shared(name: str) -> str:
    if not (SHARED / name).exists():
        pytest.skip(f"shared/data/{name} is not beside this checkout")
    return str(SHARED / name)


@pytest.fixture(scope="module")
def benchmarks() -> list[HeldOutCase]:
    return load_bfcl(shared("bfcl")) + load_apibank(shared("apibank"))


def example(*texts: str, rid: str = "7", tools: tuple[str, ...] = ()) -> Example:
    messages = [{"role": "user", "content": text} for text in texts]
    return Example(rid, "xlam", messages, [{"name": name} for name in tools], [])


def case(*texts: str, rid="b1", category="multiple", tools: tuple[str, ...] = ()) -> HeldOutCase:
    return HeldOutCase(rid, category, texts, tools)


def kinds(trained: Example, *cases: HeldOutCase) -> list[str]:
    return [match.kind for match in overlap.overlap([trained], cases)]


def first_words(count: int) -> str:
    return " ".join(QUERY.split()[:count])


# ------------------------------------------------------------------------------------------ queries and tools


def test_letter_case_punctuation_and_white_space_do_not_hide_a_copy():
    disguised = QUERY.upper().replace(",", " -\n").replace("2024-05-03", "20240503")
    [match] = overlap.overlap([example("Hello there!", disguised, disguised)], [case(QUERY)])
    assert (match.example, match.train_id, match.kind, match.cases) == (0, "7", "identical", ["b1"])
    full_width = "".join(chr(ord(c) + 0xFEE0) if c.isascii() and c.isalnum() else c for c in QUERY)
    assert kinds(example(full_width), case(QUERY)) == ["identical"]


def test_only_what_the_user_says_is_compared():
    trained = example("Add 1.")
    trained.messages.insert(0, {"role": "assistant", "content": QUERY})
    assert kinds(trained, case(QUERY)) == []


@pytest.mark.parametrize(
    ("trained", "tested", "expected"),
    [
        (f"So: {first_words(13)} or not", QUERY, ["ngram"]),  # 13 words in a row
        (f"So: {first_words(12)} or not", QUERY, []),
        (f"Do this: {first_words(8)} now", first_words(8), ["ngram"]),  # a whole query of 8 to 12 words
        (f"Do this: {first_words(12)} now", first_words(12), ["ngram"]),
        (f"Do this: {first_words(7)} now", first_words(7), []),
        (f"Do this: {first_words(11)} now", first_words(12), []),
        ("你好，请帮我查一下明天北京到上海的航班！谢谢", "请帮我查一下明天北京到上海的航班", ["ngram"]),
    ],
)
def test_a_part_of_a_query_counts_from_13_words_on_a_whole_one_from_8(trained, tested, expected):
    assert kinds(example(trained), case(tested)) == expected


def test_small_talk_counts_only_as_the_whole_query_of_both_sides():
    # "Yes, please." is a turn of many API-Bank dialogues and of many training dialogues.
    assert kinds(example("Yes, please."), case("yes please")) == ["identical"]
    assert kinds(example("Yes, please.", "Add 1."), case("yes please")) == []
    assert kinds(example("Yes, please."), case("yes please", "Book it.")) == []


def test_the_index_finds_what_comparing_all_pairs_finds():
    def windows(words, width):
        return {tuple(words[at : at + width]) for at in range(len(words) - width + 1)}

    rng, found = random.Random("0/overlap"), 0
    for _ in range(300):  # two words only, so that runs break off, go on and repeat
        ours = rng.choices("ab", k=rng.randint(0, 25))
        theirs = ours[5 : rng.randint(5, 25)] + rng.choices("ab", k=rng.randint(0, 2))
        width = min(13, len(theirs))
        expected = width >= 8 and ours != theirs and bool(windows(ours, width) & windows(theirs, width))
        got = kinds(example(" ".join(ours), "another"), case(" ".join(theirs), "different"))
        assert [kind for kind in got if kind == "ngram"] == ["ngram"] * expected
        found += expected
    assert 50 < found < 200


def test_text_of_many_cases_lists_them_all():
    cases = [case(f"{QUERY} My number is {n}.", rid=f"b{n}") for n in range(3)] + [case(QUERY, rid="b3")]
    found = overlap.overlap([example(QUERY)], cases)
    assert [(match.kind, match.cases) for match in found] == [
        ("identical", ["b3"]), ("ngram", ["b0", "b1", "b2"]),
    ]


@pytest.mark.parametrize(
    ("name", "found"),
    [("FlightsFind_Cheapest", True), ("flights find cheapest", True), ("flights.find", False), ("…", False)],
)
def test_tools_are_the_same_by_the_letters_of_their_names(name, found):
    tested = case("y", tools=("flights.find_cheapest", "?"))
    assert kinds(example("x", tools=(name,)), tested) == ["tool"] * found


def test_the_table_counts_cases_and_examples_once():
    cases = [case(QUERY, tools=("find",)), case(QUERY, rid="b2", category="parallel"), case(rid="b3")]
    trained = [example(QUERY, QUERY.lower(), tools=("find",)), example("Add 1."), example(QUERY, rid="9")]
    assert count_matches(overlap.overlap(trained, cases), cases) == {
        "multiple": {"identical": "1 / 2", "ngram": "0 / 0", "tool": "1 / 1"},
        "parallel": {"identical": "1 / 2", "ngram": "0 / 0", "tool": "0 / 0"},
        "all": {"identical": "2 / 2", "ngram": "0 / 0", "tool": "1 / 1"},
    }


# ------------------------------------------------------------------------------------- genuine files, command


def test_every_benchmark_case_is_found_when_it_is_trained_on(benchmarks):
    cases = {c.id: c for c in benchmarks}
    assert len(cases) == 3641 + 639
    dialogue = cases["level-1-given-desc/AddAgenda-AddAlarm-GetUserToken-level-2-1.jsonl#6"]
    assert [query[:14] for query in dialogue.queries] == ["Can you add a ", "Can you remind", "My username is"]
    assert dialogue.tools == ("GetUserToken", "AddAgenda", "AddAlarm")
    leaked = [example(*c.queries, rid=c.id, tools=c.tools) for c in benchmarks]
    matches = [match for match in overlap.overlap(leaked, benchmarks) if match.train_id in match.cases]
    hits = {(match.train_id, match.kind) for match in matches}
    missed = [c for c in benchmarks if any(map(normalise, c.queries)) and (c.id, "identical") not in hits]
    # Dialogues of nothing but small talk, such as "hi", "bye".
    assert len(missed) < 20
    assert all(len(normalise(text)) < overlap.MIN_WORDS for c in missed for text in c.queries)
    assert all((c.id, "tool") in hits for c in benchmarks if c.tools)


@pytest.mark.parametrize(
    "name", ["xlam_rawformat_repacked.json", "toolace_first100_rawformat_reconstructed.json"]
)
def test_the_genuine_training_files_share_no_query_with_the_benchmarks(name, benchmarks):
    trained = load_examples(shared(f"train/{name}"))[0]
    assert {match.kind for match in overlap.overlap(trained, benchmarks)} <= {"tool"}


def test_planted_copies_are_found_among_genuine_training_records(benchmarks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    genuine = load_examples(shared("train/xlam_rawformat_repacked.json"))[0]
    trained, own_test = genuine[:100], genuine[100:102]
    cases = {c.id: c for c in benchmarks}
    question, long = cases["simple_python_27"], cases["parallel_multiple_95"]
    dialogue = next(c for c in benchmarks if c.category == "level-1" and len(normalise(c.queries[0])) >= 13)
    excerpt = " ".join(normalise(long.queries[0])[20:33])
    texts = {
        3: f"{question.queries[0].upper().replace(' ', '  ')}?!", 4: f"Now, {excerpt}.",
        5: dialogue.queries[0], 9: own_test[0].messages[0]["content"],
    }
    for at, text in texts.items():
        trained[at] = replace(trained[at], messages=[{"role": "user", "content": text}])
    trained[6] = replace(trained[6], tools=[*trained[6].tools, {"name": question.tools[0]}])
    write_examples("one.jsonl", trained[:5])
    write_examples("two.jsonl", trained[5:])
    write_examples("test.jsonl", own_test)
    where = ["--test", "test.jsonl", "--bfcl", shared("bfcl"), "--apibank", shared("apibank")]
    overlap.main(["one.jsonl", "two.jsonl", *where, "--out", "matches.jsonl", "--write", "clean.jsonl"])
    rows = [json.loads(line) for line in Path("matches.jsonl").read_text().splitlines()]
    queries = [row for row in rows if row["kind"] != "tool"]
    assert [(row["example"], row["file"]) for row in queries] == [
        (3, "one.jsonl"), (4, "one.jsonl"), (5, "two.jsonl"), (9, "two.jsonl"),
    ]
    assert [row["kind"] for row in queries] == ["identical", "ngram", "identical", "identical"]
    expected = (question.id, long.id, dialogue.id, f"test {own_test[0].id}")
    assert all(name in row["cases"] for name, row in zip(expected, queries))
    assert queries[1]["text"] == excerpt
    assert any(row["example"] == 6 and row["kind"] == "tool" and question.id in row["cases"] for row in rows)
    assert load_examples("clean.jsonl")[0] == [one for at, one in enumerate(trained) if at not in texts]
    printed = capsys.readouterr().out
    assert "4 of 100 training examples, in 4 records, share a query" in printed and excerpt in printed


def test_a_record_goes_with_all_its_steps_but_not_its_namesake_in_another_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_examples("a.jsonl", [example("Add 1.", rid="5#1"), example("Add 1.", QUERY, rid="5#3")])
    write_examples("b.jsonl", [example("Add 2.", rid="5#1")])
    write_examples("test.jsonl", [example(QUERY)])
    overlap.main(["a.jsonl", "b.jsonl", "--test", "test.jsonl", "--write", "clean.jsonl"])
    assert load_examples("clean.jsonl")[0] == load_examples("b.jsonl")[0]
    assert "2 of 3 training examples, in 1 records" in capsys.readouterr().out


def test_what_cannot_be_compared_or_written_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_examples("train.jsonl", [example(QUERY)])
    with pytest.raises(SystemExit):
        overlap.main(["train.jsonl"])
    assert "nothing to compare with: give --test FILE" in capsys.readouterr().err
    with pytest.raises(DataError, match="missing/a cannot be written"):
        overlap.main(["train.jsonl", "--test", "train.jsonl", "--out", "missing/a"])


def test_the_comparison_needs_no_torch():
    code = "import sys; from corpus import overlap; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
