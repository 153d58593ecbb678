"""BFCL's data: finding and pairing the cases, what a model is shown of them, the official tool's files."""

import gzip
import importlib
import json
import sys
from types import SimpleNamespace

import pytest
from bfcl_cases import DATA, GOLDEN, RIGHT, WRONG, needs_shared, problem, reply, score, write_data

from evals import bfcl_data
from evals.bfcl_check import bfcl_verdict, decode, find_fault
from evals.bfcl_data import HUB_ID, load_problems, official_result, prompt_cases
from evals.report import ReportError


@pytest.mark.parametrize("inner", bfcl_data.DATA_FOLDERS)
def test_data_is_found_in_folders_checkouts_and_packages(tmp_path, inner):
    write_data(tmp_path / inner, suffix="json.gz")
    assert [case.category for case in load_problems(tmp_path).values()] == ["simple_python"] * 2


def test_v3_pairs_questions_and_answers_by_row(tmp_path):
    """v3 has one id twice and one answer under a wrong id."""
    path = write_data(tmp_path, "v3", "simple") / "BFCL_v3_simple.json"
    path.write_text(path.read_text().replace("simple_1", "simple_0"))
    answers = tmp_path / "possible_answer" / "BFCL_v3_simple.json"
    first, second = answers.read_text().splitlines()
    answers.write_text(first + "\n" + second.replace("[1]", "[7]") + "\n")
    problems = load_problems(tmp_path)
    assert [case.answer[0]["f"]["p"] for case in problems.values()] == [[1], [7]]
    assert list(problems) == ["simple_0", "simple_0#2"]


def test_damaged_data_is_told_in_one_sentence(tmp_path):
    answers = write_data(tmp_path) / "possible_answer" / "BFCL_v4_simple_python.json"
    answers.write_text("{}\n{}\n")
    with pytest.raises(ReportError, match="not a BFCL case: 'ground_truth' is missing"):
        load_problems(tmp_path)
    answers.unlink()
    with pytest.raises(ReportError, match="has 2 questions, but 0 answers in possible_answer"):
        load_problems(tmp_path)


def test_the_hub_copy_is_fetched_by_its_id(tmp_path, monkeypatch):
    """Its files are named as in v3, and stand beside others that are not needed."""

    def snapshot_download(name, repo_type, allow_patterns):
        assert (name, repo_type, len(allow_patterns)) == (HUB_ID, "dataset", 26)
        assert {"BFCL_v3_simple.json", "possible_answer/BFCL_v3_live_multiple.json"} <= set(allow_patterns)
        return str(write_data(tmp_path, "v3", "simple"))

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    assert list(load_problems(HUB_ID)) == ["simple_0", "simple_1"]


def test_java_and_javascript_parameters_are_described_as_strings():
    listed = problem("Array", [["a"]], item="String", category="simple_java").functions
    details = bfcl_data.prompt_tools(listed, "java")[0]["parameters"]["properties"]["p"]
    assert details["type"] == "string" and "items" not in details
    assert "Java 8 SDK value of type Array" in details["description"]
    assert "of type String" in details["description"]
    assert listed[0]["parameters"]["properties"]["p"]["type"] == "Array"  # the checker's copy is untouched


@needs_shared
@pytest.mark.parametrize("folder", ["v3", "."])
def test_every_case_can_be_asked(folder):
    """91 cases have a system message of their own. v3 has two cases under one id, and both count."""
    cases = prompt_cases(load_problems(DATA / folder).values())
    assert len(cases) == 3641
    assert sum(any(message["role"] == "system" for message in case.messages) for case in cases) >= 91
    assert sum(not case.tools for case in cases) == 4
    for case in cases:
        typed = {d["type"] for tool in case.tools for d in tool["parameters"]["properties"].values()}
        assert typed <= {"string"} or case.category not in ("simple_java", "simple_javascript")


@needs_shared
def test_handed_over_results_get_the_same_verdicts():
    """Slow version of what `bfcl evaluate` makes of our files (run once with the real package: all equal)."""
    problems = load_problems(DATA)
    with gzip.open(GOLDEN, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][::7]
    for row in rows:
        case = problems[row["id"]]
        handed = json.loads(official_result(case, row["output"]))
        calls = None if handed is None else [{call["name"]: call["arguments"]} for call in handed]
        assert (find_fault(case, calls) is None) == row["valid"], (row["id"], row["kind"])


def test_official_results_are_the_text_of_the_list_or_null():
    case, refusal = problem("float", [1.0]), problem("float", [1.0], category="irrelevance")
    listed = '[{"name": "f", "arguments": {"p": 1}, "id": 7}]'
    assert official_result(case, f"<tool_call> {listed}\n</tool_call>") == listed
    assert official_result(case, "<tool_call>{}</tool_call>") == "[]"
    assert official_result(case, f"<tool_call>{listed}") == "null"
    huge = reply(("f", {"p": 10**400}))  # crashes the official checker, and all other rows with it
    assert official_result(case, huge) == "null" and not bfcl_verdict(case, huge)[0]
    assert official_result(refusal, huge) != "null"  # it must stay a call where none fits


