"""BFCL's multi-turn part: dialogues in the simulated worlds of the package bfcl-eval, judged by its checker.

In a turn of the user the model calls tools step by step and sees their results; a reply that calls nothing
ends the turn. Worlds, tools, gold calls and the checker are those of the package, which holds its data. Here
is the dialogue around them, and what keeps text of a model from being run as code.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from math import inf
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

from config import first_line
from evals.bfcl_check import decode
from evals.bfcl_data import MULTI_TURN, prompt_tools, whole_characters
from evals.report import ReportError, read_objects
from prompts import END_THINK, PromptError, ToolCall, encode_prompt

TOO_LONG = "prompt_too_long"
REMEDY = "pip install --no-deps bfcl-eval==2026.3.23"
NO_TOOL = "no_such_tool"  # stands for a name that is no tool's: unlike that, it cannot be a name of Python's
# Whole numbers beyond these make the worlds compute for hours, or fill the memory; no gold call comes near.
LARGEST, LARGEST_SIZE = 10**18, 10_000
SIZES = ("exponent", "precision", "decimal_places")


@dataclass(frozen=True)
class Scenario:
    """One dialogue as the package describes it.

    turns: the user's messages, turn by turn. answer: the gold calls of every turn, as Python text. entry: the
    package's own record, which its functions take. tools: those at the start. withheld: turn -> tools that
    appear with it, in place of a message.
    """

    id: str
    category: str
    turns: list[list[dict]]
    answer: list[list[str]]
    entry: dict
    tools: list[dict]
    withheld: dict[int, list[dict]]


@dataclass(frozen=True)
class Package:
    """What is used of bfcl-eval. execution: the module that runs calls, and keeps the worlds as globals."""

    data: Path
    documents: dict[str, str]  # class of a world -> file of its tools
    execution: ModuleType
    check: Callable[..., dict]
    new_tools: str  # what the user says where withheld tools appear
    max_steps: int


@functools.cache
def package() -> Package:
    """The installed bfcl-eval. Raises ReportError where it is missing or laid out in another way."""
    try:
        import bfcl_eval
        from bfcl_eval.constants import default_prompts, executable_backend_config
        from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_checker, multi_turn_utils

        return Package(
            Path(bfcl_eval.__file__).parent / "data",
            executable_backend_config.MULTI_TURN_FUNC_DOC_FILE_MAPPING, multi_turn_utils,
            multi_turn_checker.multi_turn_checker,
            default_prompts.DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC,
            default_prompts.MAXIMUM_STEP_LIMIT,
        )
    except Exception as error:  # it is the user's, and may be of another version
        why = f"BFCL's multi-turn part is played and judged by the package bfcl-eval ({first_line(error)})"
        raise ReportError(f"{why}; {REMEDY}") from None


def load_scenarios(categories: Iterable[str] = MULTI_TURN, limit: int | None = None) -> list[Scenario]:
    """The first `limit` scenarios of each category. Raises ReportError and DataError."""
    scenarios = []
    for category in categories:
        name = f"BFCL_v4_{category}.json"
        data = package().data
        answers = {row.get("id"): row for _, row in read_objects(data / "possible_answer" / name)}
        for number, entry in islice(read_objects(data / name), limit):
            try:
                scenarios.append(_scenario(entry, category, answers[entry["id"]]["ground_truth"]))
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                what = f"not a scenario of BFCL ({error!r})"
                raise ReportError(f"{data / name}:{number}: {what}; {REMEDY}") from None
    return scenarios


def _scenario(entry: dict, category: str, answer: list[list[str]]) -> Scenario:
    tools = [tool for name in entry["involved_classes"] for tool in _tools_of(name)]
    withheld = {}
    for turn, names in entry.get("missed_function", {}).items():
        withheld[int(turn)] = [tool for tool in tools if tool["name"] in names]
        tools = [tool for tool in tools if tool["name"] not in names]
    return Scenario(entry["id"], category, entry["question"], answer, entry, tools, withheld)


@functools.cache
def _tools_of(world: str) -> list[dict]:
    path = package().data / "multi_turn_func_doc" / package().documents[world]
    return prompt_tools([tool for _, tool in read_objects(path)], "python")


# -------------------------------------------------------------------------------------------------- execution


def read_calls(text: str) -> list[ToolCall] | None:
    """The calls of a reply, read as everywhere in BFCL; None where no list of calls can be read."""
    decoded = decode(whole_characters(text))
    if decoded is None:
        return None
    calls = [ToolCall(name, arguments) for call in decoded for name, arguments in call.items()]
    if not all(isinstance(call.name, str) and isinstance(call.arguments, dict) for call in calls):
        return None
    return calls


def allowed_calls(scenario: Scenario, calls: Sequence[ToolCall]) -> list[ToolCall]:
    """The calls of a reply as they may be run: what names no tool of these worlds has become NO_TOOL().

    The package evaluates calls as Python text, so names, and names of arguments, must be harmless; values are
    written as literals.
    """
    names = _tool_names(tuple(scenario.entry["involved_classes"]))
    stand_in = ToolCall(NO_TOOL, {})
    return [call if call.name in names and is_plain(call) else stand_in for call in calls]


def is_plain(call: ToolCall) -> bool:
    """Whether a call is one also as Python text, and not one that computes for hours."""
    if hasattr(builtins, call.name) or not all(name.isidentifier() for name in (call.name, *call.arguments)):
        return False
    for key, value in call.arguments.items():
        if type(value) is int and abs(value) > LARGEST:
            return False
        if key in SIZES and isinstance(value, (int, float)) and abs(value) > LARGEST_SIZE:
            return False
    return True


@functools.cache
def _tool_names(worlds: tuple[str, ...]) -> set[str]:
    """The public methods of these classes, which are what the package lets a model call."""
    names = set()
    for world in worlds:
        module = import_module(package().execution.CLASS_FILE_PATH_MAPPING[world])
        methods = inspect.getmembers(getattr(module, world), inspect.isfunction)
        names.update(name for name, _ in methods if not name.startswith("_"))
    return names


def call_text(call: ToolCall) -> str:
    """A call as the package wants it: Python text with literals."""
    return f"{call.name}({','.join(f'{key}={value!r}' for key, value in call.arguments.items())})"


def _release(owner: str) -> None:
    """Drops the worlds whose names begin with `owner`; the package would keep them for ever."""
    worlds = vars(package().execution)
    for name in [name for name in worlds if name.startswith(owner)]:
        del worlds[name]


# --------------------------------------------------------------------------------------------------- dialogue


def seed_of(name: str) -> int:
    """A seed that follows from a name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1


