"""ToolRL's rows -> examples.

    instruction             input                           output
    1. Name: …              **Dialogue Records History**    <think> … </think>
    Description: …          <user> … </user>                <tool_call>
    Parameters: {JSON}      <think>, <tool_call>, <obs>     {"name": …, "parameters": {…}}
    2. Name: …              and <response> likewise         </tool_call>
"""

from __future__ import annotations

import re

from corpus.dialogues import Turn, answer_of
from corpus.examples import Example, Unusable
from corpus.rules import Rules, check_arguments, decode
from corpus.schema import read_calls
from prompts import ToolCall, parse_completion, render_completion

# Names, descriptions and texts may hold anything, so only what follows says where they end.
_TOOL = re.compile(
    r"(\d+)\. Name: (?>(.*?)\nDescription: )(.*?)\nParameters: (\{[^\n]*\})\s*"
    r"(?=\d+\. Name: |\*\*Steps for Each Turn\*\*|\Z)",
    re.DOTALL,
)
_SECTION = re.compile(
    r"<(user|think|tool_call|response|obs)>(.*?)</\1>\s*(?=<(?:user|think|tool_call|response|obs)>|\Z)",
    re.DOTALL,
)
_HISTORY = "**Dialogue Records History**"
# The thought ends at the first closing tag. Two blocks of calls are no JSON, and so are refused.
_REPLY = re.compile(
    r"(?:<think>(?>(.*?)</think>)\s*)?(?:<tool_call>(.*)</tool_call>\s*)?(?:<response>(.*+)(?<=</response>))?",
    re.DOTALL,
)
ROLES = {"user": "user", "response": "assistant", "obs": "tool"}


def read_row(instruction: str, history: str, output: str, rid: str, rules: Rules, imitate: bool) -> Example:
    """The example of a row: the calls of its output, which are right, after the dialogue. Raises Unusable.

    A text beside the calls is left out: our format has no place for it. An output without calls is a text
    turn. imitate: whether the output becomes a demonstration. One whose thought speaks of our tags does not:
    the reward refuses such thoughts, and they explain another format.
    """
    tools = _read_tools(instruction)
    turns = _read_history(history)
    reply = _REPLY.fullmatch(output.strip())
    if not reply or reply[2] is reply[3] is None:
        detail = "the output is not one thought and one block of calls, or a response"
        raise Unusable("unparsable_calls", f"{detail}: {output[:80]!r}")
    thought, block, text = (part and part.removesuffix("</response>").strip() for part in reply.groups())
    if block is None and not rules.no_call_turns:
        raise Unusable("no_calls", "the output is a response without calls")
    last = Turn("assistant", text or "", None if block is None else _read_calls(block))
    answer = answer_of([*turns, last], len(turns), len(turns) + 1, tools)
    check_arguments(answer, tools, rules)
    demonstration = render_completion(answer, thought or "")
    good = imitate and parse_completion(demonstration).error is None
    messages = [turn.message() for turn in turns]
    return Example(rid, "toolrl", messages, tools, answer, (demonstration,) if good else ())


def _read_tools(instruction: str) -> list[dict]:
    """The tools of the numbered list. Its numbers tell where one could not be read."""
    first = re.search(r"^1\. Name: ", instruction, re.MULTILINE)
    at = first.start() if first else len(instruction)
    tools = []
    while match := _TOOL.match(instruction, at):
        number, name, description, text = match.groups()
        if int(number) != len(tools) + 1:
            raise Unusable("no_tools", f"tool {len(tools) + 1} of the list is followed by number {number}")
        parameters = decode(text, f"parameters of tool {number}")
        tools.append({"name": name, "description": description, "parameters": parameters})
        at = match.end()
    if not tools or instruction[at : at + 1].isdigit():
        what = "Name, Description and a JSON object of Parameters, each at the start of a line"
        raise Unusable("no_tools", f"tool {len(tools) + 1} of the numbered list is not {what}")
    return tools


def _read_history(history: str) -> list[Turn]:
    """The turns before the answer, without past thoughts."""
    text = history.strip().removeprefix(_HISTORY).lstrip()
    turns, at = [], 0
    while match := _SECTION.match(text, at):
        kind, said = match[1], match[2].strip()
        if kind == "tool_call":
            turns.append(Turn("assistant", "", _read_calls(said)))
        elif kind != "think":
            turns.append(Turn(ROLES[kind], said))
        at = match.end()
    if at < len(text):
        raise Unusable("bad_turn", f"the dialogue has text outside of its sections: {text[at : at + 80]!r}")
    return turns


def _read_calls(block: str) -> list[ToolCall]:
    """One call a line, at least one."""
    try:
        if calls := read_calls([line for line in block.split("\n") if line.strip()]):
            return calls
    except ValueError as error:
        raise Unusable("unparsable_calls", f"one JSON call a line is wanted: {error}") from None
    raise Unusable("unparsable_calls", "the block of calls is empty")
