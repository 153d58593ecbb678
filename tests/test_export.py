"""export.py: a model in training, or its checkpoint, becomes a folder that transformers loads as it is."""

import json

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from config import Config, ConfigError
from corpus.sources import append_jsonl
from corpus.tiny_model import build_tiny_tokenizer
from distributed.checkpoint import Saver
from distributed.ranks import Ranks
from ops.export import export_model, main, write_model
from prompts import stop_ids

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
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TOKENIZER.chat_template
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    defaults = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert sorted(defaults.pop("eos_token_id")) == sorted(stop_ids(TOKENIZER)) and "pad_token_id" in defaults
    assert not defaults.keys() & {"top_k", "top_p", "do_sample", "temperature", "repetition_penalty"}
    with pytest.raises(ValueError, match="not the weights of a Qwen2ForCausalLM: model.embed_tokens.weight"):
        export_model(policy.config, {}, TOKENIZER, tmp_path, torch.float32)


def test_a_checkpoint_is_exported_in_bf16(policy, ranks, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    saver = Saver(run, ranks, 2)
    saver.save(STATE, policy, TOKENIZER, torch.optim.AdamW(policy.parameters()))
    saver.finish()
    (run / "config.yaml").write_text(yaml.safe_dump({"lr": 0.5, "data": str(run / "train.json")}))
    (run / "train.json").write_text("[]")
    (run / "git.txt").write_text("commit 238d6d1\n M grpo.py\n")
    append_jsonl(run / "log.jsonl", [{"step": 3, "bfcl/accuracy": 0.75, "bfcl/n": 200}])
    main([str(run / "step_3"), str(out)])
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    whole = Qwen2ForCausalLM(policy.config).to(torch.bfloat16)
    whole.load_state_dict({name: x.full_tensor() for name, x in policy.state_dict().items()})
    assert loaded.dtype == torch.bfloat16 and torch.equal(loaded(IDS).logits, whole(IDS).logits)
    card = (out / "README.md").read_text()
    for line in ("- `lr`: 0.5", "After step 3 (2 hours, 1.5e+18 FLOPs)", "- `bfcl/accuracy`: 0.75",
                 "commit 238d6d1 with uncommitted changes", f"- `{run / 'train.json'}`: 4f53cda18c2baa0c"):
        assert line in card, line
    with pytest.raises(ConfigError, match="out exists already"):
        main([str(run / "step_3"), str(out)])
