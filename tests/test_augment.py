"""Augmentation: what is taken away leaves [] right, and what is renamed is renamed everywhere, values
excepted.

The genuine files decide: a rename that can be undone to the last character has lost nothing.
"""

import copy
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from corpus import augment
from corpus.augment import draw_masks, irrelevant_examples, mask_names, masked_examples
from corpus.examples import Example
from corpus.layouts import load_examples
from corpus.schema import missing_arguments, properties, required, wrong_types
from prompts import ToolCall

SHARED = Path(__file__).parents[2] / "shared" / "data" / "train"
FILES = ("xlam_rawformat_repacked.json", "toolace_first100_rawformat_reconstructed.json")


@pytest.fixture(scope="module", params=FILES)
def genuine(request) -> list[Example]:
    if not (SHARED / request.param).exists():
        pytest.skip(f"shared/data/train/{request.param} is not beside this checkout")
    return load_examples(SHARED / request.param)[0]


def tool(name: str, description: str = "Does something.", **parameters) -> dict:
    """Flat parameters as in xLAM: a text is the description of a string, a dict a whole declaration."""
    declared = {
        k: {"type": "str", "description": v} if isinstance(v, str) else v for k, v in parameters.items()
    }
    return {"name": name, "description": description, "parameters": declared}


RAIN = tool("get_rain", "Rain in a place.", city_name="The town.", days="How many days.")
BOOKS = tool("find_books", "Books by subject.", subject="What they are about.")
NEWS = tool("News Feed", "Latest headlines.", city_name="Where from.")


def example(
    query="Will it rain in Oslo?", tools=(RAIN, BOOKS, NEWS), answer=None, before=(), **changes
) -> Example:
    answer = [ToolCall("get_rain", {"city_name": "Oslo"})] if answer is None else answer
    made = Example(
        "7", "xlam", [*before, {"role": "user", "content": query}], list(tools), answer, ("a demonstration",)
    )
    return replace(made, **changes)


def masks_between(plain: Example, masked: Example) -> dict[str, str]:
    """Mask -> name, read from the two tool lists side by side."""
    pairs = {}
    for old, new in zip(plain.tools, masked.tools, strict=True):
        names = zip([old["name"], *properties(old)], [new["name"], *properties(new)], strict=True)
        pairs |= {mask: name for name, mask in names if mask != name}
    return pairs


def as_text(one: Example) -> str:
    return json.dumps([one.messages, one.tools, one.answer], default=asdict)


def all_calls(one: Example) -> list[ToolCall]:
    return [*one.answer, *(call for message in one.messages for call in message.get("calls") or ())]


def masked_text(text: str, **changes) -> str:
    """The query `text` after masking, with the names' masks turned into <name> for reading."""
    plain = example(text, **changes)
    masked = mask_names(plain, 0)
    text = masked.messages[-1]["content"]
    for mask, name in masks_between(plain, masked).items():
        text = text.replace(mask, f"<{name}>")
    return text


# ------------------------------------------------------------------------------------------------ irrelevance


def test_the_tools_of_the_answer_are_gone_and_nothing_is_to_be_called():
    plain = example(
        answer=[ToolCall("get_rain", {"city_name": "Oslo"}), ToolCall("News Feed", {"city_name": "Oslo"})]
    )
    [made] = irrelevant_examples([plain], 1.0, 0)
    assert made == replace(plain, id="7#irrelevant", tools=[BOOKS], answer=[], demonstrations=())


CALLED = {"role": "assistant", "content": "", "calls": [ToolCall("find_books", {"subject": "rain"})]}
UNSUITABLE = {
    "nothing is called already": example(answer=[]),
    "no tool remains": example(tools=[RAIN]),
    "a past call may have used what is gone": example(before=[CALLED]),
    "a result names what is gone": example(
        before=[{"role": "tool", "content": '[{"name": "get_rain", "results": 3}]'}]
    ),
    "its twin by name": example(tools=[RAIN, tool("GetRain V2", "Water.")]),
    "its twin by name, in other words": example(tools=[RAIN, tool("Rain API", "Water.")]),
    "its twin by description": example(tools=[RAIN, tool("precipitation", "The rain in a place.")]),
    "its twin by parameters": example(
        tools=[
            tool("get_rain", "Rain.", lat="", lon="", day=""),
            tool("wetness", "Water.", day="", lat="", lon=""),
        ]
    ),
}


@pytest.mark.parametrize("why", UNSUITABLE)
def test_no_example_where_the_empty_list_could_be_wrong(why):
    assert irrelevant_examples([UNSUITABLE[why]], 1.0, 0) == []


