"""Augmentation: what is taken away leaves [] right; what is renamed is renamed everywhere but in values."""

import copy
import json
import re
from dataclasses import asdict, replace

import pytest
from test_layouts import shared

from corpus.augment import draw_masks, irrelevant_examples, mask_names, masked_examples
from corpus.examples import Example, record_of
from corpus.layouts import load_examples
from corpus.schema import properties
from prompts import ToolCall

FILES = ("xlam_rawformat_repacked.json", "toolace_first100_rawformat_reconstructed.json")


@pytest.fixture(scope="module", params=FILES)
def genuine(request) -> list[Example]:
    return load_examples(shared(f"data/train/{request.param}"))[0]


def tool(name: str, description: str = "Does something.", **parameters) -> dict:
    """Flat parameters as in xLAM: a text is the description of a string, a dict a whole declaration."""
    texts = {name: {"type": "str", "description": one} for name, one in parameters.items()}
    declared = texts | {name: one for name, one in parameters.items() if isinstance(one, dict)}
    return {"name": name, "description": description, "parameters": declared}


RAIN = tool("get_rain", "Rain in a place.", city_name="The town.", days="How many days.")
BOOKS = tool("find_books", "Books by subject.", subject="What they are about.")
NEWS = tool("News Feed", "Latest headlines.", city_name="Where from.")


ANSWER = (ToolCall("get_rain", {"city_name": "Oslo"}),)


def past(*calls: ToolCall, content: str = "") -> list[dict]:
    return [{"role": "assistant", "content": content, "calls": list(calls)}]


def example(query="Rain in Oslo?", tools=(RAIN, BOOKS, NEWS), answer=ANSWER, before=(), rid="7") -> Example:
    messages = [*before, {"role": "user", "content": query}]
    return Example(rid, "xlam", messages, list(tools), list(answer), ("a thought",))


def masked_with(plain: Example) -> tuple[Example, dict[str, str]]:
    """(the masked example, mask -> name), the names read from the two tool lists side by side."""
    masked, names = mask_names(plain, 0), {}
    for old, new in zip(plain.tools, masked.tools, strict=True):
        names |= zip([new["name"], *properties(new)], [old["name"], *properties(old)], strict=True)
    return masked, {mask: name for mask, name in names.items() if mask != name}


def as_text(one: Example) -> str:
    return json.dumps([one.messages, one.tools, one.answer], default=asdict)


WHERE = dict(lat="", lon="", day="")
SNOW = tool("get_snow", "Snow depth of one station.", city_name="The town.", days="How many days.")
IRRELEVANT = {  # and how many examples they give
    "nothing is called already": (example(answer=[]), 0),
    "no tool remains": (example(tools=[RAIN]), 0),
    "a past call may have used what is gone": (example(before=past(ToolCall("find_books", {}))), 0),
    "a result names what is gone": (example(before=past(content='[{"name": "get_rain"}]')), 0),
    "its twin by name": (example(tools=[RAIN, tool("GetRain V2", "Water.")]), 0),
    "its twin by description": (example(tools=[RAIN, tool("precipitation", "The rain in a place.")]), 0),
    "its twin by parameters": (example(tools=[tool("get_rain", **WHERE), tool("wetness", "", **WHERE)]), 0),
    "two parameters in common say nothing": (example(tools=[RAIN, SNOW]), 1),
    "a user may ask for what is not there": (example("Use get_rain for Oslo."), 1),
}


@pytest.mark.parametrize(("plain", "count"), IRRELEVANT.values(), ids=IRRELEVANT)
def test_no_example_where_the_empty_list_could_be_wrong(plain, count):
    assert len(irrelevant_examples([plain], 1.0, 0)) == count


def test_genuine_irrelevant_examples(genuine):
    by_id = {f"{one.id}#irrelevant": one for one in genuine}
    made = irrelevant_examples(genuine, 1.0, 0)
    assert len(made) > len(genuine) / 2
    for one in made:
        plain, called = by_id[one.id], {call.name for call in by_id[one.id].answer}
        assert one.tools == [tool for tool in plain.tools if tool["name"] not in called] != []
        same = replace(plain, id=one.id, tools=one.tools, answer=[], demonstrations=())
        assert replace(one, record=plain.record) == same and record_of(one) == record_of(plain)


def test_masking_can_be_undone_to_the_last_character(genuine):
    """So a rename has lost nothing. Each argument that the conversation showed is still shown."""
    before = copy.deepcopy(genuine)
    for plain, masked in zip(genuine, masked_examples(genuine, 1.0, 0), strict=True):
        one, back = masked_with(plain)
        shown, still = ("\n".join(message["content"] for message in e.messages) for e in (plain, one))
        values = [str(value) for call in plain.answer for value in call.arguments.values()]
        assert [value for value in values if value in shown and value not in still] == []
        text = as_text(one)
        for mask, name in back.items():
            text = text.replace(mask, json.dumps(name)[1:-1])
        assert text == as_text(plain) and one == masked
        assert (one.id, one.source, one.demonstrations) == (f"{plain.id}#masked", plain.source, ())
        assert record_of(one) == record_of(plain)
    assert genuine == before


