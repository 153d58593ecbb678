"""The small inputs of ../shared/cases give the values that stand beside them."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from test_layouts import shared

from config import Config
from corpus.layouts import load_examples, read_examples
from corpus.rules import Rules
from corpus.sources import DataError
from data import load_splits
from prompts import load_template
from reward import RewardError, reward_function

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name, kept, reasons", [
    ("02-openai-function-wrapper/ours_wrapped.jsonl", 1, {}),
    ("02-openai-function-wrapper/sharegpt_wrapped.jsonl", 1, {}),
    ("02-openai-function-wrapper/xlam_wrapped.jsonl", 2, {}),
    ("03-openai-string-arguments/ours_tool_calls.jsonl", 2, {}),
    ("03-openai-string-arguments/xlam_string_args.jsonl", 1, {}),
    ("04-openai-messages-rows/messages_tools.jsonl", 1, {}),
    ("04-openai-messages-rows/swift_agent.jsonl", 1, {}),
    ("05-hermes-tags-in-gpt-turn/bare_json.jsonl", 1, {}),
    ("05-hermes-tags-in-gpt-turn/glaive_sharegpt.jsonl", 1, {}),
    ("05-hermes-tags-in-gpt-turn/hermes.jsonl", 1, {}),
    ("05-hermes-tags-in-gpt-turn/prose_then_call.jsonl", 2, {"unparsable_calls": 1}),
    ("05-hermes-tags-in-gpt-turn/react.jsonl", 0, {"unparsable_calls": 1}),
    ("11-file-shapes/bom_crlf.jsonl", 3, {}), ("11-file-shapes/comment_header.jsonl", 3, {"broken_json": 1}),
    ("11-file-shapes/gz_named_json.jsonl", 3, {}), ("11-file-shapes/plain_named_gz.jsonl.gz", 3, {}),
    ("11-file-shapes/nan_row.jsonl", 1, {"broken_json": 5, "wrong_type": 2}),
    ("11-file-shapes/two_members.jsonl.gz", 6, {}), ("34-sharegpt-role-names/roles.jsonl", 6, {}),
])
def test_files_give_their_examples(name, kept, reasons):
    examples, dropped = load_examples(shared(f"cases/{name}"))
    assert (len(examples), Counter(one.reason for one in dropped)) == (kept, reasons)
    with_text_turns = read_examples(shared(f"cases/{name}"), rules=Rules(no_call_turns=True))
    called = [one.id for read in with_text_turns for one in read.examples if one.answer]
    assert called == [one.id for one in examples], "each holds these calls, and they never become []"


@pytest.mark.parametrize("name, said", [
    ("array_trailing_comma.json", "cannot be read"), ("columns.json", "orient='records'"),
    ("concatenated.jsonl", "several objects on one line"), ("cr_only.jsonl", "several objects on one line"),
    ("pretty_objects.json", "objects over several lines"), ("saved_dataset", "save_to_disk"),
    ("saved_datasetdict", "save_to_disk"), ("trailing_comma.jsonl", "commas between"),
    ("trailing_comma_last_ok.jsonl", "commas between"), ("utf16.jsonl", "UTF-8"),
    ("wrapped_object.json", "around the array"), ("wrapped_pretty.json", "around the array"),
])
def test_a_file_of_another_shape_is_refused_with_what_it_is(name, said):
    with pytest.raises(DataError, match=said):
        load_examples(shared(f"cases/11-file-shapes/{name}"))


@pytest.mark.parametrize("name", ["01-parquet-null-filled/nested.parquet", "11-file-shapes/sharded"])
def test_parquet(name):
    pytest.importorskip("pyarrow")
    examples, _ = load_examples(shared(f"cases/{name}"))
    assert len(examples) == 3
    if name.startswith("01"):
        source, _ = load_examples(shared("cases/01-parquet-null-filled/nested_source.jsonl"))
        assert repr(examples) == repr(source)


def test_prompts_and_splits():
    [policy], _ = load_examples(shared("cases/06-system-policy-dropped/policy.jsonl"))
    assert "Today is 2024-05-15" in policy.messages[0]["content"]
    splits = load_splits(Config(data=str(shared("cases/07-ids-with-hash/hash_ids.jsonl"))))
    assert (len(splits.train), len(splits.held_out["held_out"])) == (36, 4)
    assert load_template(str(shared("cases/17-prompt-template/bom.txt"))).startswith("Use")


@pytest.mark.parametrize("name, paid", [
    ("main_guardless", 1.0), ("numpy_value", 0.5), ("shadowed", 0.5), ("with_dataclass", 0.5),
    ("with_helper", 0.5), ("async_pay", None), ("exits", None), ("trl_style", None),
])
def test_reward_files(name, paid):
    pay = reward_function(f"{shared(f'cases/16-own-reward-file/{name}.py')}:pay")
    if paid is None:
        with pytest.raises(RewardError, match=f"{name}.py:pay"):
            pay("", [], [])
    else:
        assert pay("", [], []).total == paid


@pytest.mark.parametrize("script, lines", [
    ("29-verl-loader/load_like_verl.py", 1), ("30-trl-structured-messages/structured.py", 3),
])
def test_trainers(script, lines):
    command = [sys.executable, str(shared(f"cases/{script}")), str(ROOT)]
    assert subprocess.run(command, capture_output=True, text=True).stdout.split() == ["1.0"] * lines