def test_tools_that_only_resemble_each_other_may_remain():
    # Two parameters in common say nothing, and the user may ask for a tool that is not there.
    other = tool("get_snow", "Snow depth of one station.", city_name="The town.", days="How many days.")
    assert len(irrelevant_examples([example("Use get_rain for Oslo.", tools=[RAIN, other])], 1.0, 0)) == 1


def test_genuine_irrelevant_examples(genuine):
    before, by_id = copy.deepcopy(genuine), {one.id: one for one in genuine}
    made = irrelevant_examples(genuine, 1.0, 0)
    assert genuine == before  # the new examples share their tools and messages with the old ones
    assert len(made) > len(genuine) / 2
    for one in made:
        plain = by_id[one.id.removesuffix("#irrelevant")]
        called = {call.name for call in plain.answer}
        assert one.tools == [tool for tool in plain.tools if tool["name"] not in called] != []
        assert (one.answer, one.messages, one.source) == ([], plain.messages, plain.source)
        assert one.id.split("#")[0] == plain.id.split("#")[0]  # the split by record keeps the two together


# ---------------------------------------------------------------------------------------------------- masking


def test_masking_can_be_undone_to_the_last_character(genuine):
    before = copy.deepcopy(genuine)
    masked = masked_examples(genuine, 1.0, 0)
    assert genuine == before
    for plain, one in zip(genuine, masked, strict=True):
        text = as_text(one)
        for mask, name in masks_between(plain, one).items():
            text = text.replace(mask, json.dumps(name)[1:-1])
        assert text == as_text(plain)
        assert (one.id, one.source, one.demonstrations) == (f"{plain.id}#masked", plain.source, ())


def test_masking_hides_nearly_all_names_behind_random_ones(genuine):
    names = hidden = 0
    for plain, one in zip(genuine, masked_examples(genuine, 1.0, 0)):
        back = masks_between(plain, one)
        names += len({name for tool in plain.tools for name in [tool["name"], *properties(tool)]})
        hidden += len(set(back.values()))
        assert len(set(map(str.lower, back))) == len(
            set(back.values())
        )  # one mask per name, one name per mask
        for mask in back:
            assert re.fullmatch(r"[A-Za-z][A-Za-z0-9]{4,14}", mask) and re.search(r"[a-z][A-Z]|\d", mask)
            assert mask.lower() not in as_text(plain).lower()
    assert hidden > 0.95 * names


def test_masked_calls_are_the_same_calls(genuine):
    for plain, one in zip(genuine, masked_examples(genuine, 1.0, 0)):
        back = masks_between(plain, one)
        old_tools, new_tools = ({tool["name"]: tool for tool in tools} for tools in (plain.tools, one.tools))
        for old, new in zip(all_calls(plain), all_calls(one), strict=True):
            assert back.get(new.name, new.name) == old.name
            assert json.dumps(list(new.arguments.values())) == json.dumps(
                list(old.arguments.values())
            )  # 1 is not 1.0
            if old.name not in old_tools:
                continue
            was, now = old_tools[old.name], new_tools[new.name]
            assert [k in properties(now) for k in new.arguments] == [
                k in properties(was) for k in old.arguments
            ]
            assert [back.get(k, k) for k in required(now)] == required(was)
            missing = missing_arguments(new.arguments, now)
            assert [back.get(k, k) for k in missing] == missing_arguments(old.arguments, was)
            said = [finding.split(":", 1) for finding in wrong_types(new.arguments, now)]
            assert [f"{back.get(k, k)}:{rest}" for k, rest in said] == wrong_types(old.arguments, was)


def test_every_argument_that_the_conversation_showed_is_still_shown(genuine):
    for plain, one in zip(genuine, masked_examples(genuine, 1.0, 0)):
        shown, still = ("\n".join(message["content"] for message in made.messages) for made in (plain, one))
        values = [str(value) for call in plain.answer for value in call.arguments.values()]
        assert [value for value in values if value in shown and value not in still] == []


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "With city_name Oslo, not my_city_name or city_names.",
            "With <city_name> Oslo, not my_city_name or city_names.",
        ),
        ("In how many days? Any news feed?", "In how many days? Any news feed?"),
        ("Call `find_books`.", "Call `<find_books>`."),
        (
            "The News Feed of today.",
            "The News Feed of today.",
        ),  # a request for the thing is no mention of the tool
        ('"News Feed of Oslo", "The News Feed"', '"News Feed of Oslo", "The News Feed"'),
        ('From "News Feed", or the News Feed tool.', 'From "<News Feed>", or the <News Feed> tool.'),
    ],
)
def test_texts_lose_the_names_that_no_ordinary_word_looks_like(text, expected):
    assert masked_text(text) == expected


