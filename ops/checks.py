"""What every start checks before its first step, because it has stopped or spoilt real runs."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from transformers import GenerationConfig

from config import Config, ConfigError, UserError, check_positions, first_line, printable
from corpus.examples import Example, Splits, example_kind
from corpus.sources import file_sha256
from distributed.ranks import Ranks, first_problem
from distributed.weights import model_config, skeleton
from evals.in_training import check_benchmarks
from losses import objective_of
from model import count_parameters, load_tokenizer
from ops.monitor import tracker_names
from ops.plan import CONTEXT, GB, Assumptions, adapter_weights, shape_of, verdict
from ops.run_dir import OLD
from prompts import check_tokenizer, decode_reply, encode_reply, render_completion, render_prompt, stop_ids
from reward import REWARDS, RewardFunction
from rollout import ENGINES

MOST_EMPTY = 0.2  # with a larger share of examples without a call, models were seen to answer [] always
NEUTRAL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Check:
    """One finding. status: ok, warning (suspicious) or problem (cannot work). remedy: what to do then."""

    name: str
    status: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.status:<9}{self.name}: {self.text}"
        return printable(f"{line}\n{'':<9}-> {self.remedy}" if self.remedy else line)


def judge(name: str, text: str, warnings: dict[str, bool], problems: dict[str, bool] | None = None) -> Check:
    """A finding from remedies and whether each is needed."""
    for status, remedies in (("problem", problems or {}), ("warning", warnings)):
        if needed := [remedy for remedy, is_so in remedies.items() if is_so]:
            return Check(name, status, text, "; ".join(needed))
    return Check(name, "ok", text)


@dataclass(frozen=True)
class Start:
    """What a run starts from. limit: so many examples are looked at one by one; the doctor looks at all."""

    config: Config
    ranks: Ranks
    template: str
    reward: RewardFunction
    splits: Splits
    tokenized: Splits
    tokenizer: object
    path: str  # of the start model: a folder or hub id
    steps: int  # of the whole run
    limit: int = 2000


def check_names(config: Config) -> None:
    """Raises ConfigError for a setting that names nothing that is there."""
    if config.rollout_engine not in ENGINES:
        raise ConfigError(f"rollout_engine: {config.rollout_engine!r} is none of {', '.join(ENGINES)}")
    objective_of(config)
    tracker_names(config)
    check_benchmarks(config)


def check_reference(config: Config, path: str, tokenizer) -> None:
    """Raises ConfigError where `reference` cannot read all that the model in `path` may write."""
    if not config.reference:
        return
    code = config.trust_remote_code
    try:
        vocabulary = load_tokenizer(config.reference, code).get_vocab()
        own, other = (model_config(name, code).get_text_config() for name in (path, config.reference))
        check_positions(config, other)
    except UserError as error:  # they speak of a model
        raise ConfigError(f"reference: {str(error).removeprefix('model: ')}") from None
    remedy = "take a model with the same vocabulary"
    for token, number in tokenizer.get_vocab().items():
        if vocabulary.get(token) != number:
            what = f"{token!r} is token {number} of the model and {vocabulary.get(token)} of the reference"
            raise ConfigError(f"reference: {what}; {remedy}")
    if other.vocab_size < own.vocab_size:
        what = f"{config.reference!r} has {other.vocab_size} embeddings, the model {own.vocab_size}"
        raise ConfigError(f"reference: {what}; {remedy}, and at least as many")


def check_start(start: Start) -> None:
    """Collective. Prints one line if all is well, else also what is not. Raises ConfigError, on all ranks,
    with the first problem.
    """
    found = examine(start)
    tell(found, start.ranks, [check for check in found if check.status != "ok"])
    problems = [f"{one.name}: {one.text}; {one.remedy}" for one in found if one.status == "problem"]
    if problem := first_problem("".join(problems[:1]), start.ranks):
        raise ConfigError(problem.removesuffix("; "))


def examine(start: Start) -> list[Check]:
    """Collective. All findings on the main rank. A check that fails itself is a warning: it stops no run."""
    found = []
    for check in CHECKS if start.ranks.main else CHECKS[:1]:
        name = check.__name__.removeprefix("check_")
        try:
            found.append(check(start))
        except UserError as error:
            found.append(Check(name, "problem", str(error)))
        except Exception as error:
            found.append(Check(name, "warning", f"check failed: {first_line(error)}"))
    return found


def tell(found: list[Check], ranks: Ranks, shown: list[Check]) -> None:
    """Prints `doctor: 7 checks ok` on the main rank, and what is to be shown before it."""
    counts = Counter(check.status for check in found)
    bad = "".join(f", {status}s: {counts[status]}" for status in ("warning", "problem") if counts[status])
    if ranks.main:
        print(*shown, f"doctor: {counts['ok']} checks ok{bad}", sep="\n", flush=True)


def check_processes(s: Start) -> Check:
    """Collective. New libraries, the same code and libraries on all ranks, and a run_dir that all see."""
    root = Path(__file__).parents[1]
    files = sorted([*root.glob("*.py"), *root.glob("[!.]*/*.py")])  # ours alone: .venv may lie beside them
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    seen = s.ranks.gather((Path(s.config.run_dir) / "config.yaml").exists())
    everyone = s.ranks.gather((versions, file_sha256(*files)))
    old = Version(torch.__version__) < Version("2.11") or Version(transformers.__version__) < Version("5.17")
    other = next((rank for rank, one in enumerate(everyone) if one != everyone[0]), 0)
    return judge("processes", f"{s.ranks.world} on {s.ranks.device.type}, {versions}", {}, {
        "pip install -r requirements.txt": old,
        f"rank {other} has other code or libraries than rank 0: bring both to one version": other > 0,
        "rank 0's files are not seen by all: choose a --run_dir on a shared disk": not all(seen),
    })


def check_sampling(s: Start) -> Check:
    """Tags and chat template; the tokens that end a reply; the model's own settings, which are not used."""
    check_tokenizer(s.tokenizer, s.template)
    try:
        own = GenerationConfig.from_pretrained(s.path, local_files_only=True)  # in vain, the hub takes 30 s
    except OSError:
        own = GenerationConfig()
    turns = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": "probe reply"}]
    text = render_prompt(s.tokenizer, turns, [], s.template, generation_prompt=False)
    closing = text.rpartition("probe reply")[2].strip()
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = [*ends, *s.tokenizer.encode(closing, add_special_tokens=False)[:1]]
    stops, name = stop_ids(s.tokenizer), s.tokenizer.convert_ids_to_tokens
    missing = ", ".join(name(i) for i in ends if i not in (None, *stops))
    unused = [key for key in NEUTRAL if getattr(own, key) not in (None, NEUTRAL[key])]
    text = f"replies end with {', '.join(map(name, stops))}; temperature {s.config.temperature:g} alone, "
    text += f"not the model's own {', '.join(unused)}" if unused else "as the model itself"
    return judge("sampling", text, {f"the model also ends with {missing}: take its tokenizer": bool(missing)})


