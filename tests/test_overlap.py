"""Contamination: planted copies of benchmark queries and tools are found under the right ids, and nothing
else is.
"""

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
from corpus.overlap import BenchmarkCase, normalise, records, tabulate, without_queries
from corpus.sources import DataError

SHARED = Path(__file__).parents[2] / "shared" / "data"
# 19
QUERY = "Please find the cheapest direct flight from Oslo to Rome on 2024-05-03, and book two seats by the window."
FLIGHT = {
    "name": "flights.find_cheapest",
    "parameters": {"type": "dict", "properties": {"from": {}, "to": {}}},
}


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"shared/data/{name} is not beside this checkout")
    return SHARED / name


def example(*texts: str, rid: str = "7", tools: tuple[dict, ...] = ()) -> Example:
    return Example(rid, "xlam", [{"role": "user", "content": text} for text in texts], list(tools), [])


def case(
    *texts: str, rid: str = "b1", category: str = "multiple", tools: tuple[dict, ...] = ()
) -> BenchmarkCase:
    return BenchmarkCase(rid, category, texts, tools)


def kinds(trained: Example, *cases: BenchmarkCase, ngram: int = 13) -> list[str]:
    return [match.kind for match in overlap.overlap([trained], cases, ngram)]


def first_words(count: int) -> str:
    return " ".join(QUERY.split()[:count])


# ---------------------------------------------------------------------------------------------------- queries


def test_letter_case_punctuation_and_white_space_do_not_hide_a_copy():
    disguised = (
        QUERY.upper().replace(",", " -\n").replace("2024-05-03", "20240503").replace("DIRECT FL", "directfl")
    )
    [match] = overlap.overlap([example("Hello there!", disguised, disguised)], [case(QUERY)])
    assert (match.example, match.train_id, match.kind, match.cases) == (0, "7", "identical", ("b1",))
    assert (match.words, match.ngrams) == (18, 6)  # "directfl ight" is two words as well
    full_width = "".join(
        chr(ord(letter) + 0xFEE0) if letter.isascii() and letter.isalnum() else letter for letter in QUERY
    )
    assert kinds(example(full_width), case(QUERY)) == ["identical"]


def test_only_what_the_user_says_is_compared():
    trained = example("Add 1.")
    trained.messages.insert(0, {"role": "assistant", "content": QUERY})
    assert kinds(trained, case(QUERY)) == []


def test_an_excerpt_counts_from_n_words_on():
    [match] = overlap.overlap([example(f"So: {first_words(14)} or not")], [case(QUERY)], ngram=13)
    assert (match.kind, match.words, match.ngrams) == ("ngram", 14, 2)
    assert match.text == " ".join(normalise(first_words(14)))
    assert kinds(example(f"So: {first_words(12)} or not"), case(QUERY)) == []
    assert kinds(example(f"So: {first_words(12)} or not"), case(QUERY), ngram=12) == ["ngram"]


def test_a_short_query_counts_where_it_stands_whole_and_has_eight_words():
    for count, expected in ((7, []), (8, [(8, 1)]), (12, [(12, 1)])):
        found = overlap.overlap([example(f"Do this: {first_words(count)} now")], [case(first_words(count))])
        assert [(match.words, match.ngrams) for match in found if match.kind == "ngram"] == expected
    assert kinds(example(f"Do this: {first_words(11)} now"), case(first_words(12))) == []


def test_small_talk_counts_only_as_the_whole_query_of_both_sides():
    # "Yes, please." is a turn of many API-Bank dialogues and of many training dialogues.
    assert kinds(example("Yes, please."), case("yes please")) == ["identical"]
    assert kinds(example("Yes, please.", "Add 1."), case("yes please")) == []
    assert kinds(example("Yes, please."), case("yes please", "Book it.")) == []


def test_words_are_characters_where_a_language_writes_no_spaces():
    text = "请帮我查一下明天北京到上海的航班"
    assert kinds(example(f"你好，{text}！谢谢"), case(text)) == ["ngram"]


