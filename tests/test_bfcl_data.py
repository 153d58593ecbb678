"""bfcl_data.py and bfcl_handler.py: finding and pairing the cases, what a model is shown, and the official
tool's files.
"""

import gzip
import importlib
import json
import sys
from types import SimpleNamespace

import pytest
from bfcl_cases import DATA, GOLDEN, RIGHT, WRONG, needs_shared, problem, reply, score, write_data

from evals import bfcl_data
from evals.bfcl_check import BfclError, check, decode, find_fault
from evals.bfcl_data import (
    HUB_ID,
    load_problems,
    official_result,
    prompt_cases,
    prompt_tools,
    select_categories,
)

# ------------------------------------------------------------------------------------------- finding, loading


@pytest.mark.parametrize("inner", bfcl_data.DATA_FOLDERS)
@pytest.mark.parametrize(
    ("version", "name", "suffix"), [("v4", "simple_python", "json.gz"), ("v3", "simple", "json")]
)
def test_data_is_found_in_folders_checkouts_and_packages(tmp_path, inner, version, name, suffix):
    write_data(tmp_path / inner, version, name, suffix=suffix)
    assert [case.category for case in load_problems(tmp_path).values()] == ["simple_python"] * 2


def test_v3_pairs_questions_and_answers_by_row(tmp_path):
    """v3 has one id twice and one answer under a wrong id; v4 has neither, so there it means damage."""
    for version, name in (("v3", "simple"), ("v4", "simple_python")):
        path = write_data(tmp_path / version, version, name) / f"BFCL_{version}_{name}.json"
        path.write_text(path.read_text().replace("python_1", "python_0").replace("simple_1", "simple_0"))
    answers = tmp_path / "v3" / "possible_answer" / "BFCL_v3_simple.json"
    first, second = answers.read_text().splitlines()
    answers.write_text(first + "\n" + second.replace("[1]", "[7]") + "\n")
    problems = load_problems(tmp_path / "v3")
    assert [case.answer[0]["f"]["p"] for case in problems.values()] == [[1], [7]]
    assert list(problems) == ["simple_0", "simple_0#2"]
    with pytest.raises(BfclError, match="BFCL_v4_simple_python.json:2: .* answer to simple_python_1"):
        load_problems(tmp_path / "v4")


@needs_shared
def test_the_two_cases_under_one_id_in_v3_both_count():
    problems = load_problems(DATA / "v3")
    assert len(problems) == len(load_problems(DATA)) == 3641
    first, second = problems["live_relevance_3-3-0"], problems["live_relevance_3-3-0#2"]
    assert first.messages != second.messages
    assert len(problems["live_multiple_1052-79-0"].answer) == 1  # its answer has another id


def test_the_hub_copy_is_fetched_by_its_id(tmp_path, monkeypatch):
    """Its files are named as in v3, and stand beside others that are not needed."""
    asked = {}

    def snapshot_download(name, repo_type, allow_patterns):
        asked.update(name=name, repo_type=repo_type, allow_patterns=allow_patterns)
        return str(write_data(tmp_path, "v3", "simple"))

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    assert list(load_problems(HUB_ID)) == ["simple_0", "simple_1"]
    assert (asked["name"], asked["repo_type"]) == (HUB_ID, "dataset")
    assert {"BFCL_v3_simple.json", "possible_answer/BFCL_v3_live_multiple.json"} <= set(
        asked["allow_patterns"]
    )
    assert not any("multi_turn" in name or "v4" in name for name in asked["allow_patterns"])


def test_offline_the_hub_id_is_one_clear_sentence(monkeypatch):
    def snapshot_download(*_, **__):
        raise OSError("Couldn't reach the host\nand a long story")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    with pytest.raises(BfclError) as caught:
        load_problems(HUB_ID)
    told = f"--data {HUB_ID}: cannot be fetched from the Hugging Face hub (Couldn't reach the host); fetch it on a machine"
    assert str(caught.value).startswith(told) and "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    with pytest.raises(BfclError, match="cannot be fetched"):
        load_problems(HUB_ID)


# ----------------------------------------------------------------------------------------------------- asking


