"""API-Bank's data: the official checkout, the folder of cases and the hub's file give the same cases."""

import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from evals import apibank_data
from evals.apibank_check import check
from evals.apibank_data import EvalError, load_cases
from prompts import render_calls

DATA = Path(__file__).parents[2] / "shared" / "data" / "apibank"
needs_shared = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"{DATA} is not there; it holds API-Bank's dialogues"
)


def class_source(api: dict, half: str = "") -> str:
    """An API as the official files have it. To import or run it would raise: it must only be read."""
    text, cut = api["description"], len(api["description"]) // 2
    required = [f"{key}: str" for key in api["required"]]
    optional = [f"{key}: str = {value!r}" for key, value in api["optional"].items()]
    extra = ["**kwargs"] if api["accepts_kwargs"] else []
    signature = ", ".join(["self", *required, *optional, *extra])
    return f"""from apis.api import API
import no_such_package_to_import
raise SystemExit('the checkout must not be executed')

class Helper:
    limit = len('not a literal, but no API either')

class {api["name"]}(API):
    description = {text[:cut]!r} {half}\\
                  {text[cut:]!r}
    input_parameters = {api["input_parameters"]!r}
    output_parameters = {api["output_parameters"]!r}
    database_name = {api["database"]!r}

    def __init__(self, init_database=None, token_checker=None) -> None:
        self.database = init_database or {{}}

    def check_api_call_correctness(self, response, groundtruth) -> bool:
        return response == groundtruth

    def call({signature}) -> dict:
        return {{'api_name': self.__class__.__name__}}
"""


def scenarios() -> list[dict]:
    """Level 3 in the form of the official level-3.json, put together from the folder's cases."""
    outputs = {row["id"]: row["output"] for _, row in apibank_data.read_rows(DATA / "cases.jsonl.gz")}
    listed: dict[str, dict] = {}
    for case in load_cases(DATA).values():
        if case.level == 3:
            entry = listed.setdefault(
                case.scenario, {"requirement": f" {case.history[0]['text']}", "apis": []}
            )
            found = {
                call["output"]["output"]["name"]
                for call in entry["apis"]
                if call["api_name"] == "ToolSearcher"
            }
            for name in (name for name in case.shown if name not in found):
                result = {"api_name": "ToolSearcher", "output": {"name": name}, "exception": None}
                entry["apis"].append(
                    {"api_name": "ToolSearcher", "input": {"keywords": name}, "output": result}
                )
            # A later case tells with which types a call came back.
            result = {
                "api_name": case.gold.name,
                "input": None,
                "output": outputs[case.id],
                "exception": None,
            }
            entry["apis"].append({"api_name": case.gold.name, "input": case.written, "output": result})
    return list(listed.values())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The genuine dialogues in the layout of the official repository, beside class files written from the
    descriptions.
    """
    root = tmp_path_factory.mktemp("DAMO-ConvAI") / "api-bank"
    with tarfile.open(DATA / "lv1-lv2-samples.tar.gz") as archive:
        archive.extractall(root, filter="data")
    groups = json.loads((DATA / "api_descriptions.json").read_text())
    for folder, group in (("apis", "level1_2"), ("lv3_apis", "level3")):
        (root / folder).mkdir()
        (root / folder / "__init__.py").write_text("from .api import API\n")
        (root / folder / "api.py").write_text("class API:\n    def __init__(self):\n        pass\n")
        for i, api in enumerate(groups[group]):
            (root / folder / f"{api['name'].lower()}.py").write_text(class_source(api, "+ " if i % 2 else ""))
    (root / "test-data").mkdir()
    (root / "test-data" / "level-3.json").write_text(json.dumps(scenarios()))
    return root


def plain_turns(case) -> list[tuple]:
    """The turns without the inputs of past calls, whose types not every source tells, and results as
    texts.
    """
    results = [str(turn.get("result", {}).get("output")) for turn in case.history]
    return [(t["role"], t.get("text"), t.get("api_name"), result) for t, result in zip(case.history, results)]


# -------------------------------------------------------------------------------------- the official checkout


@needs_shared
@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_checkout_gives_the_cases_of_the_folder(checkout, level):
    ours = {case.id: case for case in load_cases(checkout).values() if case.level == level}
    theirs = {case.id: case for case in load_cases(DATA).values() if case.level == level}
    assert list(ours) == list(theirs) and len(ours) == {1: 389, 2: 119, 3: 131}[level]
    for case, other in zip(ours.values(), theirs.values()):
        for key in ("written", "shown", "rejected", "scenario"):
            assert getattr(case, key) == getattr(other, key), (case.id, key)
        # The folder leaves whole numbers of level 3 as texts; both are numbers once they are compared.
        arguments = {
            key: str(v) if level == 3 and isinstance(v, int) else v for key, v in case.gold.arguments.items()
        }
        assert (case.gold.name, arguments) == (other.gold.name, other.gold.arguments)
        assert plain_turns(case) == plain_turns(other)
        assert case.history == other.history or level == 3
    api_keys = ("name", "description", "input_parameters", "output_parameters", "required")
    read, given = next(iter(ours.values())).apis, next(iter(theirs.values())).apis
    assert read == {name: {key: api[key] for key in api_keys} for name, api in given.items()}


@needs_shared
def test_golds_as_written_are_texts():
    """What ToolRL's loose protocol compares with; the gold itself has JSON types."""
    cases = load_cases(DATA).values()
    assert {type(value) for case in cases for value in case.written.values()} == {str}
    assert {type(value) for case in cases for value in case.gold.arguments.values()} == {str, int, bool, list}


