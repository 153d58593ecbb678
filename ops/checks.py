"""What is looked at before the first step: machine, processes, tokenizer, sampling settings, data, disk and
memory.

Each function returns what it finds; doctor.py runs them. CHECKS are those that one process makes alone, on a
Start.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
import transformers
from transformers import GenerationConfig

from config import Config, ConfigError, check_positions
from corpus.examples import Example, Splits, example_kind
from distributed.checkpoint import complete_steps
from distributed.fsdp import model_config, skeleton
from distributed.ranks import Ranks
from evals.in_training import check_folders
from losses import loss_of
from model import count_parameters
from ops import plan
from ops.estimate import CONTEXT, FP32, GB, Assumptions, shape_of
from ops.monitor import tracker_names
from prompts import PromptError, check_tokenizer, encode_reply, render_completion, render_prompt, stop_ids
from reward import REWARDS, RewardFunction
from rollout import ENGINES

QUICK_EXAMPLES = 2000  # that a start looks at one by one; --doctor looks at all
OWN_REWARD_EXAMPLES = 20  # at a start, for a reward function of the user's own: it may be slow
MOST_EMPTY = 0.2  # a larger share of records that call nothing was seen to collapse to answering [] always
THOUGHT = "The request names the tools' arguments."  # stands for any thought
NEEDED = {"torch": (2, 11), "transformers": (5, 17)}
SLOW_LINK = 5.0  # GB/s between GPUs
FAMILIES = {
    "Qwen": ("<|im_end|>", "<|endoftext|>"),
    "Llama 3": ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
}
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Check:
    """One finding. status: ok, warning (suspicious) or problem (cannot work). remedy: what to do; "" where it
    is ok. failed: the check itself did, so that nothing is known.
    """

    name: str
    status: str
    text: str
    remedy: str = ""
    failed: bool = False


@dataclass(frozen=True)
class Start:
    """What a run starts from. path: the start model's folder or hub id. steps: of the whole run. limit: how
    many training examples are looked at one by one.
    """

    config: Config
    ranks: Ranks
    template: str
    reward: RewardFunction
    splits: Splits
    tokenized: Splits
    tokenizer: object
    path: str
    steps: int
    limit: int = QUICK_EXAMPLES


def _some(s: Start, limit: int) -> list[Example]:
    """At most `limit` training examples, evenly spread."""
    train = s.tokenized.train
    return [item.example for item in train[:: -(-len(train) // limit)]]


# -------------------------------------------------------------------------------------- machine and processes


def check_names(config: Config) -> None:
    """Raises ConfigError for a setting that names nothing that is there."""
    if config.rollout_engine not in ENGINES:
        raise ConfigError(
            f"rollout_engine must be one of {', '.join(ENGINES)}, not {config.rollout_engine!r}"
        )
    loss_of(config)
    tracker_names(config)
    check_folders(config)


def check_versions() -> Check:
    """torch and transformers are new enough."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    text = (
        ", ".join(f"{name} {version}" for name, version in versions.items())
        + f", Python {platform.python_version()}"
    )
    old = [
        name for name, version in versions.items() if tuple(map(int, version.split(".")[:2])) < NEEDED[name]
    ]
    if old:
        wanted = " and ".join(f"{name} >= {'.'.join(map(str, NEEDED[name]))}" for name in old)
        return Check("versions", "problem", text, f"{wanted} is needed: pip install -r requirements.txt")
    return Check("versions", "ok", text)


def code_hash() -> str:
    """Of the project's files that are imported: also says what git does not, on a machine with its own
    copy.
    """
    here = Path(__file__).parents[1]
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    files = sorted(file for file in files if file and here in Path(file).parents)
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def check_ranks(config: Config, ranks: Ranks) -> list[Check]:
    """Collective. Processes and devices: whether all run the same code and libraries, and have something to
    do.
    """
    cuda = ranks.device.type == "cuda"
    device = torch.cuda.get_device_name(ranks.device) if cuda else "CPU"
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}"
    hosts, devices, versions, code = zip(
        *ranks.gather((socket.gethostname(), device, libraries, code_hash()))
    )
    for what, values in (("this project's files", code), ("torch or transformers", versions)):
        other = next((rank for rank, value in enumerate(values) if value != values[0]), 0)
        if other:
            remedy = f"bring {what} to one version on {hosts[0]} and {hosts[other]}"
            return [
                Check(
                    "processes", "problem", f"rank {other} has another version of {what} than rank 0", remedy
                )
            ]
    text = f"{ranks.world} on {len(set(hosts))} machine(s): {', '.join(f'{n} x {x}' for x, n in Counter(devices).items())}"
    text += f", {'NCCL and gloo' if cuda else 'gloo'}; of {config.prompts_per_step} prompts a step and "
    text += f"{config.minibatch_prompts} an update each has {config.prompts_per_step / ranks.world:.4g} and "
    text += f"{config.minibatch_prompts / ranks.world:.4g}"
    if config.minibatch_prompts < ranks.world:
        remedy = f"some have nothing to do in an update: raise minibatch_prompts to {ranks.world}, or take fewer processes"
        return [Check("processes", "warning", text, remedy)]
    return [Check("processes", "ok", text)]


