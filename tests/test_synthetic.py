"""The demo's generated data and tokenizer: what they promise about splits, answers, flaws and words."""

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from config import Config, load_config
from corpus.examples import KINDS, example_kind
from corpus.synthetic import FLAWS, SHARES, synthetic, synthetic_splits
from corpus.tiny_model import build_tiny_tokenizer
from prompts import parse_completion, render_completion
from reward import score

CONFIG = ["--config", str(Path(__file__).parents[1] / "configs" / "tiny.yaml")]


@pytest.fixture(scope="module")
def splits():
    return synthetic_splits(load_config(CONFIG))


def query(example) -> str:
    return example.messages[0]["content"]


def triples(lists_of_calls) -> set[tuple]:
    calls = [call for calls in lists_of_calls for call in calls]
    return {(call.name, parameter, value) for call in calls for parameter, value in call.arguments.items()}


def demonstrated(examples) -> list[list]:
    return [parse_completion(text).calls for example in examples for text in example.demonstrations]


def test_the_demo_learns_from_the_same_bytes_as_ever(splits):
    """The README's figures were made with these; a new hash needs new figures."""
    text = "\n".join(part for example in splits.train for part in (query(example), *example.demonstrations))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "19d15e6a12858f02"
    kinds = list(map(example_kind, splits.train))
    assert [kinds.count(kind) / len(kinds) for kind in KINDS] == pytest.approx(SHARES, abs=0.04)


def test_answers_fit_the_tools_and_the_query(splits):
    """A query names every value of its answer, or the answer could only be guessed."""
    for example in [*splits.train, *splits.held_out["held_out"], *splits.held_out["strict"]]:
        tools = {tool["name"]: tool["parameters"] for tool in example.tools}
        for call in example.answer:
            declared = {name: parameter["type"] for name, parameter in tools[call.name].items()}
            assert {name: type(value).__name__ for name, value in call.arguments.items()} == declared
        values = Counter(str(value) for call in example.answer for value in call.arguments.values())
        assert values <= Counter(query(example).split()), query(example)
        assert score(render_completion(example.answer, "so"), example.answer).total == 1.0


def test_no_query_appears_twice(splits):
    trained = set(map(query, splits.train))
    assert len(trained) == len(splits.train)
    for examples in splits.held_out.values():
        assert len(set(map(query, examples)) - trained) == len(examples) == 150


def test_strict_pairs_no_value_with_a_tool_as_training_does_but_knows_every_word(splits):
    trained = triples(example.answer for example in splits.train)
    strict = triples(example.answer for example in splits.held_out["strict"])
    assert strict and not strict & (trained | triples(demonstrated(splits.train)))
    assert {value for _, _, value in strict} <= {value for _, _, value in trained}


def test_demonstrations_have_flaws_at_their_rates(splits):
    struck = {flaw: [] for flaw in FLAWS}  # one truth value per demonstration that can have the flaw
    for example in splits.train:
        right = {call.name for call in example.answer}
        for calls in demonstrated([example]):
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
    assert all(len(hits) > 300 for hits in struck.values())
    assert {flaw: mean(hits) for flaw, hits in struck.items()} == pytest.approx(FLAWS, abs=0.06)


def test_the_flaws_change_no_query_and_no_held_out_case(splits):
    """Or comparing clean with flawed demonstrations would compare two data sets."""
    few, many = ([replace(one, demonstrations=()) for one in synthetic(200, 0, flaws=x)] for x in (0.5, 2.0))
    assert few == many
    clean = synthetic_splits(load_config([*CONFIG, "--synthetic_flaws", "0"]))
    assert {len(example.demonstrations) for example in clean.train} == {1}
    assert clean.held_out == splits.held_out


@pytest.mark.parametrize("share, spread", [(1.0, 0.0), (0.5, 0.1), (0.0, 0.0)])
def test_a_share_of_the_demonstrations_thinks_and_no_call_changes(share, spread):
    train = synthetic_splits(Config(synthetic_train=60, synthetic_thoughts=share)).train
    errors = [parse_completion(text).error for e in train for text in e.demonstrations]
    assert set(errors) <= {None, "no_think"} and abs(errors.count(None) / len(errors) - share) <= spread
    assert demonstrated(train) == demonstrated(synthetic(60, 0))
    assert list(map(query, train)) == list(map(query, synthetic(60, 0)))


@pytest.fixture(scope="module")
def tokenizer(splits):
    texts = [query(example) + "".join(example.demonstrations) for example in splits.train]
    return build_tiny_tokenizer([*texts, "2047 " * 9000], 800)  # would become one token, if digits could


@pytest.mark.parametrize("text", ["", " a  b\n\t", "<think>é</think>", "天气 😀\u2028\x00\ufeff<|im_end|>"])
def test_any_text_survives_the_tiny_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text


def test_a_value_has_the_same_tokens_in_the_query_and_in_the_call(tokenizer, splits):
    """After a space as after a quote: what a small model reads, it can copy. Digits stay single."""

    def ids(text: str) -> str:
        return ",".join(["", *map(str, tokenizer.encode(text, add_special_tokens=False)), ""])

    for example in splits.train[:200]:
        for _, _, value in triples([example.answer]):
            assert ids(str(value)) in ids(query(example)), value
            assert ids(str(value)) in ids(render_completion(example.answer, "so")), value
    assert ids("2047") == "," + "".join(ids(digit)[1:] for digit in "2047")
