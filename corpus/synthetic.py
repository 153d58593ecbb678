"""The demo's data: made-up tools, requests in xLAM's layout, and demonstrations with known flaws."""

from __future__ import annotations

import random
import zlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from corpus.examples import KINDS, Example, Splits
from corpus.sources import DataError
from prompts import ToolCall, parse_completion, render_completion

TEST_QUERIES = 150  # held-out queries in each of the two splits

# Every kind of value belongs to at least three tools: a value held back from one tool is still a known word.
VALUES: dict[str, tuple] = {
    "city": ("Paris", "Oslo", "Lima", "Cairo", "Tokyo", "Rome", "Berlin", "Madrid"),
    "person": ("Anna", "Bob", "Carla", "David", "Emma", "Felix", "Grace", "Henry"),
    "room": ("kitchen", "bedroom", "garage", "cellar", "attic", "office", "hallway", "library"),
    "item": ("lamp", "chair", "table", "sofa", "mirror", "carpet", "kettle", "clock"),
    "number": tuple(range(2, 10)),
}


@dataclass(frozen=True)
class Tool:
    """A synthetic tool. parameters: name -> a key of VALUES. requests: ways to ask for it."""

    name: str
    description: str
    parameters: dict[str, str]
    requests: tuple[str, ...]

    def schema(self) -> dict:
        """The tool in xLAM's layout: flat parameters with Python type names."""
        kinds = self.parameters.items()
        flat = {name: {"type": "int" if kind == "number" else "str"} for name, kind in kinds}
        return {"name": self.name, "description": self.description, "parameters": flat}


TOOLS = (
    Tool("get_weather", "weather of a city", {"city": "city", "days": "number"},
         ("weather in {city} for {days} days", "will it rain in {city} over {days} days")),
    Tool("find_hotel", "hotels in a city", {"city": "city", "nights": "number"},
         ("a hotel in {city} for {nights} nights", "where to sleep in {city} for {nights} nights")),
    Tool("call_taxi", "taxi in a city", {"city": "city", "seats": "number"},
         ("a taxi in {city} with {seats} seats", "a cab for {seats} people in {city}")),
    Tool("find_train", "trains between cities", {"origin": "city", "target": "city"},
         ("a train from {origin} to {target}", "by rail to {target} from {origin}")),
    Tool("send_money", "money to a person", {"person": "person", "amount": "number"},
         ("send {amount} dollars to {person}", "pay {person} {amount} dollars")),
    Tool("set_alarm", "alarm for a person", {"person": "person", "minutes": "number"},
         ("wake {person} in {minutes} minutes", "an alarm for {person} after {minutes} minutes")),
    Tool("plan_meeting", "meeting with a person", {"person": "person", "hour": "number"},
         ("meet {person} at {hour}", "a meeting with {person} at {hour}")),
    Tool("set_light", "light of a room", {"room": "room", "level": "number"},
         ("light in the {room} at {level}", "dim the {room} to {level}")),
    Tool("set_heating", "heating of a room", {"room": "room", "degrees": "number"},
         ("heat the {room} to {degrees} degrees", "{degrees} degrees in the {room}")),
    Tool("play_music", "music in a room", {"room": "room", "volume": "number"},
         ("music in the {room} at volume {volume}", "play songs in the {room} at {volume}")),
    Tool("buy_item", "buys things", {"item": "item", "count": "number"},
         ("buy {count} of the {item}", "order the {item} {count} times")),
    Tool("move_item", "moves things to rooms", {"item": "item", "room": "room"},
         ("move the {item} to the {room}", "carry the {item} into the {room}")),
    Tool("gift_item", "gives things to people", {"item": "item", "person": "person"},
         ("give the {item} to {person}", "surprise {person} with the {item}")),
)

# Requests that no tool serves: half of the cases where the empty list is right. In the other half, the tool
# that would serve the request is not offered.
OFF_TOPIC = (
    ("why is {city} so crowded in {number} of the songs", {"city": "city", "number": "number"}),
    ("tell {number} jokes about {city}", {"city": "city", "number": "number"}),
    ("who was {person} and what are the {number} best stories", {"person": "person", "number": "number"}),
    ("guess the age of {person} with {number} tries", {"person": "person", "number": "number"}),
    ("paint the {room} in {number} colours", {"room": "room", "number": "number"}),
    ("write {number} lines about the {item}", {"item": "item", "number": "number"}),
)

SHARES = (0.15, 0.35, 0.35, 0.15)  # of the four KINDS

# How often a demonstration has each flaw, where it can have it. The flaws are drawn independently, so no
# single habit separates good demonstrations from bad ones.
FLAWS = {
    "number_as_text": 0.55,  # "3" instead of 3
    "value_blank": 0.35,  # "" instead of a word
    "call_dropped": 0.5,  # one of two calls is missing
    "wrong_tool": 0.2,  # another tool of the list is called
    "call_invented": 0.35,  # a tool is called where none fits
}


def _draw_call(tool: Tool, rng: random.Random, strict: bool, prefer: Collection = ()) -> ToolCall:
    """A call of `tool`: all values are held-out ones if `strict`, else none; those in `prefer` go first.

    Held out, so that training never pairs them with this tool, are a quarter of every parameter's values.
    """
    arguments: dict[str, Any] = {}
    for parameter, kind in tool.parameters.items():
        shift = zlib.crc32(f"{tool.name}/{parameter}".encode())
        allowed = [value for i, value in enumerate(VALUES[kind], shift) if (i % 4 == 0) == strict]
        free = [value for value in allowed if value not in arguments.values()]
        arguments[parameter] = rng.choice([value for value in free if value in prefer] or free)
    return ToolCall(tool.name, arguments)