def check_shared(path: Path, run_dir: Path, ranks: Ranks) -> Check:
    """Collective. Whether all ranks see a file that rank 0 has written."""
    seen = ranks.gather(path.exists())
    if not all(seen):
        text = f"rank {seen.index(False)} does not see what rank 0 writes in {path.parent}"
        return Check("run_dir", "problem", text, "choose a --run_dir on a disk that all processes share")
    return Check("run_dir", "ok", f"{run_dir} can be written, and is seen by all processes")


# ------------------------------------------------------------------------------------- tokenizer and sampling


def check_template(s: Start) -> Check:
    """Tags survive the tokenizer, the chat template adds nothing to the conversation."""
    try:
        check_tokenizer(s.tokenizer, s.template)
    except PromptError as error:
        return Check("chat template", "problem", str(error), "take an Instruct model, with its own tokenizer")
    return Check(
        "chat template", "ok", "tags survive the tokenizer; one system prompt, tools once, nothing added"
    )


def _own_generation_config(s: Start) -> GenerationConfig:
    """What the model brings along for sampling; an empty one where it brings nothing."""
    try:
        return GenerationConfig.from_pretrained(
            s.path, local_files_only=True
        )  # asking the hub in vain takes half a minute
    except OSError:
        return GenerationConfig()


def check_end_tokens(s: Start) -> Check:
    """The tokens that end a reply, against the family's, the generation config's and the chat template's."""
    ids, vocabulary, token_of = (
        stop_ids(s.tokenizer),
        s.tokenizer.get_vocab(),
        s.tokenizer.convert_ids_to_tokens,
    )
    text = ", ".join(f"{token_of(i)} ({i})" for i in ids)
    for family, tokens in FAMILIES.items():
        absent = [token for token in tokens if token not in vocabulary] if tokens[0] in vocabulary else []
        text += f"; its vocabulary lacks {', '.join(absent)} of the {family} family" if absent else ""
    own = _own_generation_config(s).eos_token_id or []
    missing = [
        f"{token_of(i)} of its generation_config"
        for i in ([own] if isinstance(own, int) else own)
        if i not in ids
    ]
    turns = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": "probe reply"}]
    closing = render_prompt(s.tokenizer, turns, [], s.template, generation_prompt=False).rpartition(
        "probe reply"
    )[2]
    for i in s.tokenizer.encode(closing.strip(), add_special_tokens=False)[:1]:
        missing += [f"{token_of(i)}, with which its chat template closes a reply"] * (i not in ids)
    if missing:
        remedy = "replies may run on to max_response_tokens: take the model's own tokenizer, or add to prompts.END_TOKENS"
        return Check("end tokens", "warning", f"{text}; not among them: {'; '.join(missing)}", remedy)
    return Check("end tokens", "ok", text)


def check_sampling(s: Start) -> Check:
    """The settings that sampling has, and those that the model brings along and sampling does not have."""
    own, engine = _own_generation_config(s), s.config.rollout_engine
    unused = [
        f"{key} {value}" for key, x in NEUTRAL.items() if (value := getattr(own, key, None)) not in (None, x)
    ]
    text = f"temperature {s.config.temperature:g}, top_k 0, top_p 1, repetition penalty 1, by {engine}"
    text += f"; not used: the model's own {', '.join(unused)}" if unused else ""
    if engine == "continuous_batching" and s.ranks.device.type == "cpu":
        return Check(
            "sampling", "warning", text, "that engine is meant for GPUs: take --rollout_engine shared_prefix"
        )
    return Check("sampling", "ok", text)


# --------------------------------------------------------------------------------------------------- the data


def _spread(lengths: Sequence[int]) -> str:
    ordered = sorted(lengths)
    numbers = ordered[0], median(ordered), ordered[int(0.95 * (len(ordered) - 1))], ordered[-1]
    return " / ".join(f"{number:,.0f}" for number in numbers) + " tokens (min / median / 95 % / max)"