@pytest.fixture
def no_torch(monkeypatch):
    """Stands in for rollout.py, which needs torch."""
    monkeypatch.setitem(sys.modules, "rollout", SimpleNamespace(Case=SimpleNamespace))


def test_groups():
    groups = {name: select_categories([name]) for name in bfcl_data.GROUPS}
    assert groups["all"] == groups["single_turn"] == groups["live"] | groups["non_live"]
    assert groups["non_python"] == select_categories(["java,javascript"]) == groups["all"] - groups["python"]
    assert len(groups["all"]) == 13 and len(groups["live"]) == 6


def test_java_and_javascript_parameters_are_described_as_strings():
    listed = problem("Array", [["a"]], item="String", category="simple_java")
    details = prompt_tools(listed.functions, "java")[0]["parameters"]["properties"]["p"]
    assert details["type"] == "string" and "items" not in details
    assert (
        "Java 8 SDK value of type Array" in details["description"]
        and "of type String" in details["description"]
    )
    assert (
        listed.functions[0]["parameters"]["properties"]["p"]["type"] == "Array"
    )  # the checker's copy is untouched
    nested = problem("dict", [{}], category="simple_javascript").functions
    nested[0]["parameters"]["properties"]["p"]["properties"] = {"a": {"type": "integer"}}
    details = prompt_tools(nested, "javascript")[0]["parameters"]["properties"]["p"]
    assert '{"a": {"type": "integer"}}' in details["description"] and "properties" not in details


def prompt_messages(*roles):
    return [{"role": role, "content": f"words of {role}"} for role in roles]


def test_system_messages_of_the_data_stay_in_the_prompt(no_torch):
    """91 cases have one; the reference's handler overwrites it."""
    case = problem("integer", [1])
    case.messages[:] = prompt_messages("system", "user")
    assert prompt_cases([case])[0].messages == prompt_messages("system", "user")


@needs_shared
@pytest.mark.parametrize("version", ["v3", "v4"])
def test_every_case_can_be_asked(version, no_torch):
    cases = prompt_cases(load_problems(DATA / "v3" if version == "v3" else DATA).values())
    assert sum(any(message["role"] == "system" for message in case.messages) for case in cases) >= 91
    assert sum(not case.tools for case in cases) == 4
    for case in cases:
        typed = [d["type"] for tool in case.tools for d in tool["parameters"]["properties"].values()]
        assert set(typed) <= {"string"} or case.category not in ("simple_java", "simple_javascript")


# ----------------------------------------------------------------------------------- for the official command


def decode_as_official_handler(result):
    """What the handler of the model under whose name we hand over makes of `result`, in short."""
    calls = json.loads(result)
    return [{call["name"]: call["arguments"]} for call in (calls if isinstance(calls, list) else [calls])]


@needs_shared
def test_handed_over_results_get_the_same_verdicts(tmp_path):
    """Slow version of what `bfcl evaluate` does with our files (run once with the real package: all 3,641
    equal).
    """
    problems = load_problems(DATA)
    with gzip.open(GOLDEN, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][::7]
    for row in rows:
        case, result = problems[row["id"]], official_result(problems[row["id"]], row["output"])
        try:
            calls = decode_as_official_handler(result)
        except TypeError:
            calls = None
        assert (find_fault(case, calls) is None) == row["valid"], (row["id"], row["kind"])


def test_official_results_are_the_text_of_the_list_or_null():
    case, refusal = problem("float", [1.0]), problem("float", [1.0], category="irrelevance")
    listed = '[{"name": "f", "arguments": {"p": 1}, "id": 7}]'
    assert official_result(case, f"<tool_call> {listed}\n</tool_call>") == listed
    assert official_result(case, "<tool_call>{}</tool_call>") == "[]"
    for unread in ("no", '<tool_call>{"name": "f", "arguments": {}}</tool_call>', f"<tool_call>{listed}"):
        assert official_result(case, unread) == "null"
    huge = reply(
        ("f", {"p": 10**400})
    )  # crashes the official checker, which would take all other rows with it
    assert official_result(case, huge) == "null" and not check(case, huge)[0]
    assert official_result(refusal, huge) != "null"  # it must stay a call where none fits