def test_the_official_files_hold_no_half_surrogates():
    """Its score files are UTF-8: one half, as it is or as an escape, ended the official command."""
    case = problem("string", ["a"])
    escapes = r'"\ud800", "\ud83d\ude00", "\\ud800", "\ud800\ud83d\ude00", "\udc00x"'
    text = f'[{{"name": "f", "arguments": {{"p": ["\udfff", {escapes}]}}}}]'
    handed = json.loads(official_result(case, f"<tool_call>{text}</tool_call>"))
    assert handed[0]["arguments"]["p"] == ["\ufffd", "\ufffd", "😀", "\\ud800", "\ufffd😀", "\ufffdx"]


def test_official_files_and_command(tmp_path, capsys):
    data = write_data(write_data(tmp_path / "d", count=3), name="live_relevance", count=1)
    first = RIGHT | {"input_tokens": 9, "output_tokens": 4, "latency": 0.5, "sample": 0}
    rows = [first, RIGHT | {"output": "2nd", "sample": 1}, WRONG, {"id": "live_relevance_0", "output": "no"}]
    score(tmp_path, rows, data, "--official_dir", str(tmp_path / "f"), "--model_name", "a/b-c")
    folder = tmp_path / "f" / "result" / "a_b-c"
    lines = (folder / "non_live" / "BFCL_v4_simple_python_result.json").read_text().splitlines()
    counts = {"input_token_count": 9, "output_token_count": 4, "latency": 0.5}
    result = '[{"name": "f", "arguments": {"p": 1}}]'
    assert json.loads(lines[0]) == {"id": "simple_python_0", "result": result, **counts}
    assert [json.loads(line)["id"] for line in lines] == ["simple_python_0", "simple_python_1"]  # one a case
    assert '"result": "null"' in (folder / "live" / "BFCL_v4_live_relevance_result.json").read_text()
    command = "bfcl evaluate --model a/b-c --test-category simple_python,live_relevance --partial-eval\n"
    assert command in capsys.readouterr().out


def test_official_files_of_v3(tmp_path):
    """v3 has other names, no folder per group, and the repeated id twice."""
    path = write_data(tmp_path / "d", "v3", "simple") / "BFCL_v3_simple.json"
    path.write_text(path.read_text().replace("simple_1", "simple_0"))
    rows = [{"id": name, "output": reply()} for name in ("simple_0", "simple_0#2")]
    score(tmp_path, rows, tmp_path / "d", "--official-dir", str(tmp_path / "f"))
    (file,) = (tmp_path / "f").rglob("*.json")
    assert file == tmp_path / "f" / "result" / "Salesforce_xLAM-2-3b-fc-r" / "BFCL_v3_simple_result.json"
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == ["simple_0", "simple_0"]


def test_the_handler_asks_and_decodes_as_we_do(monkeypatch):
    """With stand-ins for the package, which weighs gigabytes; tried once with the real one."""
    base = "bfcl_eval.model_handler.local_inference.base_oss_handler"
    config = SimpleNamespace(MODEL_CONFIG_MAPPING={}, ModelConfig=dict)
    monkeypatch.setitem(sys.modules, "bfcl_eval.constants.model_config", config)
    monkeypatch.setitem(sys.modules, base, SimpleNamespace(OSSHandler=object))
    monkeypatch.setitem(sys.modules, "overrides", SimpleNamespace(override=lambda method: method))
    module = importlib.import_module("evals.bfcl_handler")
    monkeypatch.delitem(sys.modules, "evals.bfcl_handler")
    handler = object.__new__(module.ToolN1Handler)  # __init__ would look for a server
    assert handler.decode_ast(reply(("f", {"p": 1})), None, False) == decode(reply(("f", {"p": 1})))
    with pytest.raises(ValueError, match="no closed tool-call section"):
        handler.decode_ast("no", None, False)
    texts = handler.decode_execute(reply(("f", {"p": {"a": "b"}}), ("g", {})), False)
    assert texts == ["f(p={'a': 'b'})", "g()"] and handler.decode_execute(reply(), False) == []
    for text in ("no", "<tool_call>[{}]</tool_call>", reply(("exec", {"x": "1"})), reply(("f(1);f", {}))):
        with pytest.raises(ValueError, match="plain calls"):
            handler.decode_execute(text, False)
    render = lambda chat, **_: json.dumps(chat)  # noqa: E731
    handler.tokenizer = SimpleNamespace(chat_template="t", name_or_path="m", apply_chat_template=render)
    messages = [{"role": role, "content": f"words of {role}"} for role in ("system", "user")]
    system, user = json.loads(handler._format_prompt(messages, [{"name": "f"}]))
    assert (system["role"], user["role"]) == ("system", "user") and '"name": "f"' in system["content"]
    assert system["content"].endswith("words of system")  # the data set's own system message is kept
