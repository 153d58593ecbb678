"""The default rollout engine: prompts -> sampled token ids and their log-probs.

It stores the K/V of a prompt once per group, whatever the number of copies, so a decode step reads and
multiplies it once (grid.py). Groups that have ended make place for prompts that wait. On CUDA the model's
part of a step is replayed as a graph. Every sampling rule is explicit, so nothing of a model's
generation_config (top_k, top_p, repetition penalty) can leak into the samples. Engines with the same
signature are in hf_engines.py.
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from kernel.grid import (
    ROW_STATE,
    Batch,
    Request,
    admit,
    advance,
    kv_sizes,
    make_batch,
    make_room,
    narrow,
    shrink,
)

KEEP_SHARE = 0.75  # with fewer groups (or rows) alive than this share, the batch is filled up or shrinks
PASS_TOKENS = 1024  # replies that grow longer leave the batch and are finished together, in a later pass
CUDA_STEPS_PER_CHECK = 16  # asking whether rows have finished waits for the GPU, so not at every step
CPU_READ = 16  # a CPU reads own K/V in blocks of so many tokens; a GPU all that there is room for
CHOICE_BLOCK = 256  # tokens of a large vocabulary among which the sampler looks for one
CHOICE_MOST = 4096  # the largest vocabulary in which it looks at once
NOISE_BLOCK = 64  # random numbers come for so many tokens at a time, so none depends on max_new_tokens


@dataclass(frozen=True)
class Prompt:
    """One prompt. seed: of its own samples, so that they depend on neither batch nor number of ranks."""

    id: str
    ids: list[int]
    seed: int = 0


Reply = tuple[list[int], list[float]]  # ids, which end with a stop id or are cut off, and their log-probs
# (model, prompts, copies of each (1 if greedy), temperature (0: greedy), max_new_tokens, stop ids, rows to
# decode at once) -> (number of a prompt, its replies), in any order.
Engine = Callable[
    [nn.Module, Sequence[Prompt], int, float, int, list[int], int], Iterator[tuple[int, list[Reply]]]
]


@torch.no_grad()
def shared_prefix(
    model: nn.Module, prompts: Sequence[Prompt], copies: int, temperature: float, max_new_tokens: int,
    stops: list[int], rows: int, graphs: bool = True,
) -> Iterator[tuple[int, list[Reply]]]:
    """The default engine. A sample depends on its prompt's seed, the temperature and the number of copies,
    not on batch, engine or ranks, but for rounding.

    graphs: whether a decode step on CUDA is replayed. Replies that outgrow a pass go on in a later one, all
    of them together, each as a group of one from its tokens so far: nobody waits for the longest, or pays for
    its room. The caller switches the model's attention back (use_attention).
    """
    replies: list[list[Reply]] = [[([], []) for _ in range(copies)] for _ in prompts]
    missing = [copies] * len(prompts)
    requests = [Request(k, range(copies), prompt.ids) for k, prompt in enumerate(prompts)]
    begun, limit = 0, PASS_TOKENS

    def noise_of(request: Request) -> Tensor:
        numbers = uniform_numbers(prompts[request.number], copies, max_new_tokens)
        return numbers[list(request.copies), begun : begun + new]

    while requests:
        left = max_new_tokens - begun
        new = tokens_of_pass(left, limit)
        late = []
        one_pass = Pass(model, new, temperature, stops, noise_of if temperature > 0 else None, graphs)
        for request, copy, ids, logprobs in one_pass.run(requests, rows):
            number = request.number
            for whole, part in zip(replies[number][copy], (ids, logprobs)):
                whole.extend(part)
            if new < left and ids[-1] not in stops:
                late.append(Request(number, [copy], request.ids + ids))
                continue
            missing[number] -= 1
            if missing[number] == 0:
                yield number, replies[number]
        requests, begun, limit = late, begun + new, 2 * limit


def tokens_of_pass(left: int, limit: int) -> int:
    """The longest part of a reply in a pass: what is left of it, where that is little more than the limit."""
    return left if left <= 1.5 * limit else limit


@dataclass
class Pass:
    """Decodes requests until each of their rows has ended or has `new` tokens.

    noise_of: the uniform numbers of a request's rows, [S, new]; None takes the likeliest tokens.
    """

    model: nn.Module
    new: int
    temperature: float
    stops: list[int]
    noise_of: Callable[[Request], Tensor] | None
    graphs: bool

    def run(
        self, requests: Sequence[Request], rows: int
    ) -> Iterator[tuple[Request, int, list[int], list[float]]]:
        """At most `rows` at once, but at least a group -> (request, copy, ids, log-probs), in the order in
        which rows leave. The longest requests come first, so a batch that was narrowed stays so.
        """
        waiting = deque(sorted(requests, key=lambda request: -len(request.ids)))
        slots, longest = len(waiting[0].copies), len(waiting[0].ids)
        rows = min(rows, rows_that_fit(self.model, longest, slots, self.new))
        batch = make_batch(self.model, min(len(waiting), max(1, rows // slots)), slots, longest, self.new)
        cuda = on_gpu(batch.at.device)
        step = Replayed(lambda: advance(self.model, batch), self.graphs and cuda)
        stop = torch.tensor(self.stops, device=batch.at.device)
        every = CUDA_STEPS_PER_CHECK if cuda else 1
        count = 0
        while True:
            age = count - min(batch.born) + 1  # tokens of the oldest reply
            if count % every == 0 or age >= self.new:
                alive = batch.running.tolist()
                groups, slots, _, _ = batch.shape
                running = {batch.cells[row] // slots for row, runs in enumerate(alive) if runs}
                batch.born = [born if g in running else math.inf for g, born in enumerate(batch.born)]
                if not waiting and not running:
                    yield from collect(batch, range(len(alive)))
                    return
                if waiting and len(running) < groups and len(running) <= KEEP_SHARE * groups:
                    ended = [row for row, cell in enumerate(batch.cells) if cell // slots not in running]
                    yield from collect(batch, ended)
                    self.fill(batch, [g for g in range(groups) if g not in running], waiting, count, stop)
                    continue
                if not waiting and sum(alive) < KEEP_SHARE * len(alive):
                    yield from collect(batch, [row for row, runs in enumerate(alive) if not runs])
                    shrink(batch, alive, exact=not cuda)
                    narrow(batch)
                age = count - min(batch.born) + 1
            if age > batch.shape[-1]:
                make_room(batch, self.new)
            if not cuda:
                batch.read = -(-age // CPU_READ) * CPU_READ
            draw(batch, None, step(batch.tensors), self.temperature, stop)
            count += 1

    def fill(self, batch: Batch, free: list[int], waiting: deque[Request], count: int, stop: Tensor) -> None:
        """Requests that wait take free groups, and their rows draw their first tokens."""
        requests = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
        noise = [self.noise_of(request) for request in requests] if self.noise_of else []
        rows, logits = admit(self.model, batch, free[: len(requests)], requests, noise, count)
        draw(batch, rows, logits, self.temperature, stop)
        narrow(batch)


def on_gpu(device: torch.device) -> bool:
    """Whether to decode in a GPU's way: few shapes, graphs of them, and few questions from the host."""
    return device.type == "cuda"


