"""Dialogues -> examples: one for every turn that calls, in the dialects of ToolACE, ShareGPT, Hermes, Glaive
and OpenAI.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from corpus.examples import Dropped, Example, Unusable
from corpus.replies import THOUGHTS, text_of
from corpus.rules import Rules, check_arguments, check_names, names_call
from corpus.schema import read_calls, read_tools
from corpus.toolace import parse_toolace_calls, read_literals
from prompts import ToolCall

ROLES = {  # by the words of the known files, in lower case and with underscores
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "tool_call": "assistant", "tool_calls": "assistant",
    "tool": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool",
    "tool_result": "tool", "ipython": "tool",
    "function": "tool",  # in OpenAI's layout; in ShareGPT's it may hold a call
    "system": "system", "developer": "system",
}
CALLERS = ("function_call", "tool_call", "tool_calls")  # these turns hold calls alone
STRUCTURED = ("calls", "tool_calls", "function_call")  # keys under which a turn may list its calls
READ = ("from", "role", "value", "content", *STRUCTURED)
TRIED = 100  # lists of objects in a system text that may be its tools
# Keys that say nothing which the prompt shows; nor are past thoughts shown, as thinking models have it.
UNSHOWN = ("id", "name", "tool_call_id", "type", "weight", "loss", "train", *THOUGHTS)

# Some files leave out how a thought begins, because their prompts end in it.
_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*|.*?</think>[ \t]*\n\s*", re.DOTALL)
_TAGGED = re.compile(
    r"<(tool_call|function_?call)>(.*?)(?:</\1>|<\|endoftext\|>|\Z)", re.DOTALL | re.IGNORECASE
)
_FENCED = re.compile(r"\A\s*```\w*\n(.*?)\n?```\s*\Z", re.DOTALL)
_RESULT = re.compile(r"\s*<(tool_response|function_response)>(.*)</\1>\s*", re.DOTALL)
_NEXT_RESULT = re.compile(r"(?:(?<!\s)\s*+)?</(tool_response|function_response)>\s*<\1>\s*")


@dataclass(frozen=True)
class Turn:
    """role: user, assistant, tool or system. calls: those of an assistant's turn, None where it is text.

    problem: why it must not pass for text although no calls could be read; "" if it may.
    """

    role: str
    content: str
    calls: list[ToolCall] | None = None
    problem: str = ""

    @property
    def called(self) -> bool:
        """Whether the assistant called something here, readable or not."""
        return self.calls is not None or bool(self.problem)

    def message(self) -> dict:
        """The turn as a message of an example."""
        message = {"role": self.role, "content": self.content}
        return message if self.calls is None else message | {"calls": self.calls}


def speaker_of(turn: Any) -> str | None:
    """Who speaks, as a key of ROLES; None for what is no turn."""
    speaker = (turn.get("from") or turn.get("role")) if isinstance(turn, dict) else None
    word = str(speaker).lower().replace("-", "_")
    return word if word in ROLES else None


def read_turn(turn: Any, index: int) -> Turn:
    """A turn with the calls that its keys list; its text stays text. Raises Unusable for an unknown role or
    key, and for content that is no text.
    """
    if (speaker := speaker_of(turn)) is None:
        raise Unusable("bad_turn", f"turn {index} has an unknown role: {str(turn)[:80]}")
    told = {key for key, value in turn.items() if value not in (None, "", [], {})}
    if unknown := sorted(told - {*READ, *UNSHOWN}):
        raise Unusable("bad_turn", f"turn {index} has keys that are not known: {', '.join(unknown)}")
    value = turn.get("value")
    try:
        content = text_of(turn.get("content") if value is None else value)
    except ValueError as error:
        raise Unusable("bad_turn", f"turn {index}: {error}") from None
    role = ROLES[speaker]
    if role in ("tool", "user") and (inner := _RESULT.fullmatch(content)):  # Qwen shows results as a user's
        role, content = "tool", _NEXT_RESULT.sub("\n", inner[2]).strip()
    elif role == "assistant" and (thought := _THOUGHT.match(content)):
        content = content[thought.end() :]
    listed = next((turn[key] for key in STRUCTURED if key in told), [])
    if listed and role != "assistant":
        raise Unusable("bad_turn", f"turn {index} is of role {role}, and calls")
    try:
        calls = read_calls(listed)
    except ValueError as error:
        return Turn(role, content or json.dumps(listed), None, f"cannot read the calls: {error}")
    return Turn(role, _TAGGED.sub("", content).strip(), calls) if calls else Turn(role, content)


def read_turns(turns: Sequence[Any], names: Sequence[str]) -> list[Turn]:
    """The turns of a dialogue, with calls that stand in their texts. names: of the tools. Raises Unusable.

    An assistant's turn before a tool's result has called, whether its calls can be read or not.
    """
    read: list[Turn] = []
    for index, turn in enumerate(turns):
        one, speaker = read_turn(turn, index), speaker_of(turn)
        if not one.called and (one.role == "assistant" or speaker == "function"):
            one = _with_calls(one, names, speaker in CALLERS)
        before = read[-1] if read else one
        if one.role == "tool" and before.role == "assistant" and not before.called:
            problem = f"a result follows, but no call can be read: {before.content[:80]!r}"
            read[-1] = replace(before, problem=problem)
        read.append(one)
    return read


def _with_calls(turn: Turn, names: Sequence[str], alone: bool) -> Turn:
    """The turn with the calls of its text: ToolACE's notation, JSON, or either in the tags of Hermes or
    Glaive or in a code block. alone: its role says that it holds calls and nothing else.
    """
    text = turn.content
    tagged = [match[2] for match in _TAGGED.finditer(text)]
    prose = _TAGGED.sub("", text).strip() if tagged else ""
    sure = alone or bool(tagged)
    read = [_read_block(block, names, sure) for block in tagged or [_FENCED.sub(r"\1", text)]]
    if all(read) and "<think>" not in prose:  # half an answer is none, and a thought that does not end is
        return Turn("assistant", prose, list(chain(*read)))
    if turn.role == "tool":  # "function" in OpenAI's sense: a result
        return turn
    # An empty list is a failed conversion in the known files, not a refusal.
    if sure or text.lstrip().startswith("["):
        return replace(turn, problem=f"cannot read the calls: {turn.content[:80]!r}")
    return turn


def _read_block(block: str, names: Sequence[str], sure: bool) -> list[ToolCall] | None:
    """The calls of a text, or None. Where nothing else says that it calls, JSON must have arguments."""
    # Any name, because a call of an unknown tool deserves its own reason.
    if (calls := parse_toolace_calls(block, names, any_name=True)) is not None:
        return calls
    if not block.lstrip().startswith(("[", "{")):
        return None
    try:
        values = read_literals(block)
        listed = list(chain(*(value if isinstance(value, list) else [value] for value in values)))
        clear = sure or all({"arguments", "function"} & set(one) for one in listed)
        return read_calls(listed) if clear else None
    except (ValueError, SyntaxError, TypeError, RecursionError):
        return None


def system_text(system: Any, said: Any) -> str:
    """What a record says as the system, in a field of its own and in its turns."""
    turns = said if isinstance(said, list) else []
    texts = [turn.get("value") or turn.get("content") for turn in turns if speaker_of(turn) == "system"]
    return "\n".join(text for text in (system, *texts) if isinstance(text, str))


def find_tools(text: str) -> list[dict] | None:
    """The tools that a system text lists, or None: its first JSON list of tools, or Hermes' objects in a tag.

    Other brackets ("[func1(...)]") are skipped, and lists after the first TRIED: each may take long to read.
    """
    decoder = json.JSONDecoder()
    for found in islice(re.finditer(r"\[(?=\s*\{)", text), TRIED):
        try:
            tools = read_tools(decoder.raw_decode(text, found.start())[0])
        except (ValueError, RecursionError):
            continue
        # "parameters" tells tools from a list of named things inside a tool list that is itself broken.
        if all("parameters" in tool for tool in tools):
            return tools
    tagged, closed, _ = text.partition("<tools>")[2].partition("</tools>")
    try:
        return read_tools(read_literals(tagged)) if closed else None
    except (ValueError, SyntaxError, RecursionError):
        return None


def steps(
    said: list, tools: list[dict], origin: tuple[str, str, int], rules: Rules, system: Any = None
) -> Iterator[Example | Dropped]:
    """One example per call turn of a dialogue, with id "record#turn": all before the turn is context.

    Calls in consecutive turns are one answer. System text that lists the tools is left out: our prompt lists
    them already, and it asks for another notation of calls. origin: id, source and line of the record.
    system: text that stands outside of the turns.
    """
    rid, source, line = origin
    if not isinstance(said, list):
        raise Unusable("missing_field", f"the turns are no list: {str(said)[:80]}")
    names = [tool["name"] for tool in tools]
    turns = read_turns(said, names)
    messages = system_messages(system, tools)
    stepless = True
    at = 0
    while at < len(turns):
        end = at + 1
        while turns[at].called and end < len(turns) and turns[end].called:
            end += 1
        step = f"{rid}#{at}"
        if turns[at].called or (rules.no_call_turns and turns[at].role == "assistant"):
            stepless = False
            try:
                answer = answer_of(turns, at, end, tools)
                check_arguments(answer, tools, rules)
                yield Example(step, source, list(messages), tools, answer)
            except Unusable as error:  # only this step: it is context of the later ones all the same
                yield error.dropped(step, line)
        messages += _context(turns[at:end], names)
        at = end
    if stepless:
        if any(turn.role == "assistant" and names_call(turn.content, tools) for turn in turns):
            raise Unusable("unparsable_calls", "a text seems to call a tool, in a notation that is not known")
        raise Unusable("no_calls", "no turn of the conversation is a call")


def answer_of(turns: list[Turn], at: int, end: int, tools: list[dict]) -> list[ToolCall]:
    """The calls of turns `at` to before `end`, or [] for a text that shows that no call was right.

    Such a text answers a user or results and says something. Not so one after which the assistant goes on by
    itself ("One moment, I will look that up."), nor one that writes a call of a listed tool.
    """
    if not turns[at].called:
        text = turns[at].content
        answers = at > 0 and turns[at - 1].role in ("user", "tool")
        goes_on = turns[end].role == "assistant" if end < len(turns) else False
        if not answers or goes_on or not text.strip() or names_call(text, tools):
            raise Unusable("unclear_turn", f"the text does not show that no call was right: {text[:80]!r}")
        return []
    if problems := [turn.problem for turn in turns[at:end] if turn.problem]:
        raise Unusable("unparsable_calls", problems[0])
    calls = [call for turn in turns[at:end] for call in turn.calls]
    check_names(calls, tools)
    return calls


def _context(turns: list[Turn], names: list[str]) -> list[dict]:
    """The turns as messages; calls in consecutive ones are one message, unreadable ones stay text."""
    if len(turns) == 1 or any(turn.problem for turn in turns):
        return [turn.message() for turn in turns if turn.role != "system" or not _lists_tools(turn, names)]
    calls = [call for turn in turns for call in turn.calls]
    content = "\n".join(turn.content for turn in turns if turn.content)
    return [{"role": "assistant", "content": content, "calls": calls}]


def system_messages(system: Any, tools: list[dict]) -> list[dict]:
    """The system text of a record's own field as messages: none where it is empty or lists the tools."""
    turn = read_turn({"role": "system", "content": system}, 0)
    return _context([turn], [tool["name"] for tool in tools]) if turn.content else []


def _lists_tools(turn: Turn, names: list[str]) -> bool:
    if '"parameters"' not in turn.content:
        return False
    return all(name in turn.content or json.dumps(name)[1:-1] in turn.content for name in names)


def is_single_turn(record: Any) -> bool:
    """Whether a record has at most one call turn, after at most one user message (without calls: in all)."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    turns = turns if isinstance(turns, list) else []
    calls = [index for index, turn in enumerate(turns) if _seems_to_call(turn)]
    asked = turns[: calls[0]] if calls else turns
    return len(calls) <= 1 and sum(ROLES.get(speaker_of(turn)) == "user" for turn in asked) <= 1


def _seems_to_call(turn: Any) -> bool:
    speaker = speaker_of(turn)
    text = str(turn.get("value", turn.get("content"))) if speaker else ""
    opens = ROLES.get(speaker) == "assistant" and (text.lstrip().startswith("[") or _TAGGED.search(text))
    return speaker in CALLERS or bool(opens)
