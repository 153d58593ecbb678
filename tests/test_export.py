"""export.py: a model in training, or its checkpoint, becomes a folder that transformers loads as it is."""

import copy
import json
import re

import pytest
import torch
import torch.distributed as dist
import yaml
from test_prompts import ADD, QWEN, TALK, llama, qwen
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from config import Config, ConfigError, UserError
from corpus.sources import append_jsonl
from corpus.tiny_model import build_tiny_model, build_tiny_tokenizer
from distributed.checkpoint import Saver
from distributed.ranks import Ranks
from model import load_tokenizer
from ops.export import ask_from_tools, export, export_model, main, write_model
from prompts import SYSTEM_TEMPLATE, ToolCall, encode_prompt, render_prompt, set_template_kwargs, tool_prompt

TOKENIZER = build_tiny_tokenizer([], 300)
STATE = {"step": 3, "seconds": 7200.0, "flops": 1.5e18}
IDS = torch.arange(20)[None]


@pytest.fixture(scope="module")
def ranks():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def policy(ranks):
    """A sharded Qwen2 with tied embeddings."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=301, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, tie_word_embeddings=True, eos_token_id=TOKENIZER.eos_token_id,
    )
    return fully_shard(Qwen2ForCausalLM(config), mesh=init_device_mesh("cpu", (1,))).requires_grad_(False)


def test_a_model_in_training_is_written_as_a_folder_that_computes_the_same(policy, ranks, tmp_path):
    write_model(policy, TOKENIZER, tmp_path / "out", Config(), STATE, {"held_out/accuracy": 0.5}, ranks)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert type(loaded) is Qwen2ForCausalLM and loaded.dtype == torch.float32
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(IDS).logits, policy(IDS).logits)
    asking = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tool_prompt(asking) == SYSTEM_TEMPLATE and tool_prompt(TOKENIZER) is None
    assert asking.chat_template.endswith(TOKENIZER.chat_template)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    defaults = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {"eos_token_id", "pad_token_id"} <= defaults.keys()
    assert not defaults.keys() & {"top_k", "top_p", "do_sample", "temperature", "repetition_penalty"}
    with pytest.raises(ValueError, match="not the weights of a Qwen2ForCausalLM: model.embed_tokens.weight"):
        export_model(policy.config, {}, TOKENIZER, tmp_path, torch.float32)


def test_a_checkpoint_is_exported_in_bf16(policy, ranks, tmp_path, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "out"
    saver = Saver(run, ranks, 2)
    accepted = {"run": {"changes": ["after step 2: data"]}}
    saver.save(STATE | accepted, policy, TOKENIZER, torch.optim.AdamW(policy.parameters()))
    saver.finish()
    (run / "prompt.txt").write_text("My tools:\n{tools}")
    settings = {"lr": 0.5, "data": str(run / "train.json"), "prompt_template": str(run / "prompt.txt")}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "train.json").write_text("[]")
    (run / "git.txt").write_text("commit 238d6d1\n M grpo.py\n\nresumed on 2026-01-02 with\ncommit 5f0a\n")
    append_jsonl(run / "log.jsonl", [{"step": 3, "bfcl/accuracy": 0.75, "bfcl/n": 200}])
    main([str(run / "step_3"), str(out)])
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    whole = Qwen2ForCausalLM(policy.config).to(torch.bfloat16)
    whole.load_state_dict({name: x.full_tensor() for name, x in policy.state_dict().items()})
    assert loaded.dtype == torch.bfloat16 and torch.equal(loaded(IDS).logits, whole(IDS).logits)
    card = (out / "README.md").read_text()
    for line in ("- `lr`: 0.5", "After step 3 (2 hours, 1.5e+18 FLOPs)", "- `bfcl/accuracy`: 0.75",
                 "My tools:\n{tools}\n", "commit 238d6d1, commit 5f0a with uncommitted changes",
                 "- after step 2: data",
                 f"- `{run / 'train.json'}`: 4f53cda18c2baa0c"):
        assert line in card, line
    with pytest.raises(ConfigError, match="step_9 does not exist; the checkpoints of .*: step_3"):
        main([str(run / "step_9"), str(tmp_path / "none")])
    with pytest.raises(ConfigError, match="out exists already"):
        main([str(run / "step_3"), str(out)])
    asked = AutoTokenizer.from_pretrained(out).apply_chat_template(
        TALK[1:2], tools=[ADD], add_generation_prompt=True, return_dict=False
    )
    assert asked == encode_prompt(TOKENIZER, TALK[1:2], [ADD], "My tools:\n{tools}")
    monkeypatch.chdir(out)
    for code in re.findall(r"(?ms)^```python\n(.*?)^```", card):
        exec(code.replace("max_new_tokens=200", "max_new_tokens=2"), {})
    (tmp_path / "file").touch()
    for where in ("file/out", "file/in/out"):
        with pytest.raises(UserError, match="cannot write .*/file is no folder"):
            main([str(run / "step_3"), str(tmp_path / where)])
    (run / "git.txt").write_text("")
    broken = {"log.jsonl": b"{}\n", "config.yaml": b"lr: [", "step_3/state.json": b"{"}
    for name, content in broken.items():
        before = (run / name).read_bytes()
        (run / name).write_bytes(content)
        with pytest.raises(UserError, match=str(run / name)):
            main([str(run / "step_3"), str(tmp_path / "broken")])
        (run / name).write_bytes(before)
    with pytest.raises(UserError, match="step_4"):
        main([str(run / "step_4"), str(tmp_path / "broken")])
    assert not list(tmp_path.glob("broken*"))
    main([str(run / "step_3"), str(tmp_path / "unknown")])
    for name in ("git.txt", "log.jsonl"):  # a checkpoint that was copied without them
        (run / name).unlink()
    main([str(run / "step_3"), str(tmp_path / "copied")])
    assert "Code: unknown." in (tmp_path / "copied/README.md").read_text()


WORDS = ['weather in Paris {"name": "get_weather", "arguments": {"city": "Paris"}}, "a taxi in Rome"'] * 9
ODD = ["", " Paris (12.5)\n\n\tit's Zürich, Zu\u0308rich", "2024",
       '<think>東京</think><tool_call>[{"name": "a", "arguments": {}}]</tool_call>']


def test_autotokenizer_gives_the_ids_of_the_run(tmp_path):
    """It goes by the type of the model: words were split as Qwen2's are, and the demo lost its answers."""
    tokenizer = build_tiny_tokenizer(WORDS, 330)
    for name in ("first", "again"):  # an export of an export
        folder = tmp_path / name
        export(build_tiny_model(tokenizer, 16, 1, 0), tokenizer, folder)
        for options in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
            loaded = AutoTokenizer.from_pretrained(folder, **options)
            for text in [*WORDS, *ODD]:
                assert loaded.encode(text) == tokenizer.encode(text), (options, text)
        tokenizer = load_tokenizer(str(folder))
    plain = tmp_path / "plain"  # written by transformers alone
    tokenizer.save_pretrained(plain)
    Qwen2Config(vocab_size=len(tokenizer)).save_pretrained(plain)
    assert load_tokenizer(str(plain)).encode(WORDS[0]) == tokenizer.encode(WORDS[0])


