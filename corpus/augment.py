"""More examples from the same data: tools taken away, so that [] is right, and names replaced by random ones.

Tool-N1's reference implementation has both, unused by default: irrelevance at a rate of 0.15, and masking,
which is Hammer's idea (arXiv 2410.04587), at a ratio of 0.67. Seed and example id decide every choice.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from corpus.examples import Example, record_of
from corpus.schema import properties
from prompts import ToolCall

# Names that no ordinary word looks like: sortBy, user_id, text1, /email/check, filter[id]; not mp3 or e-mail.
CODE = re.compile(r"[a-z][A-Z]|_|[./:\[]|[A-Za-z]{3}\d$")


def _chosen(share: float, seed: int, purpose: str, example: Example) -> bool:
    return random.Random(f"{seed}/{purpose}/{example.id}").random() < share


def _overlap(a: set, b: set) -> float:
    return len(a & b) / len(a | b) if a and b else 0.0


def _alike(tool: dict, other: dict) -> bool:
    """Whether `other` may do what `tool` does. A false alarm costs one example, a miss teaches an error."""
    names = [re.sub(r"[\W_]", "", one["name"].lower()) for one in (tool, other)]
    names = [re.sub(r"^(get|fetch|retrieve)|(api)?(v\d+)?$", "", name) for name in names]
    words = [set(re.findall(r"\w+", str(one.get("description") or "").lower())) for one in (tool, other)]
    if names[0] == names[1] or _overlap(*words) >= 0.6:
        return True
    # Below three parameters, sharing them says little: many unrelated tools take a `domain` or a `username`.
    declared = [set(properties(one)) for one in (tool, other)]
    return len(declared[0] | declared[1]) >= 3 and _overlap(*declared) >= 0.8


def _without_answer(example: Example) -> Example | None:
    """The example without the tools of its answer, "id#irrelevant"; None where [] might then be wrong."""
    called = {call.name for call in example.answer}
    rest = [tool for tool in example.tools if tool["name"] not in called]
    gone = [tool for tool in example.tools if tool["name"] in called]
    if not gone or not rest or any(message.get("calls") for message in example.messages):
        return None
    # Results and calls kept as plain text name tools, too. The user may: then the tool is simply not there.
    said = [message.get("content") or "" for message in example.messages if message["role"] != "user"]
    if any(name in text for name in called for text in said) or any(_alike(a, b) for a in gone for b in rest):
        return None
    name, record = f"{example.id}#irrelevant", record_of(example)
    return replace(example, id=name, tools=rest, answer=[], demonstrations=(), record=record)


def irrelevant_examples(examples: Sequence[Example], rate: float, seed: int) -> list[Example]:
    """New examples whose right answer is []: of a share `rate` of the input, without the tools of its answer.

    None is made where no tool remains, a like one remains, or an earlier turn calls or names what is gone.
    """
    made = [_without_answer(example) for example in examples if _chosen(rate, seed, "irrelevance", example)]
    return [example for example in made if example is not None]


def _values(node: Any, inside: bool) -> list[str]:
    """Texts, keys and numbers of a JSON value: all if `inside`, else those of its enums and defaults."""
    if isinstance(node, dict):
        inner = [text for k, one in node.items() for text in _values(one, inside or k in ("enum", "default"))]
        return [*node, *inner] if inside else inner
    if isinstance(node, list):
        return [text for value in node for text in _values(value, inside)]
    return [str(node)] if inside else []


def _described(tools: list[dict]) -> dict[str, bool]:
    """Name of a tool or parameter -> whether every description of it says more than the name."""
    found: dict[str, bool] = {}
    for tool in tools:
        for name, one in [(tool["name"], tool), *properties(tool).items()]:
            text = one.get("description") if isinstance(one, dict) else None
            says = isinstance(text, str) and re.search(r"[^\W\d_]", text.replace(name, "")) is not None
            found[name] = says and found.get(name, True)
    return found


def _random_name(rng: random.Random, lengths: tuple[int, int], taken: str) -> str:
    """Letters and digits that stand nowhere in `taken`, and are no word: with a digit or an inner capital."""
    while True:
        name = "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randint(*lengths)))
        if name[0].isalpha() and re.search(r"[a-z][A-Z]|\d", name) and name.lower() not in taken:
            return name


def draw_masks(example: Example, seed: int) -> dict[str, str]:
    """Name -> random name, one mask per name, for the tools and their parameters but no field inside those.

    A name stays when nothing describes it, when a call gives it undeclared, or when a text that shows a value
    could lose it with the name: the name is a word of an argument, enum or default, or contains an argument.
    """
    declared = {tool["name"]: set(properties(tool)) for tool in example.tools}
    past = [call for message in example.messages for call in message.get("calls") or ()]
    undeclared, arguments = set(), []
    for call in example.answer + past:
        arguments += _values(list(call.arguments.values()), True)
        undeclared |= call.arguments.keys() - declared.get(call.name, set())
    text = "\n".join(arguments + _values(example.tools, False))
    parts = {value.lower() for value in arguments if len(value) > 1}
    taken, masks = repr(example).lower(), {}
    rng = random.Random(f"{seed}/names/{example.id}")
    for name, described in _described(example.tools).items():
        shown = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)
        if described and not shown and name not in undeclared and not any(p in name.lower() for p in parts):
            masks[name] = _random_name(rng, (8, 15) if name in declared else (5, 10), taken)
            taken += f" {masks[name].lower()}"
    return masks


def _mask_text(text: str, masks: dict[str, str], tools: set[str]) -> str:
    """The text with masks for the names in it that are surely meant as names.

    Those are code-like names as whole words; tool names of several words, quoted or before "tool" or
    "function"; any tool after `"name": `, as in a result.
    """
    found = sorted((name for name in masks if name in text), key=len, reverse=True)  # the longest name wins
    listed = [name for name in found if name in tools]
    spaced = [name for name in listed if " " in name]
    places = [
        (r"(?<!\w)", [name for name in found if " " not in name and CODE.search(name)], r"(?!\w)"),
        (r"""(?<=["'`])""", spaced, r"""(?=["'`])"""),
        (r"(?<!\w)", spaced, r"(?= (?:tool|function)\b)"),
        (r"""(?:(?<=["']name["']: ["'])|(?<=["']name["']:["']))""", listed, """(?=["'])"""),
    ]
    parts = [f"{left}(?:{'|'.join(map(re.escape, names))}){right}" for left, names, right in places if names]
    return re.sub("|".join(parts), lambda match: masks[match[0]], text) if parts else text


