"""The demo's generated data: what it promises about its splits, its answers and its planted flaws."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from config import Config, load_config
from corpus.examples import KINDS, example_kind
from corpus.layouts import load_xlam
from corpus.sources import DataError
from corpus.synthetic import FLAWS, SHARES, synthetic, synthetic_splits
from corpus.tiny_model import build_tiny_tokenizer
from prompts import parse_completion, render_completion
from reward import score

CONFIG = Path(__file__).parents[1] / "configs" / "tiny.yaml"


@pytest.fixture(scope="module")
def splits():
    return synthetic_splits(load_config(["--config", str(CONFIG)]))


def query(example) -> str:
    return example.messages[0]["content"]


def triples(calls) -> set[tuple]:
    return {(call.name, parameter, value) for call in calls for parameter, value in call.arguments.items()}


def demonstrated(example) -> list[list]:
    return [parse_completion(text).calls for text in example.demonstrations]


# ----------------------------------------------------------------------------------------------- the examples


def test_the_arguments_decide_everything():
    assert synthetic(50, 0) == synthetic(50, 0)
    assert {query(example) for example in synthetic(50, 0)} != {
        query(example) for example in synthetic(50, 1)
    }
    assert all(example.demonstrations == () for example in synthetic(50, 0, copies=0))


def test_kinds_come_at_their_shares(splits):
    counts = Counter(example_kind(example) for example in splits.train)
    for kind, share in zip(KINDS, SHARES):
        assert counts[kind] / len(splits.train) == pytest.approx(share, abs=0.04), kind


def test_answers_fit_the_tools_and_earn_the_reward(splits):
    types = {"int": int, "str": str}
    for example in [*splits.train, *splits.held_out["held_out"], *splits.held_out["strict"]]:
        tools = {tool["name"]: tool["parameters"] for tool in example.tools}
        for call in example.answer:
            declared = {name: types[parameter["type"]] for name, parameter in tools[call.name].items()}
            assert {name: type(value) for name, value in call.arguments.items()} == declared
        assert score(render_completion(example.answer, "so"), example.answer).total == 1.0


def test_a_query_names_every_value_of_its_answer(splits):
    """Otherwise the answer could only be guessed."""
    for example in [*splits.train, *splits.held_out["held_out"], *splits.held_out["strict"]]:
        values = Counter(str(value) for call in example.answer for value in call.arguments.values())
        assert values <= Counter(query(example).split()), query(example)


def test_a_tool_asked_for_twice_has_other_arguments(splits):
    for example in [*splits.train, *splits.held_out["held_out"], *splits.held_out["strict"]]:
        assert len({call.key() for call in example.answer}) == len(example.answer), query(example)


def test_records_are_in_the_layout_of_xlam(splits, tmp_path):
    """Written as xLAM-60k writes them, the examples are read as the same tools, queries and answers."""
    records = [
        {
            "id": example.id,
            "query": query(example),
            "tools": json.dumps(example.tools),
            "answers": json.dumps(
                [{"name": call.name, "arguments": call.arguments} for call in example.answer]
            ),
        }
        for example in splits.train
    ]
    (tmp_path / "x.json").write_text(json.dumps(records))
    examples, dropped = load_xlam(tmp_path / "x.json")
    assert dropped == [] and len(examples) == len(splits.train)
    for read, example in zip(examples, splits.train):
        assert (read.id, read.messages, read.tools) == (example.id, example.messages, example.tools)
        assert read.answer == example.answer
        assert all(set(tool) == {"name", "description", "parameters"} for tool in example.tools)


# ------------------------------------------------------------------------------------------------- the splits


def test_no_query_appears_twice(splits):
    queries = [query(example) for example in splits.train]
    assert len(set(queries)) == len(queries)
    for examples in splits.held_out.values():
        held_out = [query(example) for example in examples]
        assert len(set(held_out)) == len(held_out) and not set(held_out) & set(queries)


@pytest.mark.parametrize("of", ["answers", "demonstrations"])
def test_strict_pairs_no_value_with_a_tool_as_training_does(splits, of):
    trained = set()
    for example in splits.train:
        for calls in [example.answer] if of == "answers" else demonstrated(example):
            trained |= triples(calls)
    strict = set().union(*(triples(example.answer) for example in splits.held_out["strict"]))
    assert strict and strict & trained == set()


def test_strict_uses_only_words_that_training_knows_from_another_tool(splits):
    trained = set().union(*(triples(example.answer) for example in splits.train))
    strict = set().union(*(triples(example.answer) for example in splits.held_out["strict"]))
    assert {value for _, _, value in strict} <= {value for _, _, value in trained}


def test_more_queries_than_there_are_is_an_error(splits, monkeypatch):
    monkeypatch.setattr("synthetic._synthetic_example", lambda *_: splits.train[0])
    with pytest.raises(DataError, match="there are not 9 different queries; lower"):
        synthetic(9, 0)


# ----------------------------------------------------------------------------------------- the demonstrations


def test_demonstrations_have_the_format_and_calls_of_listed_tools(splits):
    for example in splits.train:
        assert len(example.demonstrations) == 4
        for text in example.demonstrations:
            parsed = parse_completion(text)
            assert parsed.error is None
            assert {call.name for call in parsed.calls} <= {tool["name"] for tool in example.tools}


def test_demonstrations_have_flaws_at_their_rates(splits):
    struck = {flaw: [] for flaw in FLAWS}  # one truth value per demonstration that can have the flaw
    for example in splits.train:
        right = {call.name for call in example.answer}
        for calls in demonstrated(example):
            values = [value for call in calls for value in call.arguments.values()]
            numbers = [value for value in values if isinstance(value, int) or value.isdigit()]
            words = [value for value in values if value not in numbers]
            if numbers:
                struck["number_as_text"].append(isinstance(numbers[0], str))
            if words:
                struck["value_blank"].append(words[0] == "")
            if len(example.answer) == 2:
                struck["call_dropped"].append(len(calls) == 1)
            if not example.answer:
                struck["call_invented"].append(calls != [])
            elif len(calls) == 1 and {tool["name"] for tool in example.tools} - right:
                struck["wrong_tool"].append(calls[0].name not in right)
    for flaw, rate in FLAWS.items():
        assert len(struck[flaw]) > 300 and sum(struck[flaw]) / len(struck[flaw]) == pytest.approx(
            rate, abs=0.06
        ), flaw


def test_without_flaws_every_demonstration_is_right():
    for example in synthetic(300, 0, flaws=0.0):
        assert len(example.demonstrations) == 1
        assert score(example.demonstrations[0], example.answer).total == 1.0


@pytest.mark.parametrize("flaws", [0.0, 0.5, 2.0])
def test_the_flaws_change_no_query(flaws):
    """Or comparing clean with flawed demonstrations would compare two data sets."""
    assert [replace(one, demonstrations=()) for one in synthetic(200, 0, flaws=flaws)] == [
        replace(one, demonstrations=()) for one in synthetic(200, 0)
    ]


def test_the_factor_scales_the_rates_up_to_always():
    def right(flaws: float) -> float:
        examples = synthetic(300, 0, flaws=flaws)
        return mean(score(text, e.answer).total for e in examples for text in e.demonstrations)

    assert 1.0 > right(0.1) > right(0.5) > right(1.0) > right(1.5)
    assert (
        right(3.0) == 0.0 and right(100.0) == 0.0
    )  # from 1 / 0.35 on, every flaw but wrong_tool always strikes


def test_the_config_reaches_the_training_set_alone():
    clean = synthetic_splits(load_config(["--config", str(CONFIG), "--synthetic_flaws", "0"]))
    assert all(len(example.demonstrations) == 1 for example in clean.train)
    assert clean.held_out == synthetic_splits(load_config(["--config", str(CONFIG)])).held_out


def test_the_demo_learns_from_the_same_bytes_as_ever(splits):
    """The figures in the README and in bench/RESULTS.md were made with these; a new hash needs new
    figures.
    """
    text = "\n".join(part for example in splits.train for part in (query(example), *example.demonstrations))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "19d15e6a12858f02"


# ----------------------------------------------------------------------------------------- the tiny tokenizer


@pytest.fixture(scope="module")
def tokenizer(splits):
    texts = [query(example) + "".join(example.demonstrations) for example in splits.train]
    return build_tiny_tokenizer(
        [*texts, "2047 " * 9000], 800
    )  # frequent enough to become one token, if digits could


@pytest.mark.parametrize(
    "text",
    ["", " a  b\n\t", "<think>é</think>", "天气 😀 \u2028\x00", "don 't , [1 , 2] .", "\ufeff<|im_end|>"],
)
def test_any_text_survives_the_tiny_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text


def test_a_value_has_the_same_tokens_in_the_query_and_in_the_call(tokenizer, splits):
    """After a space as after a quote: what a small model reads in the query, it can copy into a JSON
    string.
    """

    def ids(text: str) -> str:
        return ",".join(["", *map(str, tokenizer.encode(text, add_special_tokens=False)), ""])

    for example in splits.train[:200]:
        asked, called = ids(query(example)), ids(render_completion(example.answer, "so"))
        for _, _, value in triples(example.answer):
            assert ids(str(value)) in asked and ids(str(value)) in called, value


def test_digits_stay_single(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2047", add_special_tokens=False)] == list("2047")


def test_a_share_of_the_demonstrations_thinks():
    """Which ones is drawn for each; neither queries nor calls change, and the default changes nothing."""
    shares = (1.0, 0.5, 0.0)
    splits = {
        share: synthetic_splits(Config(synthetic_train=60, synthetic_thoughts=share)).train
        for share in shares
    }
    assert splits[1.0] == synthetic(60, 0)
    parsed = {
        share: [parse_completion(d) for e in train for d in e.demonstrations]
        for share, train in splits.items()
    }
    assert all(p.error is None for p in parsed[1.0]) and all(p.error == "no_think" for p in parsed[0.0])
    assert 0.4 < sum(p.error is None for p in parsed[0.5]) / len(parsed[0.5]) < 0.6
    assert len({e.demonstrations[0].startswith("<think>") for e in splits[0.5]}) == 2
    for share in (0.5, 0.0):
        assert [p.calls for p in parsed[share]] == [p.calls for p in parsed[1.0]]
        assert [e.messages for e in splits[share]] == [e.messages for e in splits[1.0]]