def test_an_export_that_loads_as_it_is_brings_no_code(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    Qwen2Config(vocab_size=len(TOKENIZER)).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)  # transformers' own class for the model
    export(build_tiny_model(tokenizer, 16, 1, 0), tokenizer, tmp_path / "out")
    assert not list(tmp_path.rglob("*.py"))


def test_the_card_names_the_class_where_autotokenizer_cannot_be_right(policy, ranks, tmp_path, monkeypatch):
    monkeypatch.setattr("ops.export._same_ids", lambda *_: False)
    write_model(policy, TOKENIZER, tmp_path / "out", Config(), STATE, {}, ranks)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"ForCausalLM, {type(TOKENIZER).__name__}\n" in card and "AutoTokenizer" not in card


DATED = "\n{{ tools or '' }}" + QWEN + "{{ strftime_now('%d %B') }}{{ date_string | default('') }}"
ODD_CALL = ToolCall("é", {"a": 'Zü "\\ 漢 🙂, b: c\n\x01 \\u00e9', "b": [1, 2.5, None, {"c": {}}]})
TALES = [*TALK, {"role": "assistant", "content": "", "calls": []}, {"role": "system", "content": "Late."},
         {"role": "assistant", "content": "", "calls": [ODD_CALL, ToolCall("f", {})]}]


def as_text(arguments: dict) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def as_openai(messages: list[dict], arguments) -> list[dict]:
    """The conversation with `tool_calls`. arguments: writes those of a call."""
    written = []
    for message in messages:
        message = copy.deepcopy(message)
        if (calls := message.pop("calls", None)) is not None:
            functions = [{"name": call.name, "arguments": arguments(call.arguments)} for call in calls]
            message["tool_calls"] = [{"type": "function", "id": "1", "function": one} for one in functions]
            message["content"] = message["content"] or None
        written.append(message)
    return written


@pytest.mark.parametrize("arguments", [dict, as_text], ids=["objects", "text"])
@pytest.mark.parametrize("tokenizer", [
    qwen(), llama(), qwen(DATED), qwen({"default": QWEN, "tool_use": "x"}),
], ids=["qwen", "llama", "dated", "several templates"])
def test_the_exported_template_asks_from_tools_as_training_does(tokenizer, arguments):
    plain, asking = copy.copy(tokenizer), copy.copy(tokenizer)
    template = "Say 'hi' to {tools}\n{{ x }} %} \"PROMPT\" \\n é🙂 CALL"
    for other in ("Another {tools}", template, template):  # a later call replaces what is there
        ask_from_tools(asking, other)
    for tools in ([ADD, {"name": "é", "description": '<"b"> & \'c\''}], []):
        expected = render_prompt(plain, TALES, tools, template)
        for given in (tools, [{"type": "function", "function": tool} for tool in tools]):
            chat = as_openai(TALES, arguments)
            asked = asking.apply_chat_template(chat, tools=given, tokenize=False, add_generation_prompt=True)
            assert asked == expected
        assert render_prompt(asking, TALES, tools, template) == expected, "ours pass no tools"
    chat = [{"role": "user", "content": "hi"}]
    ours, theirs = (one.apply_chat_template(chat, tokenize=False, date_string="x") for one in (asking, plain))
    assert ours == theirs, "without tools it changes nothing"


def test_template_variables_and_the_tool_prompt_do_not_nest():
    """Training goes on with an exported model, and sets other variables."""
    tokenizer = qwen("{{ mode }}" + QWEN)
    for mode in ("one", "two"):
        set_template_kwargs(tokenizer, {"mode": mode})
        ask_from_tools(tokenizer, f"{mode} {{tools}}")
    fresh = qwen("{{ mode }}" + QWEN)
    set_template_kwargs(fresh, {"mode": "two"})
    asked = tokenizer.apply_chat_template(TALK[:2], tools=[], tokenize=False, add_generation_prompt=True)
    assert asked == render_prompt(fresh, TALK[:2], [], "two {tools}")
    ask_from_tools(fresh, "two {tools}")
    assert tokenizer.chat_template == fresh.chat_template