def test_official_files_and_command(tmp_path, capsys):
    data = write_data(write_data(tmp_path / "d", count=3), name="live_relevance", count=1)
    rows = [
        RIGHT | {"input_tokens": 9, "output_tokens": 4, "latency": 0.5, "sample": 0},
        RIGHT | {"output": "2nd"},
        WRONG,
    ]
    options = ["--official-dir", str(tmp_path / "f"), "--model-name", "a/b-c"]
    score(tmp_path, [*rows, {"id": "live_relevance_0", "output": "no"}], data, *options)
    folder = tmp_path / "f" / "result" / "a_b-c"
    lines = (folder / "non_live" / "BFCL_v4_simple_python_result.json").read_text().splitlines()
    counts = {"input_token_count": 9, "output_token_count": 4, "latency": 0.5}
    result = '[{"name": "f", "arguments": {"p": 1}}]'
    assert json.loads(lines[0]) == {"id": "simple_python_0", "result": result, **counts}
    assert [json.loads(line)["id"] for line in lines] == [
        "simple_python_0",
        "simple_python_1",
    ]  # one row per case
    assert '"result": "null"' in (folder / "live" / "BFCL_v4_live_relevance_result.json").read_text()
    command = "bfcl evaluate --model a/b-c --test-category simple_python,live_relevance --partial-eval\n"
    assert command in capsys.readouterr().out


def test_official_files_of_v3(tmp_path, capsys):
    """v3 has other names, no folder per group, and the repeated id twice."""
    path = write_data(tmp_path / "d", "v3", "simple") / "BFCL_v3_simple.json"
    path.write_text(path.read_text().replace("simple_1", "simple_0"))
    rows = [{"id": name, "output": reply()} for name in ("simple_0", "simple_0#2")]
    score(tmp_path, rows, tmp_path / "d", "--official-dir", str(tmp_path / "f"))
    (file,) = (tmp_path / "f").rglob("*.json")
    assert file == tmp_path / "f" / "result" / "Salesforce_xLAM-2-3b-fc-r" / "BFCL_v3_simple_result.json"
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == ["simple_0", "simple_0"]
    assert "--test-category simple\n" in capsys.readouterr().out


def test_the_handler_asks_and_decodes_as_we_do(monkeypatch):
    """With stand-ins for the package, which weighs gigabytes; tried once with the real one."""
    stubs = {
        "bfcl_eval.constants.model_config": {"MODEL_CONFIG_MAPPING": {}, "ModelConfig": dict},
        "bfcl_eval.model_handler.local_inference.base_oss_handler": {"OSSHandler": object},
        "bfcl_eval.model_handler.utils": {"decoded_output_to_execution_list": list},
        "overrides": {"override": lambda method: method},
    }
    for name, contents in stubs.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**contents))
    monkeypatch.delitem(sys.modules, "bfcl_handler", raising=False)
    handler = object.__new__(
        importlib.import_module("bfcl_handler").ToolN1Handler
    )  # __init__ would look for a server
    sys.modules.pop("bfcl_handler")
    entry = {"id": "simple_python_0", "function": [{"name": "f"}], "question": []}
    assert handler._pre_query_processing_prompting(entry) == {"message": [], "function": [{"name": "f"}]}
    for output in (reply(("f", {"p": 1})), reply(), "no", "<tool_call>null</tool_call>"):
        try:
            assert handler.decode_ast(output, None, False) == decode(output)
        except ValueError:
            assert decode(output) is None
    handler.tokenizer = SimpleNamespace(
        chat_template="t", name_or_path="m", apply_chat_template=lambda chat, **_: json.dumps(chat)
    )
    case = prompt_messages("system", "user")
    prompt = json.loads(handler._format_prompt(case, [{"name": "f"}]))
    assert [message["role"] for message in prompt] == ["system", "user"]
    assert "{tools}" not in prompt[0]["content"] and '"name": "f"' in prompt[0]["content"]
    assert prompt[0]["content"].endswith("words of system")  # the data set's own system message is kept
