"""How fast donor and student read a prompt and decode, by turns in one process; and what the bytes they move would allow."""

import gc
import inspect
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ...convert.cache_bytes import cache_bytes_computed, read_heads
from ...refusal import Refusal
from ...runtime.native_call import with_cache
from ..report import Speed


FEWEST_REPETITIONS = 3
WITHOUT_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Of one prompt: until the first token of the answer, and from there to the last."""

    first_token_seconds: float
    decode_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How a kind of model is timed.

    Args:
        run: (model, prompts `[B, S]`, steps) -> (answers, Timing).
        allowed_speedup: (donor, student, batch size, prompt's tokens, steps) -> what the bytes moved would allow.
        check: takes what `check_speed` takes, and raises what it raises.
    """

    run: Callable
    allowed_speedup: Callable
    check: Callable


@torch.inference_mode()
def read_and_decode(model: PreTrainedModel, tokens: torch.Tensor, decode_tokens: int) -> tuple[torch.Tensor, Timing]:
    """Greedy decoding as `generate` does it, without what `generate` does besides.

    Args:
        tokens: prompts `[B, S]` without padding.
        decode_tokens: steps of one token after the first.

    Returns:
        The answers `[B, 1 + decode_tokens]`, and how long they took.
    """
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cached = with_cache(model, DynamicCache(config=model.config))
    answer = []

    def step(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens, **cached, **last_only).logits
        answer.append(logits[:, -1:].float().argmax(dim=-1))
        return answer[-1]

    started = now(model.device)
    token = step(tokens)
    first = now(model.device)
    for _ in range(decode_tokens):
        token = step(token)
    timing = Timing(first_token_seconds=first - started, decode_seconds=now(model.device) - first)
    return torch.cat(answer, dim=1), timing


def decode_step_bytes(model: PreTrainedModel, batch_size: int, context_tokens: int) -> int:
    """Bytes that one step of decoding has to move: every weight it computes with, once, and the cache.

    Embeddings that are only looked up give one row for each sequence; tied to the head they are read in full.

    Args:
        context_tokens: that the new token attends to, itself included; layers with a window attend to no more than that.
    """
    head = model.get_output_embeddings()
    used_in_full = set() if head is None else {id(head.weight)}
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - used_in_full
    moved = 0
    for parameter in model.parameters():
        elements = batch_size * parameter.shape[1] if id(parameter) in looked_up else parameter.numel()
        moved += elements * parameter.element_size()
    tied = [model.base_model.get_parameter(name) for name in getattr(model.base_model, "tied_layers", {})]
    moved += sum(parameter.numel() * parameter.element_size() for parameter in tied)  # read again by each layer
    heads = read_heads(model.config)
    return moved + cache_bytes_computed(model.config, heads, model.dtype, "static", context_tokens, batch_size)


def allowed_decode_speedup(
    donor: PreTrainedModel, student: PreTrainedModel, batch_size: int, context_tokens: int, decode_tokens: int
) -> float:
    """Bytes that the donor moves in all timed steps over the student's, were nothing else to take time."""
    attended = range(context_tokens + 1, context_tokens + decode_tokens + 1)
    donor_bytes, student_bytes = (
        sum(decode_step_bytes(model, batch_size, tokens) for tokens in attended) for model in (donor, student)
    )
    return donor_bytes / student_bytes


def measure_speed(
    donor: PreTrainedModel,
    student: PreTrainedModel,
    *,
    batch_sizes: Sequence[int],
    context_lengths: Sequence[int],
    decode_tokens: int = 16,
    repetitions: int = 5,
    seed: int = 0,
    way: "Decoding | None" = None,
    progress: Callable[[str], object] = lambda point: None,
) -> tuple[tuple[Speed, ...], tuple[str, ...]]:
    """Time both models on the same random prompts, for every batch size and context length.

    A pair of runs has one prompt; which model goes first is drawn. One pair before the first warms up and is not counted.

    Args:
        donor, student: in evaluation mode, on one device.
        context_lengths: tokens of the prompts.
        decode_tokens: steps that are timed after the first token.
        repetitions: pairs that count, 3 or more.
        way: None: that of decoder-only models.
        progress: called with the name of each point before it is measured.

    Returns:
        The points, and notes about those that were left out because memory ran out.

    Raises:
        Refusal: too few repetitions, or more tokens than the models have positions for.
    """
    way = way or Decoding(run=read_and_decode, allowed_speedup=allowed_decode_speedup, check=check_speed)
    way.check(donor, student, batch_sizes, context_lengths, decode_tokens, repetitions)
    points, notes = [], []
    for batch_size in batch_sizes:
        for context_tokens in context_lengths:
            where = f"batch {batch_size} x context {context_tokens}"
            progress(where)
            pairs = timed_pairs(
                (donor, student),
                (batch_size, context_tokens),
                lambda model, tokens: way.run(model, tokens, decode_tokens)[1],
                repetitions,
                seed,
            )
            if pairs is None:
                notes.append(f"Speed at {where} was not measured: memory ran out.")
            else:
                allowed = way.allowed_speedup(donor, student, batch_size, context_tokens, decode_tokens)
                points.append(_point(pairs, batch_size, context_tokens, decode_tokens, allowed))
    return tuple(points), tuple(notes)