def rows_that_fit(model: nn.Module, prompt_tokens: int, copies: int, new: int) -> int:
    """How many sequences of `new` tokens can be decoded at once in the GPU's free memory; no limit on a CPU.

    Where that was too many after all, the caller tries half.
    """
    if next(model.parameters()).device.type != "cuda":
        return sys.maxsize
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    per_token = 4 * math.prod(kv_sizes(model))  # keys and values, 2 bytes each
    per_row = per_token * (prompt_tokens / copies + new)
    per_row += 16 * model.get_input_embeddings().weight.shape[0]  # logits, scaled, and their exponentials
    return max(1, int(0.8 * free / per_row))


def draw(batch: Batch, rows: Tensor | None, logits: Tensor, temperature: float, stop: Tensor) -> None:
    """The next token of these rows (None: of all), by logits of theirs. A row ends with a stop token, or with
    the longest reply.
    """
    part = batch
    if rows is not None:
        part = SimpleNamespace(**{name: getattr(batch, name)[rows] for name in ROW_STATE})
    here = part.at[:, None]
    token, logprob = choose(logits, temperature, part.noise.gather(1, here) if temperature > 0 else None)
    part.tokens.scatter_(1, here, token[:, None])
    part.logprobs.scatter_(1, here, logprob[:, None])
    part.token.copy_(token)
    part.at.add_(part.running)
    ended = (token[:, None] == stop).any(1) | (part.at == part.tokens.shape[1] - 1)
    part.running.logical_and_(~ended)
    if rows is not None:
        for name in ROW_STATE:
            getattr(batch, name).index_copy_(0, rows, getattr(part, name))


def collect(batch: Batch, rows: Sequence[int]) -> Iterator[tuple[Request, int, list[int], list[float]]]:
    """Hands on the replies of rows that have ended: request, copy, ids and log-probs."""
    rows = [row for row in rows if batch.owner[row]]
    if not rows:
        return
    index = torch.tensor(rows, dtype=torch.long, device=batch.at.device)
    table = zip(rows, *(x[index].tolist() for x in (batch.at, batch.tokens, batch.logprobs)))
    for row, length, ids, logprobs in table:
        owner, batch.owner[row] = batch.owner[row], None
        yield *owner, ids[:length], logprobs[:length]


