"""API-Bank's data: the official checkout and the folder of cases give the same cases."""

import json
import re
import tarfile
from pathlib import Path

import pytest

from config import UserError
from evals import apibank_data
from evals.apibank_data import load_cases

DATA = Path(__file__).parents[2] / "shared" / "data" / "apibank"
needs_shared = pytest.mark.skipif(not DATA.is_dir(), reason="API-Bank's dialogues in ../shared are absent")


def class_source(api: dict, half: str = "") -> str:
    """An API as the official files have it. To import or run it would raise: it must only be read."""
    text, cut = api["description"], len(api["description"]) // 2
    parameters = ["self", *(f"{key}: str" for key in api["required"])]
    parameters += [f"{key}: str = {value!r}" for key, value in api["optional"].items()]
    parameters += ["**kwargs"] if api["accepts_kwargs"] else []
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

    def __init__(self, init_database=None) -> None:
        self.database = init_database or {{}}

    def call({", ".join(parameters)}) -> dict:
        return {{'api_name': self.__class__.__name__}}
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The genuine dialogues as the official repository has them, and class files from the descriptions."""
    root = tmp_path_factory.mktemp("DAMO-ConvAI") / "api-bank"
    with tarfile.open(DATA / "lv1-lv2-samples.tar.gz") as archive:
        archive.extractall(root, filter="data")
    (root / "apis").mkdir()
    (root / "apis" / "api.py").write_text("class API:\n    def __init__(self):\n        pass\n")
    for i, api in enumerate(json.loads((DATA / "api_descriptions.json").read_text())["level1_2"]):
        (root / "apis" / f"{api['name'].lower()}.py").write_text(class_source(api, "+ " if i % 2 else ""))
    return root


@needs_shared
def test_the_checkout_gives_the_cases_of_the_folder(checkout):
    """Levels 1 and 2; also when the folder around it is given. Of level 3 the checkout has no calls."""
    keys = ("id", "gold", "written", "shown", "rejected", "history")
    ours = [[getattr(case, key) for key in keys] for case in load_cases(checkout.parent).values()]
    folder = [case for case in load_cases(DATA).values() if case.level < 3]
    assert ours == [[getattr(case, key) for key in keys] for case in folder] and len(ours) == 389 + 119
    api_keys = ("name", "description", "input_parameters", "output_parameters", "required")
    read = next(iter(load_cases(checkout).values())).apis
    assert read == {name: {key: api[key] for key in api_keys} for name, api in folder[0].apis.items()}


@needs_shared
def test_rejected_golds_are_those_of_the_official_evaluator():
    """The table REJECTED and the schema say of 24 calls what the official tools said of them, and why."""
    cases = load_cases(DATA)
    told = json.loads((DATA / "match_rules.json").read_text())["official_rejects_gold"]
    rejected = [case for case in cases.values() if case.rejected]
    assert {case.id for case in rejected} == set(told) and len(rejected) == 24
    of_schema = [case.id for case in rejected if case.rejected == "the schema has no argument device_id"]
    assert of_schema == [case.id for case in rejected if "invalid parameter name" in told[case.id]]


@pytest.mark.parametrize(("signature", "required"), [("self, a", ["a"]), ("self, a=None", [])])
def test_required_arguments_come_from_the_signature(tmp_path, signature, required):
    body = f"    description = 'a ' 'tool'\n    def call({signature}):\n        pass\n"
    (tmp_path / "tool.py").write_text("class Tool:\n    input_parameters = {'a': {'type': 'str'}}\n" + body)
    given = {"name": "Tool", "description": "a tool", "input_parameters": {"a": {"type": "str"}}}
    assert apibank_data.read_apis(tmp_path) == {"Tool": given | {"required": required}}


APIS = {"level1_2": [{"name": "Add", "input_parameters": {}}], "level3": []}
ADD = "class Add:\n    description = ''\n    input_parameters = {}\n    def call(self):\n        pass\n"
CHECKOUT = {"apis/add.py": ADD}
TURNS = "lv1-lv2-samples/level-1-given-desc/Add-level-1-1.jsonl"
ERRORS = [  # the files of a folder, the sentence
    ({"notes.txt": ""}, ": no API-Bank data; --data takes the official folder api-bank"),
    ({"cases.jsonl": "{}\n"}, "api_descriptions.json does not exist"),
    ({"cases.jsonl": "{}\n", "api_descriptions.json": APIS}, "jsonl:1: no usable case (KeyError('level'))"),
    (CHECKOUT | {TURNS: '{"role": "API", "api_name": "Sub"}'}, "1: no usable turn (KeyError('result'))"),
    ({"apis/a.py": ADD.replace("''", "open('x')"), TURNS: ""}, "a.py: its API cannot be read (malformed"),
    ({"apis/a.py": "-" * 100_000, TURNS: ""}, "a.py: its API cannot be read"),
    ({"apis/a.py": "a = 1" + "+1" * 100_000, TURNS: ""}, "a.py: its API cannot be read"),
    ({"apis/a.py": ADD.replace("{}", "0"), TURNS: ""}, "a.py: its API cannot be read"),
]


@pytest.mark.parametrize(("files", "message"), ERRORS)
def test_errors_say_where_and_what_to_do(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=re.escape(message)):
        load_cases(tmp_path)