@needs_shared
def test_the_folder_around_the_checkout_will_do_too(checkout):
    assert list(load_cases(checkout.parent)) == list(load_cases(checkout))


@needs_shared
def test_rejected_golds_are_those_of_the_official_evaluator():
    """The table REJECTED and the schema say of 24 calls what the official tools said of them, and why."""
    cases = load_cases(DATA)
    told = json.loads((DATA / "match_rules.json").read_text())["official_rejects_gold"]
    assert {case.id for case in cases.values() if case.rejected} == set(told)
    of_schema = [why for why in told.values() if "invalid parameter name" in why]
    reasons = Counter(case.rejected for case in cases.values() if case.rejected)
    assert reasons["the schema has no argument device_id"] == len(of_schema) == 8
    names = Counter(
        cases[case_id].gold.name for case_id in told if cases[case_id].gold.name in apibank_data.REJECTED
    )
    assert names == {
        "QueryScene": 5, "DeleteMeeting": 3, "ForgotPassword": 4, "RegisterUser": 1, "GetUserToken": 2,
        "QueryRegistration": 1,
    }


def read_class(tmp_path, body: str) -> dict:
    (tmp_path / "tool.py").write_text(
        f"class Tool(API):\n    input_parameters = {{'a': {{'type': 'str'}}}}\n{body}"
    )
    return apibank_data.read_apis(tmp_path)["Tool"]


@pytest.mark.parametrize(
    ("signature", "required"),
    [
        ("self, a", ["a"]),
        ("self, a=None", []),
        ("self, **kwargs", []),  # what the signature does not name may be left out
        ("self, *, a", ["a"]),
        ("self, *, a=None", []),
        ("self, b, a=None", []),
    ],
)
def test_required_arguments_come_from_the_signature(tmp_path, signature, required):
    body = f"    description = 'a ' 'tool'\n    def call({signature}):\n        pass\n"
    assert read_class(tmp_path, body) == {
        "name": "Tool", "description": "a tool", "input_parameters": {"a": {"type": "str"}}, "required": required,
    }


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("    description = open('secret').read()\n", "line 3: not a literal"),
        ("    description: str\n", "line ?: not a literal"),
        ("    def call(self, a):\n        pass\n", "class Tool has no description or no method call"),
        ("    description = 'x'\n", "class Tool has no description or no method call"),
        ("    print 'Python 2'\n", "Missing parentheses"),
        ("    input_parameters = {'a': {'type': 'blob'}}\n    description = ''\n    def call(self):\n        pass\n",
         "class Tool: parameter a has the unknown type 'blob'"),
    ],
)
def test_unreadable_class_is_named(tmp_path, body, complaint):
    with pytest.raises(EvalError, match=re.escape(complaint)) as error:
        read_class(tmp_path, body)
    assert str(error.value).startswith(f"{tmp_path / 'tool.py'}: its API cannot be read")


# --------------------------------------------------------------------------------------------- the hub's file


@needs_shared
def test_the_hub_file_is_the_389_calls_and_10_repeats():
    hub, cases = load_cases(DATA / "hammer_apibank_l1.json.gz"), load_cases(DATA)
    index = json.loads((DATA / "level1_hf399_index.json").read_text())
    partners = [cases[entry["github_case"]] for entry in index]
    assert list(hub) == [f"hub-level-1#{number}" for number in range(399)]
    assert len({case.id for case in partners}) == 389
    other_turns = []
    for case, partner in zip(hub.values(), partners):
        assert (case.gold, case.written, case.level) == (
            partner.gold,
            partner.written,
            1,
        )  # texts became JSON types
        assert (case.rejected, set(case.shown)) == (partner.rejected, set(partner.shown))
        assert case.apis[case.gold.name]["required"] == partner.apis[case.gold.name]["required"]
        if plain_turns(case) != plain_turns(partner):
            other_turns.append(case.id)
    assert other_turns == ["hub-level-1#263"]  # one blank at the end of a sentence