def _mask_prose(node: Any, masks: dict[str, str], tools: set[str], key: str = "") -> Any:
    """A copy of a declaration with masks in all its descriptions, at any depth."""
    if isinstance(node, dict):
        return {name: _mask_prose(inner, masks, tools, name) for name, inner in node.items()}
    if isinstance(node, list):
        return [_mask_prose(inner, masks, tools) for inner in node]
    is_prose = key in ("description", "title") and isinstance(node, str)
    return _mask_text(node, masks, tools) if is_prose else node


def _mask_tool(tool: dict, masks: dict[str, str], tools: set[str]) -> dict:
    made = _mask_prose(tool, masks, tools)
    made["name"] = masks.get(tool["name"], tool["name"])
    declared, parameters = properties(made), made.get("parameters")
    if declared:
        renamed = {masks.get(name, name): one for name, one in declared.items()}
        made["parameters"] = renamed if declared is parameters else parameters | {"properties": renamed}
        for holder in (made, made["parameters"]):  # ToolACE lists the required ones beside `parameters`
            if isinstance(names := holder.get("required"), list):
                holder["required"] = [masks.get(n, n) if n in list(declared) else n for n in names]
    return made


def _mask_calls(calls: list[ToolCall], masks: dict[str, str]) -> list[ToolCall]:
    renamed = [{masks.get(name, name): value for name, value in call.arguments.items()} for call in calls]
    return [ToolCall(masks.get(call.name, call.name), one) for call, one in zip(calls, renamed)]


def mask_names(example: Example, seed: int) -> Example:
    """The example with masks in its tools, calls and texts, as "id#masked"; itself where no name has a mask.

    Demonstrations are left out: a thought may say a name in words that no rule finds.
    """
    masks = draw_masks(example, seed)
    if not masks:
        return example
    names = {tool["name"] for tool in example.tools}
    tools = [_mask_tool(tool, masks, names) for tool in example.tools]
    messages = [dict(message) for message in example.messages]
    for message in messages:
        message["content"] = _mask_text(message.get("content") or "", masks, names)
        if message.get("calls"):
            message["calls"] = _mask_calls(message["calls"], masks)
    name, answer = f"{example.id}#masked", _mask_calls(example.answer, masks)
    record = record_of(example)
    return Example(name, example.source, messages, tools, answer, record=record)


def masked_examples(examples: Sequence[Example], ratio: float, seed: int) -> list[Example]:
    """The examples in their order, each with probability `ratio` masked: descriptions have to be read."""
    return [mask_names(one, seed) if _chosen(ratio, seed, "masking", one) else one for one in examples]