class Dialogue:
    """A scenario being played. outputs: the replies so far, turn by turn. skipped: why it ended early.

    messages, tools: what the next reply is asked with. input_tokens, output_tokens: of all prompts and all
    replies; where the last prompt was too long, of that one alone.
    """

    def __init__(self, scenario: Scenario, sample: int = 0) -> None:
        self.scenario = scenario
        self.sample = sample
        self.messages: list[dict] = []
        self.tools = list(scenario.tools)
        self.outputs: list[list[str]] = []
        self.input_tokens = self.output_tokens = 0
        self.over = False
        self.skipped = ""
        self._owner = f"world_{uuid4().hex}"
        self._next_turn()

    def take(self, text: str) -> None:
        """The model's reply: runs its calls and adds their results, or goes on to the next turn."""
        self.outputs[-1].append(text)
        calls = read_calls(text)
        message = {"role": "assistant", "content": ""}
        if calls is None:  # past thoughts are not shown, as in training
            answer = whole_characters(text.rpartition(END_THINK)[2])
            self.messages.append(message | {"content": answer.strip()})
        else:
            self.messages.append(message | {"calls": calls})
        if not calls:
            self._next_turn()
            return
        self.messages += [{"role": "tool", "content": result} for result in self._execute(calls)]
        if len(self.outputs[-1]) > package().max_steps:
            self._end()

    def seed(self, seed: int) -> int:
        """Of the next reply: a function of its place, whatever else is asked."""
        place = (seed, "evaluation", self.scenario.id, self.sample, len(self.outputs), len(self.outputs[-1]))
        return seed_of("/".join(map(str, place)))

    def stop(self, reason: str) -> None:
        """Ends it before its time: no reply can be asked for."""
        self.skipped = reason
        self._end()

    def _next_turn(self) -> None:
        turn = len(self.outputs)
        if turn == len(self.scenario.turns):
            self._end()
            return
        self.outputs.append([])
        if turn in self.scenario.withheld:
            self.tools += self.scenario.withheld[turn]
            self.messages.append({"role": "user", "content": package().new_tools})
        self.messages += self.scenario.turns[turn]

    def _execute(self, calls: Sequence[ToolCall]) -> list[str]:
        entry, allowed = self.scenario.entry, allowed_calls(self.scenario, calls)
        results, _ = package().execution.execute_multi_turn_func_call(
            [call_text(call) for call in allowed], entry["initial_config"], entry["involved_classes"],
            self._owner, entry["id"], long_context="long_context" in self.scenario.category,
        )
        return results

    def _end(self) -> None:
        self.over = True
        _release(self._owner)