@needs_shared
def test_the_hub_file_is_scored_by_the_same_rules():
    cases = load_cases(DATA / "hammer_apibank_l1.json.gz").values()
    right = {
        mode: sum(check(c, render_calls([c.gold]), mode)[0] for c in cases)
        for mode in ("official", "corrected")
    }
    assert right == {"official": 377, "corrected": 399}


@needs_shared
def test_table_of_optional_arguments_is_that_of_the_signatures():
    apis = json.loads((DATA / "api_descriptions.json").read_text())["level1_2"]
    optional = {
        api["name"]: tuple(key for key in api["input_parameters"] if key not in api["required"])
        for api in apis
    }
    assert {name: keys for name, keys in optional.items() if keys} == apibank_data.OPTIONAL


# ----------------------------------------------------------------------------------------------------- errors


def hub_item(**changes) -> dict:
    tool = {"name": "Add", "description": "", "parameters": {"x": {"type": "str", "description": ""}}}
    item = {
        "query": [{"role": "user", "content": "go"}],
        "tools": [tool],
        "answers": [{"name": "Add", "arguments": {}}],
    }
    return item | changes


SEARCH = {"name": "ToolSearcher", "description": "", "parameters": {}}
APIS = {"level1_2": [{"name": "Add", "input_parameters": {}}], "level3": []}
ADD = "class Add:\n    description = ''\n    input_parameters = {}\n    def call(self):\n        pass\n"
CHECKOUT = {"apis/add.py": ADD}
TURNS = "lv1-lv2-samples/level-1-given-desc/Add-level-1-1.jsonl"
HUB = "hub.json"


@pytest.mark.parametrize(
    ("files", "place", "message"),
    [
        ({"notes.txt": ""}, "", ": no API-Bank data; --data takes the official folder api-bank"),
        ({}, "gone", "gone: no such file or folder; --data takes"),
        (
            {"cases.jsonl": "{}\n"},
            "",
            "api_descriptions.json: no such file; it belongs beside the other files",
        ),
        ({"cases.jsonl": "{}\n", "api_descriptions.json": "{"}, "", "api_descriptions.json: not JSON"),
        (
            {"cases.jsonl": "{}\n", "api_descriptions.json": APIS},
            "",
            "cases.jsonl:1: no usable case (KeyError('level'))",
        ),
        ({"cases.jsonl": "{}\n[", "api_descriptions.json": APIS}, "", "cases.jsonl:2: not a JSON object"),
        (
            CHECKOUT | {"lv1-lv2-samples/README": ""},
            "",
            "lv1-lv2-samples: holds no dialogues (level-1-given-desc, level-2",
        ),
        ({"apis/README": "", TURNS: "{}"}, "", "apis: holds no API classes; complete the checkout"),
        (CHECKOUT | {TURNS: '{"role": "AI", "text": ""}\n{'}, "", "Add-level-1-1.jsonl:2: not a JSON object"),
        (
            CHECKOUT | {TURNS: '{"role": "API", "api_name": "Sub"}'},
            "",
            "jsonl:1: no usable turn (KeyError('result'))",
        ),
        ({HUB: "[1]"}, HUB, "hub.json: item 0 has not the keys query, tools and answers"),
        ({HUB: "{}"}, HUB, "hub.json: item 0 has not the keys query, tools and answers"),
        ({HUB: [hub_item(), hub_item(answers=[])]}, HUB, "hub.json: item 1 has not the keys query"),
        ({HUB: [hub_item(tools=[SEARCH], answers=[SEARCH])]}, HUB, "hub.json: item 0 is not of level 1"),
    ],
)
def test_error_is_one_sentence_that_says_where_and_what_to_do(tmp_path, files, place, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(EvalError, match=re.escape(message)) as error:
        load_cases(tmp_path / place)
    assert "\n" not in str(error.value)


@needs_shared
def test_a_checkout_without_level_3_has_the_other_levels(checkout, tmp_path):
    for part in ("apis", "lv1-lv2-samples"):
        (tmp_path / part).symlink_to(checkout / part)
    assert Counter(case.level for case in load_cases(tmp_path).values()) == {1: 389, 2: 119}
