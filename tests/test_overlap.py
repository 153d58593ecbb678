"""Contamination: planted copies of held-out queries and tools are found under their ids, and nothing else."""

import random
from pathlib import Path

import pytest
from test_layouts import shared

from corpus import overlap
from corpus.examples import Example
from corpus.layouts import load_examples, write_examples
from corpus.overlap import HeldOutCase, load_held_out, normalise
from corpus.sources import read_jsonl

QUERY = "Please find the cheapest direct flight from Oslo to Rome on 2024-05-03, and book a seat at the back."


@pytest.fixture(scope="module")
def benchmarks() -> list[HeldOutCase]:
    return load_held_out(bfcl=str(shared("data/bfcl")), apibank=str(shared("data/apibank")))


def example(*texts: str, rid: str = "7", tools: tuple[str, ...] = ()) -> Example:
    messages = [{"role": "user", "content": text} for text in texts]
    names = [{"name": name} for name in tools]
    return Example(rid, "xlam", messages, names, [], record=rid.partition("#")[0])


def case(*texts: str, tools: tuple[str, ...] = ()) -> HeldOutCase:
    return HeldOutCase("b1", "multiple", texts, tools)


def kinds(trained: Example, *cases: HeldOutCase) -> list[str]:
    return [match.kind for match in overlap.overlap([trained], cases)]


def start(count: int) -> str:
    return " ".join(QUERY.split()[:count])


def test_letter_case_punctuation_and_white_space_do_not_hide_a_copy():
    disguised = QUERY.upper().replace(",", " -\n").replace("2024-05-03", "20240503")
    [match] = overlap.overlap([example("Hello there!", disguised, disguised)], [case(QUERY)])
    assert (match.example, match.train_id, match.kind, match.cases) == (0, "7", "identical", ["b1"])


@pytest.mark.parametrize("trained, tested, expected", [
    (f"So: {start(13)} or not", QUERY, ["ngram"]),  # 13 words in a row
    (f"So: {start(12)} or not", QUERY, []),
    (f"Do this: {start(8)} now", start(8), ["ngram"]),  # a whole query of 8 to 12 words
    (f"Do this: {start(7)} now", start(7), []),
    ("你好，请帮我查一下明天北京到上海的航班！谢谢", "请帮我查一下明天北京到上海的航班", ["ngram"]),
])
def test_a_part_of_a_query_counts_from_13_words_on_a_whole_one_from_8(trained, tested, expected):
    assert kinds(example(trained), case(tested)) == expected


def test_small_talk_counts_only_as_the_whole_query_of_both_sides():
    """"Yes, please." is a turn of many API-Bank dialogues and of many training dialogues."""
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


def test_every_benchmark_case_is_found_when_it_is_trained_on(benchmarks):
    assert len({c.id for c in benchmarks}) == 3641 + 639
    leaked = [example(*c.queries, rid=c.id, tools=c.tools) for c in benchmarks]
    matches = [match for match in overlap.overlap(leaked, benchmarks) if match.train_id in match.cases]
    hits = {(match.train_id, match.kind) for match in matches}
    missed = [c for c in benchmarks if any(map(normalise, c.queries)) and (c.id, "identical") not in hits]
    # Dialogues of nothing but small talk, such as "hi", "bye".
    assert len(missed) < 20
    assert all(len(normalise(text)) < overlap.MIN_WORDS for c in missed for text in c.queries)
    assert all((c.id, "tool") in hits for c in benchmarks if c.tools)


@pytest.mark.parametrize("name", ["xlam_rawformat_repacked", "toolace_first100_rawformat_reconstructed"])
def test_the_genuine_training_files_share_no_query_with_the_benchmarks(name, benchmarks):
    trained = load_examples(shared(f"data/train/{name}.json"))[0]
    assert {match.kind for match in overlap.overlap(trained, benchmarks)} == {"tool"}


def test_the_command_lists_and_cleans(tmp_path, monkeypatch):
    """A record goes with all its steps, but not its namesake in another file, nor for a shared tool."""
    monkeypatch.chdir(tmp_path)
    write_examples(Path("a.jsonl"), [example("Add 1.", rid="5#1"), example("Add 1.", QUERY, rid="5#3")])
    replied = example("Add 2.", rid="5#1", tools=("find_it",))
    replied.messages.append({"role": "assistant", "content": QUERY})  # only what the user says is compared
    write_examples(Path("b.jsonl"), [replied])
    write_examples(Path("test.jsonl"), [example(QUERY, rid="t", tools=("findIt",))])
    overlap.main("a.jsonl b.jsonl --test test.jsonl --out m.jsonl --write clean.jsonl".split())
    text = " ".join(normalise(QUERY))
    query = dict(example=1, train_id="5#3", kind="identical", cases=["test t"], text=text)
    tool = dict(example=2, train_id="5#1", kind="tool", cases=["test t"], text="findit")
    assert read_jsonl(Path("m.jsonl")) == [{"file": "a.jsonl"} | query, {"file": "b.jsonl"} | tool]
    assert load_examples("clean.jsonl")[0] == load_examples("b.jsonl")[0]