def play(
    dialogues: Iterable[Dialogue], answer: Callable[[list[Dialogue]], None], at_once: int
) -> Iterator[Dialogue]:
    """Plays `at_once` dialogues side by side, and yields each when it is over.

    answer: gives every dialogue of a list its next reply, by `take`, or ends it, by `stop`.
    """
    waiting = iter(dialogues)
    alive: list[Dialogue] = []
    while alive := [*alive, *islice(waiting, at_once - len(alive))]:
        answer(alive)
        yield from (dialogue for dialogue in alive if dialogue.over)
        alive = [dialogue for dialogue in alive if not dialogue.over]


@dataclass(frozen=True)
class Player:
    """Asks a model for the next replies of dialogues. decoding: of one reply a prompt (rollout.Decoding)."""

    model: Any
    tokenizer: Any
    template: str
    decoding: Any
    max_prompt_tokens: int
    seed: int = 0
    heartbeat: Callable[[], None] = lambda: None

    def answer(self, alive: list[Dialogue]) -> None:
        """For `play`. A prompt that is too long or refused ends its dialogue."""
        from kernel.decode import Prompt  # here, because both import torch
        from rollout import sample_groups

        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", inf)
        asked = {}
        for dialogue in alive:
            try:
                ids = encode_prompt(self.tokenizer, dialogue.messages, dialogue.tools, self.template)
            except PromptError as error:
                dialogue.stop(str(error))
                continue
            if len(ids) > self.max_prompt_tokens:
                dialogue.input_tokens = len(ids)
                dialogue.stop(TOO_LONG)
                continue
            if len(ids) + self.decoding.max_new_tokens > positions:
                dialogue.stop(f"prompt and reply are longer than the model's {positions} positions")
                continue
            asked[dialogue] = Prompt(dialogue.scenario.id, ids, dialogue.seed(self.seed))
        if not asked:
            return
        prompts = list(asked.values())
        groups = sample_groups(self.model, self.tokenizer, prompts, self.decoding, heartbeat=self.heartbeat)
        for (dialogue, prompt), group in zip(asked.items(), groups):
            dialogue.input_tokens += len(prompt.ids)
            dialogue.output_tokens += len(group.responses[0])
            dialogue.take(group.texts[0])


# --------------------------------------------------------------------------------------------------- verdicts


def find_fault(
    scenario: Scenario, outputs: list[list[str]], skipped: str = ""
) -> tuple[str, str] | None:
    """(error type, why in words) by the official checker, or None for a right dialogue.

    outputs, skipped: those of a Dialogue.
    """
    if skipped:
        return "multi_turn:inference_error", f"no reply could be asked for in turn {len(outputs)}: {skipped}"
    if len(outputs) != len(scenario.answer):
        why = f"the dialogue has {len(outputs)} turns and not {len(scenario.answer)}: too many steps in one"
        return "multi_turn:force_terminated", why
    turns = []
    for replies in outputs:
        called = [allowed_calls(scenario, calls) for calls in map(read_calls, replies) if calls]
        turns.append([[call_text(call) for call in calls] for calls in called])
    owner = f"judged_{uuid4().hex}"
    try:
        verdict = package().check(turns, scenario.answer, scenario.entry, scenario.category, owner)
    finally:
        _release(owner)
    return None if verdict["valid"] else (verdict["error_type"], verdict["error_message"])


def official_result(scenario: Scenario, outputs: list[list[str]], skipped: str = "") -> list[list[str]] | str:
    """What the official command is told: per step the JSON list of calls as text, or "null" for none.

    Of a dialogue that ended early no more than why, as officially.
    """
    if skipped:
        return skipped
    turns = []
    for replies in outputs:
        steps = []
        for calls in map(read_calls, replies):
            allowed = allowed_calls(scenario, calls or ())
            steps.append("null" if calls is None else json.dumps([call.as_dict() for call in allowed]))
        turns.append(steps)
    return turns