def check_prompts(s: Start) -> Check:
    """Lengths of the prompts, and how many are skipped because they are too long."""
    count, kept, limit = len(s.splits.train), s.tokenized.train, s.config.max_prompt_tokens
    text = f"{_spread([len(item.ids) for item in kept])}; {count - len(kept):,} of {count:,} are longer than {limit:,}"
    if count - len(kept) > 0.01 * count:
        return Check("prompts", "warning", text, "they are skipped: raise max_prompt_tokens")
    return Check("prompts", "ok", text)


def check_replies(s: Start) -> Check:
    """Lengths of the right replies, with next to no thought, against max_response_tokens."""
    limit, examples = s.config.max_response_tokens, _some(s, QUICK_EXAMPLES)
    lengths = [len(encode_reply(s.tokenizer, render_completion(one.answer, "."))) for one in examples]
    cut = [one.id for one, length in zip(examples, lengths) if length > limit]
    text = f"{_spread(lengths)} without the thought; {limit:,} are allowed"
    if cut:
        text += f", which cuts off {len(cut):,} of {len(examples):,}: {', '.join(cut[:3])}"
        # Only the user knows what a reward of their own pays for.
        status = "problem" if len(cut) > len(examples) / 2 and s.config.reward in REWARDS else "warning"
        return Check(
            "right replies", status, text, "raise max_response_tokens: such prompts can teach nothing"
        )
    return Check("right replies", "ok", text)


def check_limits(s: Start) -> Check:
    """The longest prompt and reply against the model's positions."""
    positions = model_config(s.path, s.config.trust_remote_code).max_position_embeddings
    try:
        check_positions(s.config, positions)
    except ConfigError as error:
        return Check("positions", "problem", str(error), "lower one of the two")
    longest = f"{s.config.max_prompt_tokens:,} + {s.config.max_response_tokens:,}"
    return Check("positions", "ok", f"{longest} tokens of the model's {positions:,}")


def check_labels(s: Start) -> Check:
    """How many examples there are of each kind, and whether one easy answer is right too often."""
    kinds = Counter(example_kind(item.example) for item in s.tokenized.train)
    text, share = ", ".join(f"{n:,} {kind}" for kind, n in kinds.most_common()), kinds["none"] / kinds.total()
    if share > MOST_EMPTY:
        remedy = (
            "the policy may learn to answer [] always: watch the accuracy per kind, or add records with calls"
        )
        return Check("labels", "warning", f"{text}: the empty list is right for {share:.0%}", remedy)
    return Check("labels", "ok", text)


def check_truth(s: Start) -> Check:
    """The ground truth, rendered by ourselves, is paid in full, and an empty reply is not paid."""
    name, row = s.config.reward, REWARDS.get(s.config.reward)
    quick = s.limit <= QUICK_EXAMPLES
    examples = _some(s, OWN_REWARD_EXAMPLES if quick and not row else s.limit)
    failed, paid, example = [], [], ""
    for one in examples:
        right = s.reward(render_completion(one.answer, THOUGHT), one.answer, one.tools)
        empty = s.reward("", one.answer, one.tools).total
        if right.total != row.right if row else right.total <= empty:
            example = example or f"{right.total:g} ({right.reason})"
            failed.append(one.id)
        elif empty > 0:
            paid.append(one.id)
    if failed:
        few = not row or len(failed) <= 0.01 * len(examples)  # what a user's own function means is not known
        text = (
            f"{name} does not pay it in full in {len(failed):,} of {len(examples):,} records: {example} for "
        )
        remedy = "these records teach nothing, or the wrong thing: look at them, or change --reward"
        return Check("ground truth", "warning" if few else "problem", text + ", ".join(failed[:5]), remedy)
    if paid:
        text = f"{name} pays an empty reply in {len(paid):,} of {len(examples):,} records, like {', '.join(paid[:5])}"
        return Check(
            "ground truth", "warning", text, "silence can be learnt: --reward binary does not pay for it"
        )
    full = f"{row.right:g}" if row else "more than an empty reply"
    return Check(
        "ground truth", "ok", f"rendered by ourselves it is paid {full} in {len(examples):,} records"
    )


