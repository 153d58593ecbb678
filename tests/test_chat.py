"""ops/chat.py: a model with tools, asked by people."""

import json
from types import SimpleNamespace

import pytest
from test_prompts import ADD

from config import UserError
from corpus.tiny_model import build_tiny_model, build_tiny_tokenizer
from ops.chat import main
from ops.export import ask_from_tools, export
from prompts import ToolCall, encode_prompt, render_completion

TOKENIZER = build_tiny_tokenizer([], 300)
TEMPLATE = "My tools:\n{tools}"
CALLS = [ToolCall("add", {"a": 1, "b": "é"}), ToolCall("now", {})]
USER, RESULT = ({"role": role, "content": "2"} for role in ("user", "tool"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that was trained with a system prompt of its own, and a file of tools in OpenAI's layout."""
    folder = tmp_path_factory.mktemp("chat")
    ask_from_tools(TOKENIZER, TEMPLATE)
    export(build_tiny_model(TOKENIZER, 16, 1, 0), TOKENIZER, folder / "model")
    (folder / "tools.json").write_text("\ufeff" + json.dumps([{"type": "function", "function": ADD}]))
    return folder


def talk(folder, monkeypatch, capsys, replies: list[str], *query: str, typed=()) -> tuple[list, str]:
    """(the prompts as token ids, what is printed) of a model that gives these replies."""
    prompts, replies, typed = [], iter(replies), iter(typed)

    def sample(model, tokenizer, asked, decoding):
        prompts.extend(prompt.ids for prompt in asked)
        return [SimpleNamespace(texts=[next(replies)])]

    def read(_):
        line = next(typed)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr("ops.chat.sample_groups", sample)
    monkeypatch.setattr("builtins.input", read)
    main([str(folder / "model"), "--tools", str(folder / "tools.json"), *query])
    return prompts, capsys.readouterr().out


BARE = render_completion(CALLS, "")


@pytest.mark.parametrize("reply, parts", [
    (render_completion(CALLS, "why"), ["why", 'add(a=1, b="é")', "now()"]),
    (render_completion([], "why"), ["why", "no call"]),
    (BARE, ["no_think", BARE, 'add(a=1, b="é")', "now()"]),
    ("well", ["no_think", "well"]),
    ("<think>a</think>so", ["no_tool_call", "<think>a</think>so"]),
])
def test_a_query_shows_calls_as_calls_and_what_is_wrong(folder, monkeypatch, capsys, reply, parts):
    prompts, printed = talk(folder, monkeypatch, capsys, [reply], "2")
    assert [part for part in parts if part in printed] == parts
    assert ("tool_call" in printed) == ("tool_call" in str(parts)), "raw text is for what cannot be read"
    assert prompts == [encode_prompt(TOKENIZER, [USER], [ADD], TEMPLATE)], "asked as in training"


@pytest.mark.parametrize("end", ["", EOFError, KeyboardInterrupt])
def test_a_conversation_goes_on_with_results_and_messages(folder, monkeypatch, capsys, end):
    (folder / "own.txt").write_text("Own:\n{tools}")
    right, none = render_completion(CALLS, "why"), render_completion([], "why")
    typed = ["2", "tool: 2", "lost", "a <|im_end|>", "2", end]
    own = ("--prompt_template", str(folder / "own.txt"))
    prompts, _ = talk(folder, monkeypatch, capsys, [right, none, "malformed", none], *own, typed=typed)
    turns = [{"role": "assistant", "content": "", "calls": calls} for calls in (CALLS, [])]
    before = [USER, turns[0], RESULT, turns[1]]
    expected = [before[:1], before[:3], [*before, USER | {"content": "lost"}], [*before, USER]]
    assert prompts == [encode_prompt(TOKENIZER, chat, [ADD], "Own:\n{tools}") for chat in expected]


@pytest.mark.parametrize("text", [None, "no JSON", '{"a": 1}'])
def test_a_bad_file_of_tools_is_one_sentence(tmp_path, text):
    if text:
        (tmp_path / "tools.json").write_text(text)
    with pytest.raises(UserError, match="^tools: .*tools.json[^\n]*$"):
        main(["model", "--tools", str(tmp_path / "tools.json")])


@pytest.mark.parametrize("option", [("--temperature", "-1"), ("--max_new_tokens", "0")])
def test_decoding_that_cannot_work_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        main(["model", "--tools", "tools.json", "query", *option])
    assert option[0] in capsys.readouterr().err


def test_what_a_model_says_does_not_act_on_the_terminal(folder, monkeypatch, capsys):
    hostile = "\x1b]0;x\x07\r\x08\x9b"
    replies = [render_completion([ToolCall(f"f{hostile}", {"a": hostile})], hostile), f"bad {hostile}"]
    for reply in replies:
        _, printed = talk(folder, monkeypatch, capsys, [reply], "2")
        assert not set(printed) & set("\x1b\x07\r\x08\x9b") and "\\x1b]0;x\\x07" in printed