def test_the_fast_search_finds_what_the_obvious_one_finds():
    def windows(words, width):
        return [tuple(words[at : at + width]) for at in range(len(words) - width + 1)]

    rng, compared = random.Random("0/overlap"), 0
    for _ in range(300):  # three different words only, so that runs break off, go on and repeat
        ours, theirs = (rng.choices("abc", k=rng.randint(0, 30)) for _ in range(2))
        expected = None
        if len(theirs) >= 5 and ours != theirs:
            hits = [gram in windows(theirs, 5) for gram in windows(ours, 5)]
            longest = max(map(len, "".join("x" if hit else " " for hit in hits).split()), default=0)
            expected = (sum(hits), longest + 4) if longest else None
        found = overlap.overlap(
            [example(" ".join(ours), "another")], [case(" ".join(theirs), "different")], ngram=5
        )
        assert [(match.ngrams, match.words) for match in found] == ([expected] if expected else [])
        compared += expected is not None
    assert compared > 50


def test_text_of_many_cases_lists_them_all():
    cases = [case(f"{QUERY} My number is {n}.", rid=f"b{n}") for n in range(3)] + [case(QUERY, rid="b3")]
    found = overlap.overlap([example(QUERY)], cases)
    assert sorted((match.kind, match.cases) for match in found) == [
        ("identical", ("b3",)), ("ngram", ("b0",)), ("ngram", ("b1",)), ("ngram", ("b2",)),
    ]
    repeated = [
        case(QUERY, "Thanks!", rid=f"d{n}") for n in range(3)
    ]  # API-Bank: a case per call of one dialogue
    [match] = overlap.overlap([example(QUERY)], repeated)
    assert match.cases == ("d0", "d1", "d2")


# ------------------------------------------------------------------------------------------------------ tools


@pytest.mark.parametrize(
    ("tool", "kind"),
    [
        (
            {"name": "FlightsFind_Cheapest", "parameters": {"From": {"type": "str"}, "to": {"type": "str"}}},
            ["tool"],
        ),
        ({"name": "flights find cheapest", "parameters": {"from": {}}}, ["tool_name"]),
        ({"name": "flights.find_cheapest"}, ["tool_name"]),
        ({"name": "flights.find", "parameters": {"from": {}, "to": {}}}, []),
    ],
)
def test_tools_are_the_same_by_name_and_by_parameter_names(tool, kind):
    assert kinds(example("x", tools=(tool,)), case("y", tools=(FLIGHT,))) == kind


def test_tools_without_parameters_can_share_their_name_only():
    clock = {"name": "get_time", "parameters": {"type": "dict", "properties": {}}}
    assert kinds(example("x", tools=(clock,)), case("y", tools=(clock,))) == ["tool_name"]


# ----------------------------------------------------------------------------------- tables and clean records


def test_the_table_counts_cases_and_examples_once():
    cases = [
        case(QUERY, rid="b1", tools=(FLIGHT,)),
        case(QUERY, rid="b2", category="parallel"),
        case(rid="b3"),
    ]
    trained = [
        example(QUERY, QUERY.lower(), tools=(FLIGHT,)),
        example("Add 1.", rid="8"),
        example(QUERY, rid="9"),
    ]
    table = tabulate(overlap.overlap(trained, cases), cases)
    none = {"ngram": [0, 0], "tool_name": [0, 0]}
    assert table == {
        "multiple": {"cases": 2, "without_query": 1, "identical": [1, 2], "tool": [1, 1]} | none,
        "parallel": {"cases": 1, "without_query": 0, "identical": [1, 2], "tool": [0, 0]} | none,
        "all": {"cases": 3, "without_query": 1, "identical": [2, 2], "tool": [1, 1]} | none,
    }


def test_a_record_goes_with_all_its_steps_but_not_its_namesake_in_another_file():
    trained = [
        example("Add 1.", rid="5#1"),
        example("Add 1.", QUERY, rid="5#3"),
        example("Add 2.", rid="5#1"),
    ]
    trained.append(replace(trained[0], source="toolace"))
    files = ["a.json", "a.json", "b.json", "a.json"]
    clean, bad = without_queries(trained, overlap.overlap(trained, [case(QUERY)]), records(trained, files))
    assert clean == trained[2:] and bad == 1


def test_shared_tools_alone_do_not_remove_a_record():
    trained = [example("Add 1.", tools=(FLIGHT,))]
    matches = overlap.overlap(trained, [case(QUERY, tools=(FLIGHT,))])
    assert [match.kind for match in matches] == ["tool"]
    assert without_queries(trained, matches, records(trained, ["a"])) == (trained, 0)