@pytest.mark.parametrize("name", ["sortBy", "a.b", "/email/check", "text1", "filter[id]"])
def test_names_that_look_like_code(name):
    assert (
        masked_text(f"Set {name} to 3.", tools=[RAIN, tool("t", **{name: "Some text."})])
        == f"Set <{name}> to 3."
    )


@pytest.mark.parametrize("name", ["GSTIN", "mp3", "e-mail", "City", "Zip code"])
def test_names_that_are_words_stay_in_texts(name):
    plain = example(f"My {name} is 3.", tools=[RAIN, tool("t", **{name: "Some text."})])
    masked = mask_names(plain, 0)
    assert masked.messages == plain.messages and name not in properties(masked.tools[1])


def test_the_longest_name_wins():
    tools = [RAIN, tool("t", **{"date": "Day.", "date.from": "First.", "date.from.utc": "First, elsewhere."})]
    assert (
        masked_text("Set date.from.utc and date.from.", tools=tools) == "Set <date.from.utc> and <date.from>."
    )


def test_a_capital_inside_does_not_make_code_of_several_words():
    assert (
        masked_text("The TikTok Likes of Oslo.", tools=[RAIN, tool("TikTok Likes")])
        == "The TikTok Likes of Oslo."
    )


def test_descriptions_and_results_follow():
    books = tool("find_books", "See city_name of get_rain.", where="Like `city_name`, in find_books.")
    content = '[{"name": "Rain", "results": {"name": "Rain in May", "title": "Rain", "city_name": "Oslo"}}]'
    plain = example(
        tools=[RAIN, books, tool("Rain", "Water.")], before=[{"role": "tool", "content": content}]
    )
    masked = mask_names(plain, 0)
    mask = {name: mask for mask, name in masks_between(plain, masked).items()}
    assert masked.tools[1]["description"] == f"See {mask['city_name']} of {mask['get_rain']}."
    declared = masked.tools[1]["parameters"][mask["where"]]
    assert declared["description"] == f"Like `{mask['city_name']}`, in {mask['find_books']}."
    # The word "Rain" is the tool only where a result says so; city_name stays one word for one thing.
    content = content.replace('"name": "Rain",', f'"name": "{mask["Rain"]}",').replace(
        "city_name", mask["city_name"]
    )
    assert masked.messages[0]["content"] == content


def test_both_lists_of_required_parameters_and_inner_fields():
    """ToolACE lists `required` beside `parameters`, JSON Schema inside. Fields of an object keep their
    names.
    """
    inner = {
        "street_no": {
            "type": "string",
            "anyOf": [{"description": "Unlike city_name.", "format": "city_name"}],
        }
    }
    address = {"type": "object", "description": "Where.", "properties": inner, "required": ["street_no"]}
    declared = {"address": address, "city_name": {"type": "string", "description": "The town."}}
    schema = {
        "type": "object",
        "properties": declared,
        "required": ["address", "unknown", {}],
        "additionalProperties": False,
    }
    move = {"name": "move_to", "description": "Moves.", "parameters": schema, "required": ["city_name"]}
    answer = [ToolCall("move_to", {"address": {"street_no": "5"}, "city_name": "Oslo"})]
    plain = example(tools=[move], answer=answer)
    masked = mask_names(plain, 0)
    mask = {name: mask for mask, name in masks_between(plain, masked).items()}
    made = masked.tools[0]
    assert set(mask) == {"move_to", "address", "city_name"}
    assert made["parameters"]["required"] == [mask["address"], "unknown", {}]
    assert made["required"] == [mask["city_name"]]
    field = {
        "type": "string",
        "anyOf": [{"description": f"Unlike {mask['city_name']}.", "format": "city_name"}],
    }
    assert made["parameters"]["properties"][mask["address"]] == address | {"properties": {"street_no": field}}
    assert masked.answer == [
        ToolCall(mask["move_to"], {mask["address"]: {"street_no": "5"}, mask["city_name"]: "Oslo"})
    ]


def test_past_calls_are_masked_and_those_of_unlisted_tools_are_not():
    past = [ToolCall("get_rain", {"days": "2"}), ToolCall("days_ahead", {"subject": "x"})]
    snow = tool("get_snow", days_ahead="How many days.")
    plain = example(tools=[RAIN, BOOKS, snow], before=[{"role": "assistant", "content": "", "calls": past}])
    masked = mask_names(plain, 0)
    mask = {name: mask for mask, name in masks_between(plain, masked).items()}
    assert masked.messages[0]["calls"] == [ToolCall(mask["get_rain"], {mask["days"]: "2"}), past[1]]
    assert not {"subject", "days_ahead"} & set(
        mask
    )  # one name, one mask: theirs would have changed the unlisted call