def timed_pairs(
    models: tuple[PreTrainedModel, PreTrainedModel],
    shape: tuple[int, int],
    run: Callable[[PreTrainedModel, torch.Tensor], object],
    repetitions: int,
    seed: int,
) -> list[tuple] | None:
    """What `run` says of (donor, student) in each pair that counts; None if memory ran out."""
    draws, generator = random.Random(f"{seed} {shape}"), torch.Generator().manual_seed(seed)
    vocab_size = models[0].config.vocab_size
    pairs = []
    try:
        for _ in range(1 + repetitions):
            tokens = torch.randint(vocab_size, shape, generator=generator).to(models[0].device)
            pair = dict.fromkeys(draws.sample((0, 1), 2))
            for which in pair:
                pair[which] = run(models[which], tokens)
            pairs.append((pair[0], pair[1]))
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in WITHOUT_MEMORY):
            raise
        _give_memory_back(models[0].device)
        return None
    return pairs[1:]


def _point(
    pairs: list[tuple[Timing, Timing]], batch_size: int, context_tokens: int, decode_tokens: int, allowed: float
) -> Speed:
    decoded = batch_size * decode_tokens
    speedups = [donor.decode_seconds / student.decode_seconds for donor, student in pairs]
    return Speed(
        batch_size=batch_size,
        context_tokens=context_tokens,
        repetitions=len(pairs),
        donor_first_token_seconds=median(donor.first_token_seconds for donor, _ in pairs),
        student_first_token_seconds=median(student.first_token_seconds for _, student in pairs),
        first_token_speedup=median(donor.first_token_seconds / student.first_token_seconds for donor, student in pairs),
        donor_decode_tokens_per_second=median(decoded / donor.decode_seconds for donor, _ in pairs),
        student_decode_tokens_per_second=median(decoded / student.decode_seconds for _, student in pairs),
        decode_speedup=median(speedups),
        decode_speedup_low=min(speedups),
        decode_speedup_high=max(speedups),
        allowed_decode_speedup=allowed,
    )


def check_speed(
    donor: PreTrainedModel,
    student: PreTrainedModel,
    batch_sizes: Sequence[int],
    context_lengths: Sequence[int],
    decode_tokens: int,
    repetitions: int,
) -> None:
    """Raises the Refusal that `measure_speed` would begin with, before anything else has been computed."""
    assert not donor.training and not student.training and donor.device == student.device
    if repetitions < FEWEST_REPETITIONS:
        raise Refusal(f"speed: repetitions = {repetitions} are too few for a median. Use {FEWEST_REPETITIONS} or more.")
    for name, least in (
        ("batch_sizes", batch_sizes),
        ("context_lengths", context_lengths),
        ("decode_tokens", [decode_tokens]),
    ):
        if min(least, default=1) < 1:
            raise Refusal(f"speed: {name} has {min(least)}. Use 1 or more.")
    for model, whose in ((donor, "donor"), (student, "student")):
        limit = getattr(model.config, "max_position_embeddings", None)
        longest = max(context_lengths, default=0)
        if limit is not None and longest + decode_tokens > limit:
            raise Refusal(
                f"speed: a context of {longest} and {decode_tokens} decoded tokens are more than the {limit} positions of "
                f"the {whose}. Use contexts of up to {max(limit - decode_tokens, 0)} tokens."
            )


def now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _give_memory_back(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