def check_schedule(s: Start) -> Check:
    """What the run will do."""
    config, prompts, cases = s.config, len(s.tokenized.train), sum(map(len, s.tokenized.held_out.values()))
    evaluations = 2 + ((s.steps - 1) // config.eval_every if config.eval_every else 0)
    passes = s.steps * config.prompts_per_step / prompts
    text = f"{s.steps:,} steps of {config.prompts_per_step:,} prompts x {config.group_size} completions, {passes:.1f} passes"
    text += f" over {prompts:,} prompts; {evaluations} evaluations of {cases:,} cases; {_checkpoints(s)} checkpoint(s)"
    if not cases:
        return Check(
            "schedule", "warning", text, "nothing shows whether it learns: set test_share or test_data"
        )
    if config.prompts_per_step > prompts:
        return Check(
            "schedule", "warning", text,
            f"a step repeats prompts: lower prompts_per_step to {prompts:,} or less",
        )
    return Check("schedule", "ok", text)


# -------------------------------------------------------------------------------------------- disk and memory


def _checkpoints(s: Start) -> int:
    return -(-s.steps // s.config.save_every) if s.config.save_every else 1


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _weight_bytes(s: Start) -> int:
    """Of the whole model in fp32."""
    model = model_config(s.path, s.config.trust_remote_code)
    return FP32 * count_parameters(skeleton(model, torch.float32, s.config.trust_remote_code))


def check_disk(s: Start) -> Check:
    """Room for the checkpoints that are kept, the best one, the one being written, and the model at the
    end.
    """
    run_dir, model = Path(s.config.run_dir), _weight_bytes(s)
    kept, size = (
        min(_checkpoints(s), s.config.keep_checkpoints + 2),
        3 * model,
    )  # weights and AdamW's two moments
    needed, free = kept * size + model, shutil.disk_usage(existing(run_dir)).free
    free += sum(
        file.stat().st_size for file in run_dir.glob("step_*.tmp/*")
    )  # left by a kill: the Saver clears it
    text = f"{kept} checkpoint(s) of {size / GB:.3g} GB and the model: {needed / GB:.3g} GB; {free / GB:.3g} GB are free"
    remedy = "make room, lower keep_checkpoints, or choose another --run_dir"
    if free < size:
        return Check("disk", "problem", text, remedy)
    if free + len(complete_steps(run_dir)) * size < needed:  # what is there will be replaced
        return Check("disk", "warning", text, remedy)
    return Check("disk", "ok", text)


def check_memory(s: Start) -> Check:
    """The plan's arithmetic against the memory that is there; only a step that was made knows for sure."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", s.ranks.world))
    if s.ranks.device.type != "cuda":
        # weights, gradients and AdamW's state, the reference; and in each process the whole policy while it
        # samples
        needed = (4 + bool(s.config.kl_coef) + local) * _weight_bytes(s)
        text = f"weights and optimizer take {needed / GB:.2g} GB of the CPU's memory, activations come on top"
        if (available := _available_memory()) and needed > 0.8 * available:
            remedy = "take a smaller model, or a machine with a GPU"
            return Check("memory", "warning", f"{text}; {available / GB:.2g} GB are available", remedy)
        return Check("memory", "ok", text)
    free, total = torch.cuda.mem_get_info(s.ranks.device)
    others = total - free - torch.cuda.memory_reserved(s.ranks.device) - CONTEXT
    if others > GB:
        return Check(
            "memory", "warning", f"other processes hold {others / GB:.1f} GB of this GPU",
            "nvidia-smi names them",
        )
    assumed = Assumptions(
        gpus=s.ranks.world, gpus_per_node=local, gpu_memory=total / GB,
        prompt_tokens=max(1, round(mean(len(item.ids) for item in s.tokenized.train))),
        response_tokens=min(Assumptions().response_tokens, s.config.max_response_tokens),
    )
    try:
        shape = shape_of(model_config(s.path, s.config.trust_remote_code), s.config.trust_remote_code)
    except ConfigError as error:
        return Check("memory", "ok", f"not estimated: {error}")
    said, _, remedy = plan.verdict(s.config, shape, assumed).partition("; ")
    return Check(
        "memory", "ok" if said.startswith("fits") else "warning", f"as --plan counts, it {said}", remedy
    )


def _available_memory() -> float:
    """Bytes of the CPU's memory that can be had; 0 where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="ascii").splitlines() if meminfo.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0.0)


CHECKS: dict[str, Callable[[Start], Check]] = {
    "chat template": check_template,
    "end tokens": check_end_tokens,
    "sampling": check_sampling,
    "prompts": check_prompts,
    "right replies": check_replies,
    "positions": check_limits,
    "labels": check_labels,
    "ground truth": check_truth,
    "schedule": check_schedule,
    "disk": check_disk,
    "memory": check_memory,
}
