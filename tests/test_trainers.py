"""Our reward in TRL and verl. A reply that a trainer took apart is put together or refused: no silent 0."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_reward import ANSWER, BLOCK, GOOD, TOOL, with_value

import reward
from corpus.replies import reply_text
from reward import compute_score, score, trl_reward

CALLS = [{"name": "tide", "arguments": {"h": 3}}, {"name": "tide", "arguments": {"h": 4.0}}]
LISTED = f"<tool_call>{json.dumps(CALLS)}</tool_call>"
WHOLE = f"<think>three</think>{LISTED}"
WRAPPED = [{"id": "1", "index": 0, "type": "function", "function": call} for call in CALLS]
AS_TEXT = [{"function": call | {"arguments": json.dumps(call["arguments"])}} for call in CALLS]
# What the parser of transformers makes of our list, because it expects one call in a section:
AS_LIST = [{"type": "function", "function": CALLS}]


@pytest.mark.parametrize(
    "message",
    [
        {"content": WHOLE},
        {"content": [{"type": "text", "text": WHOLE[:30]}, {"type": "text", "text": WHOLE[30:], "x": 0}]},
        {"reasoning_content": "three", "content": LISTED, "refusal": None, "annotations": []},
        {"reasoning": "three", "reasoning_content": "three", "content": None, "tool_calls": WRAPPED},
        {"thinking": "three", "content": "", "tool_calls": AS_TEXT},
        {"reasoning_content": "three", "tool_calls": AS_LIST},
        {"reasoning_content": "three", "tool_calls": CALLS},
        {"content": "<think>three</think>", "tool_calls": WRAPPED},
    ],
    ids=lambda message: " ".join(message),
)
def test_a_reply_is_put_together(message):
    assert reply_text(message) == reply_text([message | {"role": "assistant"}]) == WHOLE
    assert trl_reward([None], [[message]], ground_truth=[json.dumps(CALLS)]) == [1.0]


@pytest.mark.parametrize(
    "reply, message",
    [
        ("<think>a</think><tool_call>[]</tool_call>", {"reasoning": "a", "tool_calls": [{"function": []}]}),
        (LISTED + LISTED, {"tool_calls": AS_LIST * 2}),
        (f"Sure!{LISTED}", {"content": "Sure!", "tool_calls": CALLS}),
        ("<think>three</think>", {"reasoning_content": "three", "content": ""}),
        ('<tool_call>[{"name": "f", "arguments": "{oops"}]</tool_call>',
         {"tool_calls": [{"function": {"name": "f", "arguments": "{oops"}}]}),
        ('<tool_call>[{"name": "f", "arguments": {}}]</tool_call>',
         {"tool_calls": [{"name": "f", "arguments": ""}]}),
        ("", {}),
    ],
)
def test_what_the_model_wrote_wrong_stays_wrong(reply, message):
    assert reply_text(message) == reply


@pytest.mark.parametrize(
    "completion",
    [
        None, 5, [], [{"content": WHOLE}] * 2, ["text"], [{"role": "user", "content": WHOLE}],
        {"content": [{"type": "image_url", "image_url": "x"}]}, {"content": 5},
        {"content": WHOLE, "audio": "x"}, {"reasoning": ["a"], "content": LISTED},
        {"reasoning": "a", "reasoning_content": "b", "content": LISTED},
        {"reasoning": "<think>three</think>", "content": LISTED},
        {"reasoning": "three", "content": WHOLE}, {"content": WHOLE, "tool_calls": WRAPPED},
        {"reasoning": "none", "content": "", "tool_calls": []}, {"tool_calls": json.dumps(CALLS)},
        {"tool_calls": [{"type": "custom", "custom": {"name": "f"}}]}, {"tool_calls": [{"function": "f"}]},
    ],
    ids=lambda completion: str(completion)[:60],
)
def test_what_cannot_be_put_together_raises(completion):
    with pytest.raises(ValueError):
        trl_reward([None], [completion], ground_truth=["[]"])


def test_the_parser_of_transformers_and_ours_agree():
    """It moves what stands around the sections, but what pays in full does so before and after."""
    parser = pytest.importorskip("transformers.utils.chat_parsing")
    fields = {
        "reasoning_content": {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"},
        "tool_calls": {
            "open": "<tool_call>", "close_pattern": r"</tool_call>\s*", "repeats": True, "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    }
    template = {"defaults": {"role": "assistant"}, "start_anchor": "assistant\n", "fields": fields}
    empty = "<think>none</think>\n<tool_call>[]</tool_call>"
    for text in (WHOLE, empty, f"Sure! {WHOLE}", LISTED, "<think>a", "hm"):
        message = parser.parse_response(f"{text}<|im_end|>", template, prefix="assistant\n")
        for answer in (CALLS, []):
            assert score(reply_text(message), answer).total == score(text, answer).total, (text, message)


def test_the_functions_for_trl_and_verl():
    truth = json.dumps(ANSWER)
    completions = [GOOD, [{"role": "assistant", "content": GOOD}], [{"role": "assistant"}]]
    rewards = trl_reward(["p"] * 3, completions, ground_truth=[truth, ANSWER, truth], id=["a", "b", "c"])
    assert rewards == [1.0, 1.0, 0.0] and all(isinstance(reward, float) for reward in rewards)
    assert compute_score("toolace", GOOD, truth, {"index": 3}) == 1.0
    assert compute_score("toolace", BLOCK, truth, None, variant="no_reason") == 1.0
    for broken in ("[oops", [{"name": "book", "arguments": {"city": "Oslo", "days": 2, "room": None}}]):
        with pytest.raises(ValueError, match="answer"):  # Arrow fills a list's structs with null
            trl_reward(["p"], [GOOD], ground_truth=[broken])


@pytest.mark.parametrize("column", ["tools", "tools_json"])
@pytest.mark.parametrize("tools", [[TOOL], [{"type": "function", "function": TOOL}], json.dumps([TOOL])])
def test_both_functions_compare_leniently_by_the_tools_of_the_row(column, tools):
    truth, reply = json.dumps([{"name": "f", "arguments": {"x": 2}}]), with_value("2.0")
    columns = {"ground_truth": [truth] * 2, column: [tools, "[]"]}
    assert trl_reward([None] * 2, [reply] * 2, lenient=True, **columns) == [1.0, 0.0]
    assert trl_reward([None] * 2, [reply] * 2, **columns) == [0.0, 0.0]
    assert compute_score("x", reply, truth, {column: tools}, lenient=True) == 1.0
    assert compute_score("x", reply, truth, {column: tools}) == 0.0
    for refused in (
        lambda: trl_reward([None], [reply], ground_truth=[truth], lenient=True),
        lambda: compute_score("x", reply, truth, None, lenient=True),
        lambda: compute_score("x", reply, truth, {column: [{"type": "function"}]}, lenient=True),
    ):
        with pytest.raises(ValueError, match="tool"):
            refused()


def test_a_trainer_executes_the_file_by_its_path(tmp_path):
    """As verl does: not registered, from another folder, beside modules of the trainer with names of ours."""
    for name in ("config", "prompts", "data"):
        (tmp_path / f"{name}.py").write_text("mine = True\n")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/__init__.py").write_text("mine = True\n")
    (tmp_path / "trainer.py").write_text(
        "import importlib.util, sys, config, corpus, prompts\n"
        "spec = importlib.util.spec_from_file_location('anonymous', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "import config, corpus, prompts, data\n"
        "assert config.mine and corpus.mine and prompts.mine and data.mine and len(sys.argv) == 2\n"
        "print(module.compute_score('x', '<think>a</think><tool_call>[]</tool_call>', '[]'))\n"
    )
    words = [sys.executable, "trainer.py", str(Path(reward.__file__))]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "1.0\n", done.stderr