def choose(logits: Tensor, temperature: float, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """logits [B, V], uniform numbers [B, 1] or None -> token [B], log-prob [B]. None takes the likeliest.

    Inverse-CDF sampling: one number per token decides, so a sample depends on its own prompt's seed only.
    """
    scaled = logits.float() / (temperature or 1.0)
    top = scaled.amax(-1, keepdim=True)
    weights = (scaled - top).exp_()
    if uniform is None:
        token = scaled.argmax(-1, keepdim=True)
        total = weights.sum(-1)
    else:
        token, total = inverse_cdf(weights, uniform)
    return token[:, 0], (scaled.gather(-1, token) - top)[:, 0] - total.log()


def inverse_cdf(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """weights [B, V], uniform numbers [B, 1] -> the index [B, 1] at that share of the weights' sum; sum [B].

    In a large vocabulary first a block is found and then the token in it: a running sum over all of it takes
    several times as long. A weight of 0 is never taken.
    """
    size = weights.shape[-1]
    if size <= CHOICE_MOST:
        cdf = weights.cumsum(-1, dtype=torch.float64)
        index = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True)
        return index.clamp(max=size - 1), cdf[:, -1].float()
    whole = size // CHOICE_BLOCK * CHOICE_BLOCK
    sums = weights[:, :whole].unflatten(-1, (-1, CHOICE_BLOCK)).sum(-1)
    if whole < size:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], -1)
    cdf = sums.cumsum(-1, dtype=torch.float64)
    goal = uniform * cdf[:, -1:]
    block = torch.searchsorted(cdf, goal, right=True).clamp(max=sums.shape[-1] - 1)
    share = 1 - (cdf.gather(-1, block) - goal) / sums.gather(-1, block)  # of the block's sum
    places = block * CHOICE_BLOCK + torch.arange(CHOICE_BLOCK, device=weights.device)
    inside = weights.gather(-1, places.clamp(max=size - 1)).masked_fill(places >= size, 0.0)
    # Below 1, whatever was rounded: so it points at a token of the block.
    within, _ = inverse_cdf(inside, share.clamp(0, 1 - 1e-12))
    return places.gather(-1, within).clamp(max=size - 1), cdf[:, -1].float()


def uniform_numbers(prompt: Prompt, copies: int, length: int) -> Tensor:
    """[copies, length] uniform float64 numbers from a generator with the prompt's own seed."""
    generator = torch.Generator().manual_seed(prompt.seed)
    blocks = -(-length // NOISE_BLOCK)
    drawn = [torch.rand(copies, NOISE_BLOCK, generator=generator, dtype=torch.float64) for _ in range(blocks)]
    return torch.cat(drawn, 1)[:, :length]


# ------------------------------------------------------------------------------------------------ CUDA graphs


def capture(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Records what `function` launches, without running it -> (replay, the tensor that each replay fills).

    Raises RuntimeError for what cannot be recorded, such as a value that the host waits for.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    stream = torch.cuda.current_stream()
    try:
        # The outer context: a capture that fails leaves its own stream as the current one. Other threads
        # (NCCL's watchdog, the checkpoint's) may call CUDA meanwhile.
        with torch.cuda.stream(stream), torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
            output = function()
    except RuntimeError:
        with contextlib.suppress(RuntimeError):  # else the allocator would give back no memory from now on
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
            torch._C._cuda_releasePool(stream.device_index, pool)
        raise
    return graph.replay, output


class Replayed:
    """Calls a function; from its second call with the same tensors on, replays what it launched.

    The function's result may depend on nothing but these tensors' values, their places and their shapes: all
    else, numbers of Python among it, is frozen in the graph. Any other place or shape is captured anew, when
    the graph before it has been dropped. Where a function cannot be captured, this process makes no more
    graphs, and says so once.
    """

    works = True  # in this process

    def __init__(self, function: Callable[[], Tensor], enabled: bool) -> None:
        self.function, self.enabled = function, enabled
        self.key: tuple | None = None
        self.replay: Callable[[], None] | None = None
        self.output: Tensor | None = None

    def __call__(self, tensors: Callable[[], Iterable[Tensor]]) -> Tensor:
        """The function's result. It is overwritten by the next call."""
        if not (self.enabled and Replayed.works):
            return self.function()
        key = tuple((x.data_ptr(), x.shape, x.stride()) for x in tensors())
        if key != self.key:  # the libraries set themselves up in a call that is not captured
            self.key, self.replay, self.output = key, None, None
            return self.function()
        if self.replay is None:
            try:
                self.replay, self.output = capture(self.function)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                Replayed.works = False
                cause = error.__context__ or error  # what ended the capture, not that it has ended
                why = (str(cause).strip() or type(cause).__name__).splitlines()[0]
                warnings.warn(f"rollout: a decode step runs without CUDA graphs, slower: {why}", stacklevel=2)
                return self.function()
        self.replay()
        return self.output