@pytest.mark.parametrize(
    "name, changes",
    {
        "a value of the answer": ("city_name", {"answer": [ToolCall("get_rain", {"days": "by city_name"})]}),
        "inside a value": ("News Feed", {"answer": [ToolCall("get_rain", {"days": ["my News Feed, 2"]})]}),
        "a key inside a value": ("subject", {"answer": [ToolCall("get_rain", {"days": {"subject": 1}})]}),
        "a value is part of it": ("city_name", {"answer": [ToolCall("get_rain", {"days": "City"})]}),
        "a value of a past call": (
            "city_name",
            {"before": [CALLED | {"calls": [ToolCall("x", {"y": "city_name"})]}]},
        ),
        "a default": (
            "city_name",
            {"tools": [RAIN, tool("t", by={"description": "So.", "default": "city_name"})]},
        ),
        "an enum": (
            "city_name",
            {"tools": [RAIN, tool("t", by={"description": "So.", "items": {"enum": ["city_name"]}})]},
        ),
        "not declared": (
            "subject",
            {"tools": [BOOKS, RAIN], "answer": [ToolCall("get_rain", {"subject": "a"})]},
        ),
        "not described": ("city_name", {"tools": [tool("get_rain", city_name=" ", days="How many.")]}),
        "not declared by an object": (
            "city_name",
            {"tools": [{**RAIN, "parameters": {"city_name": "The town."}}]},
        ),
        "described by its own name": (
            "city_name",
            {"tools": [tool("get_rain", city_name="city_name.", days="So.")]},
        ),
    }.values(),
)
def test_names_that_are_kept(name, changes):
    plain = example("By city_name.", **changes)
    masked = mask_names(plain, 0)
    assert name not in draw_masks(plain, 0) and name in as_text(masked)
    assert masks_between(plain, masked)  # others are masked


def test_demonstrations_do_not_survive_masking():
    # A thought such as "the rain tool for the city" would name what is no longer there, and no rule could
    # find it.
    assert example().demonstrations and mask_names(example(), 0).demonstrations == ()


def test_a_random_name_that_the_example_contains_is_drawn_again(monkeypatch):
    drawn = iter(["oSL0x", "oSL0x", "aB3de", "AB3DE", "fG4hi", "jK5lm", "nO6pq", "rS7tu", "vW8xy"])
    monkeypatch.setattr(augment, "_random_name", lambda rng, *lengths: next(drawn))
    masks = draw_masks(example("Code Osl0x."), 0)
    assert list(masks.values()) == ["aB3de", "fG4hi", "jK5lm", "nO6pq", "rS7tu", "vW8xy"]


def test_an_example_without_describing_texts_stays_itself():
    plain = example(tools=[tool("get_rain", "", city_name="")])
    assert mask_names(plain, 0) is plain


# ------------------------------------------------------------------------------------------- seeds and shares


@pytest.mark.parametrize("made_of", [irrelevant_examples, masked_examples])
def test_the_choice_depends_on_seed_and_id_alone(made_of):
    pool = [example(id=f"{i}") for i in range(1000)]
    made = {one.id: one for one in made_of(pool, 0.3, 5) if "#" in one.id}
    assert 250 < len(made) < 350
    assert {one.id: one for one in made_of(pool[::-2], 0.3, 5) if "#" in one.id} == {
        name: one for name, one in made.items() if int(name.split("#")[0]) % 2
    }
    assert {one.id for one in made_of(pool, 0.3, 6) if "#" in one.id} != set(made)
    assert not any("#" in one.id for one in made_of(pool, 0.0, 5))


def test_masked_examples_keep_length_and_order():
    pool = [example(id=f"{i}") for i in range(50)]
    made = masked_examples(pool, 0.5, 0)
    assert [one.id.removesuffix("#masked") for one in made] == [one.id for one in pool]
    assert all(one is plain for one, plain in zip(made, pool) if "#" not in one.id)
    assert draw_masks(pool[0], 0) != draw_masks(pool[1], 0) != draw_masks(pool[1], 1)


@pytest.mark.parametrize("made_of", [irrelevant_examples, masked_examples])
@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_refused(made_of, share):
    with pytest.raises(ValueError, match=rf"must be a share from 0 to 1, not {share}"):
        made_of([], share, 0)