def check_examples(s: Start) -> Check:
    """Right replies, read as if the model had sampled them, are short enough and paid in full; empty ones
    are not paid.
    """
    row, train = REWARDS.get(s.config.reward), s.tokenized.train
    limit = s.limit if row else s.limit // 100  # a function of the user's own may be slow
    examples = [item.example for item in train[:: -(-len(train) // limit)]]
    cut, failed, silent, stops = 0, [], 0, stop_ids(s.tokenizer)

    def paid(ids: list[int], one: Example) -> float:
        return s.reward(decode_reply(s.tokenizer, ids, stops), one.answer, one.tools).total

    for one in examples:
        reply = encode_reply(s.tokenizer, render_completion(one.answer, "."))
        right, empty = paid(reply, one), paid([], one)
        cut += len(reply) > s.config.max_response_tokens
        silent += empty > 0
        if right != row.right if row else right <= empty:
            failed.append(one.id)
    text = f"of {len(examples):,} right replies {cut:,} are too long and {len(failed):,} not paid in full"
    longer, look = "raise max_response_tokens", f"look at {', '.join(failed[:5])}"
    return judge("examples", f"{text}; of as many empty ones {silent:,} are paid", {
        longer: cut > 0, look: bool(failed), "silence can be learnt: choose another --reward": silent > 0,
    }, {  # only the user knows what a reward of their own pays for
        longer: bool(row) and cut > len(examples) / 2, look: bool(row) and len(failed) > 0.01 * len(examples),
    })


def check_schedule(s: Start) -> Check:
    """What is learnt from: prompts that are skipped, kinds, and held-out cases."""
    config, train, count = s.config, s.tokenized.train, len(s.splits.train)
    kinds = Counter(example_kind(item.example) for item in train)
    cases, skipped = sum(map(len, s.tokenized.held_out.values())), count - len(train)
    text = f"{s.steps:,} steps of {config.prompts_per_step:,} prompts, {cases:,} held-out cases, "
    text += ", ".join(f"{n:,} {kind}" for kind, n in kinds.most_common())
    return judge("schedule", f"{text}; {skipped:,} prompts are too long or refused", {
        "raise max_prompt_tokens, or see above which are refused": skipped > 0.01 * count,
        "[] is right too often, and may be all that is learnt": kinds["none"] > MOST_EMPTY * len(train),
        "nothing shows whether it learns: set test_share or test_data": not cases,
        f"lower prompts_per_step to {len(train)}: a step repeats": config.prompts_per_step > len(train),
    })


def check_model(s: Start) -> Check:
    """Positions for the longest reply, whose frequencies must not depend on what follows a token."""
    model = model_config(s.path, s.config.trust_remote_code).get_text_config()
    check_positions(s.config, model)
    rotary = getattr(model, "rope_parameters", None) or {}
    kind = rotary.get("rope_type", "default")
    tokens = s.config.max_prompt_tokens + s.config.max_response_tokens
    known = rotary.get("original_max_position_embeddings") or getattr(model, "max_position_embeddings", 0)
    differ = kind in ("dynamic", "longrope") and tokens > known
    remedy = f"beyond {known} tokens a token's log-prob depends on what follows it: lower max_prompt_tokens"
    return judge("model", f"{model.model_type} with rotary positions of type {kind}", {}, {remedy: differ})


def check_disk(s: Start) -> Check:
    """Room for the checkpoints that are kept, the best one, and the one that is being written."""
    model = model_config(s.path, s.config.trust_remote_code)
    model = skeleton(model, torch.float32, s.config.trust_remote_code)
    trained = count_parameters(model)
    if s.config.lora_rank:
        trained = s.config.lora_rank * adapter_weights(model, s.config.lora_targets)
    size, run_dir = 12 * trained / GB, Path(s.config.run_dir)  # with AdamW's moments
    replaced = [*run_dir.glob("step_*/*"), *run_dir.glob(f"{OLD}/**/*")]
    saved = sum(file.stat().st_size for file in replaced)
    free, needed = (shutil.disk_usage(run_dir).free + saved) / GB, (s.config.keep_checkpoints + 2) * size
    remedy = "make room, lower keep_checkpoints, or choose another --run_dir"
    text = f"checkpoints take {size:.3g} GB each, {needed:.3g} GB in all; {free:.3g} GB are free"
    return judge("disk", text, {remedy: free < needed}, {remedy: free < size})


def check_memory(s: Start) -> Check:
    """The plan's arithmetic against the GPU's memory; only a step that was made knows for sure."""
    if s.ranks.device.type != "cuda":
        return Check("memory", "ok", "not estimated on a CPU")
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() + CONTEXT
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    assumed = Assumptions(gpus=s.ranks.world, gpus_per_node=local, gpu_memory=free / GB)
    try:
        shape = shape_of(model_config(s.path, s.config.trust_remote_code), s.config)
    except ConfigError as error:
        return Check("memory", "ok", f"not estimated: {error}")
    said, _, remedy = verdict(s.config, shape, assumed).partition("; ")
    return Check("memory", "ok" if said.startswith("fits") else "warning", said, remedy)


# The first is collective.
CHECKS = (
    check_processes, check_sampling, check_examples, check_schedule, check_model, check_disk, check_memory,
)