def test_masking_hides_nearly_all_names_behind_random_ones(genuine):
    names = hidden = 0
    for plain in genuine:
        back = masked_with(plain)[1]
        names += len({name for tool in plain.tools for name in [tool["name"], *properties(tool)]})
        hidden += len(back)
        assert len({mask.lower() for mask in back}) == len(set(back.values()))  # one mask per name
        for mask in back:
            assert re.fullmatch(r"[A-Za-z][A-Za-z0-9]{4,14}", mask) and re.search(r"[a-z][A-Z]|\d", mask)
            assert mask.lower() not in as_text(plain).lower()
    assert hidden > 0.95 * names


@pytest.mark.parametrize("text, expected", [
    ("By city_name, not my_city_name, city_names.", "By <city_name>, not my_city_name, city_names."),
    ("Any news feed? Call `find_books`.", "Any news feed? Call `<find_books>`."),
    ("The News Feed of today, TikTok Likes.", "The News Feed of today, TikTok Likes."),
    ('"News Feed of Oslo", "The News Feed"', '"News Feed of Oslo", "The News Feed"'),
    ('From "News Feed", or the News Feed tool.', 'From "<News Feed>", or the <News Feed> tool.'),
    ("Set sortBy, text1, filter[id], a.b, a.b.c.", "Set <sortBy>, <text1>, <filter[id]>, <a.b>, <a.b.c>."),
    ("My GSTIN, mp3, e-mail, City.", "My GSTIN, mp3, e-mail, City."),  # words, too
    ('[{"name": "Rain", "is": "Rain in May"}]', '[{"name": "<Rain>", "is": "Rain in May"}]'),  # a result
])
def test_texts_lose_the_names_that_no_ordinary_word_looks_like(text, expected):
    names = "sortBy a.b a.b.c text1 filter[id] GSTIN mp3 e-mail City".split()
    tools = [RAIN, BOOKS, NEWS, tool("Rain"), tool("TikTok Likes")]
    tools.append(tool("t", **dict.fromkeys(names, "Some text.")))
    masked, back = masked_with(example(text, tools))
    shown = masked.messages[-1]["content"]
    for mask, name in back.items():
        shown = shown.replace(mask, f"<{name}>")
    assert shown == expected and set(names) <= set(back.values())


def test_both_lists_of_required_parameters_and_inner_fields():
    """ToolACE lists `required` beside `parameters`, JSON Schema inside. Inner fields keep their names."""

    def move(name: str, address: str, city: str) -> dict:
        field = {"anyOf": [{"description": f"Unlike {city}.", "format": "city_name"}]}
        inner = {"description": "Where.", "properties": {"street_no": field}, "required": ["street_no"]}
        declared = {address: inner, city: {"type": "str", "description": "Town."}}
        schema = {"type": "object", "properties": declared, "required": [address, "unknown", {}]}
        return {"name": name, "description": f"Or {name}.", "parameters": schema, "required": [city]}

    masked, back = masked_with(example(tools=[move("move_to", "address", "city_name")], answer=[]))
    assert list(back.values()) == ["move_to", "address", "city_name"]
    assert masked.tools == [move(*back)]


KEPT = {
    "inside a value": ("News Feed", dict(answer=[ToolCall("get_rain", {"days": ["my News Feed, 2"]})])),
    "a value is part of it": ("city_name", dict(answer=[ToolCall("get_rain", {"days": "City"})])),
    "an enum": ("city_name", dict(tools=[RAIN, tool("t", by={"items": {"enum": ["city_name"]}})])),
    "a key inside a value": ("subject", dict(answer=[ToolCall("get_rain", {"days": {"subject": 1}})])),
    "not declared": ("subject", dict(tools=[BOOKS, RAIN], answer=[ToolCall("get_rain", {"subject": "a"})])),
    "not described": ("city_name", dict(tools=[tool("get_rain", city_name=" "), NEWS])),
    "described by its name": ("city_name", dict(tools=[tool("get_rain", city_name="city_name.")])),
}


@pytest.mark.parametrize(("name", "changes"), KEPT.values(), ids=KEPT)
def test_names_that_are_kept(name, changes):
    masked, back = masked_with(example("By city_name.", **changes))
    assert name not in back.values() and name in as_text(masked) and back  # others are masked


@pytest.mark.parametrize("made_of", [irrelevant_examples, masked_examples])
def test_seed_and_id_alone_decide(made_of):
    def made(examples: list[Example], share: float, seed: int) -> dict[str, Example]:
        return {one.id: one for one in made_of(examples, share, seed) if "#" in one.id}

    pool = [example(rid=f"{i}") for i in range(1000)]
    some = made(pool, 0.3, 5)
    assert 250 < len(some) < 350 and made(pool, 0.0, 5) == {} and made(pool, 0.3, 6).keys() != some.keys()
    assert made(pool[::-2], 0.3, 5) == {rid: one for rid, one in some.items() if int(rid.split("#")[0]) % 2}
    assert draw_masks(pool[0], 0) != draw_masks(pool[1], 0) != draw_masks(pool[1], 1)
    drawn = draw_masks(example(), 0)["get_rain"]  # a name that the example contains is drawn again
    assert drawn != draw_masks(example(f"Code {drawn.upper()}."), 0)["get_rain"]