def _demonstration(answer: list[ToolCall], tools: list[Tool], rng: random.Random, flaws: float) -> str:
    """A careless annotator's reply: the right calls, each of FLAWS at `flaws` times its rate, a thought."""

    def strikes(flaw: str) -> bool:
        return rng.random() < flaws * FLAWS[flaw]

    calls = list(answer)
    if len(calls) > 1 and strikes("call_dropped"):
        calls.pop(rng.randrange(len(calls)))
    others = [tool for tool in tools if tool.name not in {call.name for call in answer}]
    if not answer and strikes("call_invented"):
        calls = [_draw_call(rng.choice(tools), rng, strict=False)]
    elif len(calls) == 1 and others and strikes("wrong_tool"):
        calls = [_draw_call(rng.choice(others), rng, strict=False, prefer=calls[0].arguments.values())]
    as_text = strikes("number_as_text")
    blank = strikes("value_blank")

    def write(value: Any) -> Any:
        if isinstance(value, str):
            return "" if blank else value
        return str(value) if as_text else value

    calls = [ToolCall(call.name, {k: write(v) for k, v in call.arguments.items()}) for call in calls]
    think = "use " + " and ".join(call.name for call in calls) if calls else "no tool fits"
    return render_completion(calls, think)


def _synthetic_example(
    index: int, kind: str, rng: random.Random, strict: bool, copies: int, flaws: float
) -> Example:
    tools = rng.sample(TOOLS, 1 if kind == "single" else rng.choice((2, 2, 3)))
    wanted = {"single": tools[:1], "choice": tools[:1], "parallel": tools[:2], "none": []}[kind]
    if kind == "parallel" and rng.random() < 0.5:
        wanted = [tools[0], tools[0]]  # the same tool twice, with other arguments
    absent = [tool for tool in TOOLS if tool not in tools]
    if not wanted and rng.random() < 0.5:
        absent = [Tool("", "", parameters, (request,)) for request, parameters in OFF_TOPIC]
    asked = wanted or [rng.choice(absent)]
    calls: list[ToolCall] = []
    for tool in asked:
        call = _draw_call(tool, rng, strict)
        while call in calls:  # the same tool twice needs other arguments
            call = _draw_call(tool, rng, strict)
        calls.append(call)
    parts = [rng.choice(tool.requests).format(**call.arguments) for tool, call in zip(asked, calls)]
    answer = calls if wanted else []
    rng.shuffle(tools)
    texts = []
    for _ in range(copies):
        state = rng.getstate()
        texts.append(_demonstration(answer, tools, rng, flaws))
        rng.setstate(state)
        _demonstration(answer, tools, rng, 1.0)  # the next query is the same for all `flaws`
    return Example(
        id=f"synthetic-{'strict' if strict else 'fresh'}-{index}",
        source="synthetic",
        messages=[{"role": "user", "content": " and ".join(parts)}],
        tools=[tool.schema() for tool in tools],
        answer=answer,
        demonstrations=tuple(texts if flaws else texts[:1]),  # without flaws all are alike
    )


def synthetic(
    count: int, seed: int, strict: bool = False, exclude: Collection[str] = (), copies: int = 4,
    flaws: float = 1.0,
) -> list[Example]:
    """`count` examples in the four KINDS at their SHARES, no query twice and none of those in `exclude`.

    strict: every argument value is one that training never pairs with that tool. copies: demonstrations per
    query, each with flaws of its own. flaws: factor on the rates of FLAWS; it changes no query, and at 0
    there is one demonstration. The arguments alone decide the result. Raises DataError for too large a count.
    """
    rng = random.Random(f"{seed}/{strict}")
    kinds = rng.choices(KINDS, SHARES, k=count)
    seen, examples = set(exclude), []
    for _ in range(100 * count):
        # A repeated query is drawn again with the same kind, or kinds would not keep their shares.
        example = _synthetic_example(len(examples), kinds[len(examples)], rng, strict, copies, flaws)
        query = example.messages[0]["content"]
        if query not in seen:
            seen.add(query)
            examples.append(example)
        if len(examples) == count:
            break
    if len(examples) < count:
        raise DataError(f"synthetic data: there are not {count} different queries; lower synthetic_train")
    return examples


def _with_thoughts(example: Example, share: float, seed: int) -> Example:
    """The example with a thought in only that share of its demonstrations, drawn for each."""
    texts = []
    for copy, text in enumerate(example.demonstrations):
        keeps = random.Random(f"{seed}/thought/{example.id}/{copy}").random() < share
        texts.append(text if keeps else render_completion(parse_completion(text).calls, ""))
    return replace(example, demonstrations=tuple(texts))


def synthetic_splits(config) -> Splits:
    """The demo's training set and its two held-out sets.

    held_out: fresh queries, none of which is in the training set. strict: every argument value is one that
    the training set never pairs with that tool's parameter.
    """
    train = synthetic(config.synthetic_train, config.seed, flaws=config.synthetic_flaws)
    train = [_with_thoughts(example, config.synthetic_thoughts, config.seed) for example in train]
    queries = {example.messages[0]["content"] for example in train}
    count = min(TEST_QUERIES, config.eval_cases)
    fresh = synthetic(count, config.seed + 10**6, False, queries, copies=0)
    strict = synthetic(count, config.seed + 10**6, True, queries, copies=0)
    return Splits(train, {"held_out": fresh, "strict": strict})