# ------------------------------------------------------------------------------------- genuine files, command


def test_the_benchmarks_give_the_words_of_the_user_and_the_tools_of_the_case():
    cases = {c.id: c for c in overlap.load_bfcl(shared("bfcl")) + overlap.load_apibank(shared("apibank"))}
    assert (
        sum(len(c.queries) > 1 for c in cases.values() if c.category.startswith("live")) == 9
    )  # 91 have a system text
    dialogue = cases["level-1-given-desc/AddAgenda-AddAlarm-GetUserToken-level-2-1.jsonl#6"]
    assert [query[:14] for query in dialogue.queries] == [
        "Can you add a ",
        "Can you remind",
        "My username is",
    ]
    assert [tool["name"] for tool in dialogue.tools] == ["GetUserToken", "AddAgenda", "AddAlarm"]
    assert any(tool["name"] == "QueryMeeting" for tool in cases["level-3#0"].tools)


def test_every_benchmark_case_is_found_when_it_is_trained_on():
    cases = overlap.load_bfcl(shared("bfcl")) + overlap.load_apibank(shared("apibank"))
    assert len(cases) == 3641 + 639
    leaked = [Example(c.id, "leak", example(*c.queries).messages, list(c.tools), []) for c in cases]
    hits = {
        (match.train_id, match.kind)
        for match in overlap.overlap(leaked, cases)
        if match.train_id in match.cases
    }
    missed = [c for c in cases if any(map(normalise, c.queries)) and (c.id, "identical") not in hits]
    # Dialogues of nothing but small talk, such as "hi", "bye".
    assert len(missed) < 20 and all(
        len(normalise(text)) < overlap.MIN_WORDS for c in missed for text in c.queries
    )
    assert all((c.id, "tool") in hits or (c.id, "tool_name") in hits for c in cases if c.tools)


def test_planted_copies_are_found_among_genuine_training_records(tmp_path, capsys):
    trained = load_examples(shared("train/xlam_rawformat_repacked.json"))[0][:100]
    cases = {c.id: c for c in overlap.load_bfcl(shared("bfcl")) + overlap.load_apibank(shared("apibank"))}
    question, long, dialogue = cases["simple_python_27"], cases["parallel_multiple_95"], next(
        c for c in cases.values() if c.category == "level-1" and len(normalise(c.queries[0])) >= 13
    )
    excerpt = " ".join(normalise(long.queries[0])[20:33])
    texts = {
        3: question.queries[0].upper().replace(" ", "  ") + "?!",
        4: f"Now, {excerpt}.",
        5: dialogue.queries[0],
    }
    for at, text in texts.items():
        trained[at] = replace(trained[at], messages=[{"role": "user", "content": text}])
    trained[6] = replace(trained[6], tools=[*trained[6].tools, *question.tools])
    files = [str(tmp_path / name) for name in ("one.jsonl", "two.jsonl")]
    write_examples(files[0], trained[:5])
    write_examples(files[1], trained[5:])
    overlap.main([
        *files, "--bfcl", str(shared("bfcl")), "--apibank", str(shared("apibank")),
        "--out", str(tmp_path / "matches.jsonl"), "--write", str(tmp_path / "clean.jsonl"),
    ])
    rows = [json.loads(line) for line in (tmp_path / "matches.jsonl").read_text().splitlines()]
    queries = [row for row in rows if row["kind"] in overlap.QUERY_KINDS]
    expected = [(at, trained[at].id, files[at >= 5]) for at in texts]
    assert [(row["example"], row["train_id"], row["file"]) for row in queries] == expected
    assert [row["kind"] for row in queries] == ["identical", "ngram", "identical"]
    assert all(c.id in row["cases"] for c, row in zip((question, long, dialogue), queries))
    assert (queries[1]["words"], queries[1]["text"]) == (13, excerpt)
    assert any(row["example"] == 6 and row["kind"] == "tool" and question.id in row["cases"] for row in rows)
    assert load_examples(tmp_path / "clean.jsonl")[0] == [
        e for at, e in enumerate(trained) if at not in texts
    ]
    printed = capsys.readouterr().out
    assert "3 of 100 training examples, in 3 of 100 records, share a query" in printed and excerpt in printed


@pytest.mark.parametrize(
    "name", ["xlam_rawformat_repacked.json", "toolace_first100_rawformat_reconstructed.json"]
)
def test_the_genuine_training_files_share_no_query_with_the_benchmarks(name):
    trained = load_examples(shared(f"train/{name}"))[0]
    cases = overlap.load_bfcl(shared("bfcl")) + overlap.load_apibank(shared("apibank"))
    assert [match for match in overlap.overlap(trained, cases) if match.kind in overlap.QUERY_KINDS] == []


def test_the_same_text_is_one_line_however_many_share_it(capsys):
    numbered = [f"{QUERY} {n}" for n in range(30)]
    numbered[29] += " and no other flight"
    cases = [case(text, rid=f"b{n}") for n, text in enumerate(numbered)]
    matches = overlap.overlap([example(text, rid=str(n)) for n, text in enumerate(numbered)], cases)
    overlap._print_matches(matches, 4)
    identical, ngram = capsys.readouterr().out.strip().split("\n\n")
    assert identical.startswith("identical: 30 different, 4 shown\n") and identical.count(" ~ b") == 4
    assert identical.splitlines()[1].startswith("  xlam 29 ~ b29 [24 words, 12 n-grams]")  # longest first
    # Each of the 30 shares the words of QUERY with 29 cases.
    assert ngram.startswith("n-gram: 1 different\n") and ngram.count(" ~ ") == 1
    assert "xlam 0 (and 29 more) ~ b1 (and 29 more) [19 words, 7 n-grams]: please find" in ngram


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.jsonl"], "give --bfcl DIR, --apibank DIR or both"),
        (["--bfcl", "."], "TRAIN"),
        (["train.jsonl", "--bfcl", "."], "holds no BFCL_v4.* point --bfcl at"),
        (["train.jsonl", "--apibank", "."], "no API-Bank data; --apibank takes"),
        (["train.jsonl", "--bfcl", ".", "--ngram", "x"], "--ngram: invalid int value: 'x'"),
        (["train.jsonl", "--bfcl", ".", "--ngram", "2"], "--ngram 2 is too short"),
        (["train.jsonl", "--bfcl", ".", "--show", "-1"], "--show -1 is negative"),
        (["train.jsonl", "--bfcl", ".", "--speed", "9"], "unrecognized arguments: --speed 9"),
        (["train.jsonl", "--bfcl", ".", "--write", "train.jsonl"], "train.jsonl is both read and written"),
        (["train.jsonl", "--bfcl", ".", "--out", "a", "--write", "./a"], "written twice"),
        (["train.jsonl", "--bfcl", ".", "--out", "missing/a"], "missing/a cannot be written"),
    ],
)
def test_errors_are_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=message) as raised:
        overlap.main(arguments)
    assert "\n" not in str(raised.value) and Path("train.jsonl").read_text() == "{}"


def test_dropped_records_are_counted_and_a_wholly_shared_file_is_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overlap, "load_bfcl", lambda folder: [case(QUERY)])
    train, clean = tmp_path / "train.jsonl", tmp_path / "clean.jsonl"
    write_examples(train, [example(QUERY)])
    train.write_text(train.read_text() + '{"messages": 1}\n')
    with pytest.raises(DataError, match="every training record shares a query"):
        overlap.main([str(train), "--bfcl", "there", "--write", str(clean)])
    assert (
        "1 examples, dropped and not compared: 1 missing_field" in capsys.readouterr().out
        and not clean.exists()
    )
    train.write_text('{"messages": 1, "answer": 2}\n')
    with pytest.raises(DataError, match="train.jsonl: no usable example to compare"):
        overlap.main([str(train), "--bfcl", "there"])


def test_the_report_needs_no_torch():
    code = "import sys, overlap; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_data_py_runs_it_and_prints_errors_in_one_line(tmp_path):
    # Run as a script, data.py is __main__, and a DataError of its own would not be the one that overlap.py
    # raises.
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "data.py"),
        "overlap",
        "missing.json",
        "--bfcl",
        "missing",
    ]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stdout == ""
    assert (
        ran.stderr.startswith("error: missing: no such folder; --bfcl must be a folder")
        and ran.stderr.count("\n") == 1
    )
