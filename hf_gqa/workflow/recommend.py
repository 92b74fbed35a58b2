"""Which plan to choose: what fits, what each saves, what each cost where it was tried, and what nobody knows yet."""

from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PretrainedConfig

from ..convert.cache_bytes import cache_bytes_computed, cached_heads
from ..convert.donor import Donor
from ..convert.plan import ConversionPlan, legal_targets
from ..convert.target import choose_target
from ..evaluate.memory import context_that_fits, working_bytes
from ..export.explanation import explain, facts, stored_dtype
from ..human_units import human_bytes
from ..refusal import Refusal
from .sweep_table import SweepRow, SweepTable, donor_hash


WORTH_SAYING_SPEEDUP = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What serving asks for; None: no such wish.

    Args:
        memory_bytes: for weights, cache and working memory of `batch_size` sequences of `context_tokens`.
        cache_bytes: for the cache alone.
        decode_speedup: over the donor.
    """

    context_tokens: int
    batch_size: int
    memory_bytes: int | None = None
    cache_bytes: int | None = None
    decode_speedup: float | None = None

    def __post_init__(self):
        for name in ("context_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise Refusal(f"{name} = {getattr(self, name)}: use a whole number from 1 on.")
        if self.memory_bytes is None and self.cache_bytes is None and self.decode_speedup is None:
            raise Refusal("recommend: nothing is asked for. Give --memory, --cache or --speedup.")
        if self.decode_speedup is not None and not self.decode_speedup > 0:
            raise Refusal(f"speedup = {self.decode_speedup}: use a number above 0, such as 1.5.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """The donor as it is, or one number of KV heads.

    Args:
        keeps: whether it is the donor as it is.
        step_bytes: that decoding one token of every sequence must read: weights once, and the whole cache.
        allowed_decode_speedup: the donor's step bytes over these: the most that fewer bytes can give.
        longest_context_tokens: that fits into the memory with this batch; None for no such wish, or no end.
        meets: all that was asked for.
        tried: the best row of the sweep with as many heads, and its loss over the donor's; None: nobody tried.
    """

    num_key_value_heads: int
    keeps: bool
    export: str
    weight_bytes: int
    cache_bytes: int
    working_bytes: int
    step_bytes: int
    allowed_decode_speedup: float
    longest_context_tokens: int | None
    tensor_parallel_sizes: list[int]
    meets: bool
    tried: dict | None

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.working_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """What to do and why.

    Args:
        chosen: of `options`; None where none meets the wishes.
        reasons: the arithmetic, in sentences.
        unknown: what this does not rest on, in sentences.
    """

    donor: str
    wanted: Wanted
    options: tuple[Option, ...]
    chosen: Option | None
    verdict: str
    reasons: tuple[str, ...]
    unknown: tuple[str, ...]

    def to_dict(self) -> dict:
        return asdict(self)


def recommend(donor: Donor, wanted: Wanted, sweep: SweepTable | str | Path | None = None) -> Recommendation:
    """Compare the donor with every student it can become; reads shapes, no weights, unless there is a sweep to match.

    Raises:
        Refusal: an encoder-decoder, a sweep of another donor, or heads that differ between layers.
    """
    if donor.layout.cross_attention is not None:
        raise Refusal(
            f"recommend: '{donor.name}' is an encoder-decoder with two caches, and this weighs one. Use hf-gqa inspect, which "
            f"shows both for every number of KV heads."
        )
    if isinstance(sweep, str | Path):
        sweep = SweepTable.read(sweep)
    if sweep is not None and sweep.donor_identity != donor_hash(donor):
        raise Refusal(f"sweep: is of another donor ('{sweep.donor}') than {donor.name}. Make one with hf-gqa sweep.")
    if len(set(donor.num_key_value_heads)) != 1:
        raise Refusal(f"{donor.name}: its layers have different numbers of KV heads. Use its donor.")
    options = options_of(donor, wanted, sweep)
    chosen = choose(options, sweep is not None)
    return Recommendation(
        donor=donor.name,
        wanted=wanted,
        options=options,
        chosen=chosen,
        verdict=verdict(donor, wanted, options, chosen),
        reasons=reasons(donor, wanted, options, chosen),
        unknown=unknown(donor, wanted, chosen, sweep),
    )


def options_of(donor: Donor, wanted: Wanted, sweep: SweepTable | None) -> tuple[Option, ...]:
    """Most heads first."""
    present = donor.num_key_value_heads[0]
    fewer, _ = legal_targets(donor.num_attention_heads, present)
    found: list[Option] = []
    for heads in reversed(fewer):
        plan = ConversionPlan(num_key_value_heads=heads)
        target = choose_target(donor, plan)
        after = explain(donor, plan, target).after if heads != present else facts(donor)
        found.append(_option(donor, target.config, heads, after, target.export, wanted, found, sweep))
    return tuple(found)


def _option(
    donor: Donor, config: PretrainedConfig, heads: int, after: dict, export: str, wanted: Wanted, above: list, sweep
) -> Option:
    dtype, tried = stored_dtype(donor), best_try(heads, sweep)
    of_layers = cached_heads(config)
    cache = cache_bytes_computed(config, of_layers, dtype, "static", wanted.context_tokens, wanted.batch_size)
    working = working_bytes(config, dtype, wanted.batch_size)
    step = after["weight_bytes"] - unread_bytes(donor) + cache
    speedup = above[0].step_bytes / step if above else 1.0
    longest = None
    if wanted.memory_bytes is not None:
        longest = context_that_fits(config, after["weight_bytes"], dtype, wanted.memory_bytes, wanted.batch_size)
    meets = (
        (wanted.memory_bytes is None or after["weight_bytes"] + cache + working <= wanted.memory_bytes)
        and (wanted.cache_bytes is None or cache <= wanted.cache_bytes)
        and (wanted.decode_speedup is None or speedup >= wanted.decode_speedup)
    )
    return Option(
        num_key_value_heads=heads,
        keeps=not above,
        export=export if above else "none needed",
        weight_bytes=after["weight_bytes"],
        cache_bytes=cache,
        working_bytes=working,
        step_bytes=step,
        allowed_decode_speedup=speedup,
        longest_context_tokens=longest,
        tensor_parallel_sizes=after["tensor_parallel_sizes"],
        meets=meets,
        tried=tried,
    )


def unread_bytes(donor: Donor) -> int:
    """An input embedding of its own: decoding reads a row of it."""
    tied = getattr(donor.config, "tie_word_embeddings", False)
    return 0 if tied else donor.config.vocab_size * donor.config.hidden_size * stored_dtype(donor).itemsize


def best_try(heads: int, sweep: SweepTable | None) -> dict | None:
    rows = [row for row in sweep.rows if row.num_key_value_heads == heads] if sweep is not None else []
    if not rows:
        return None
    best: SweepRow = min(rows, key=lambda row: row.loss_nats_per_token)
    over = best.loss_nats_per_token - sweep.donor_loss_nats_per_token
    return {
        "plan": best.plan,
        "loss_over_donor_nats_per_token": over,
        "uptrain_tokens": best.uptrain_tokens,
        "decode_speedup": best.decode_speedup,
    }


def choose(options: tuple[Option, ...], has_sweep: bool) -> Option | None:
    """The donor if it will do; else what cost least where it was tried, or else the most heads."""
    meeting = [option for option in options if option.meets]
    tried = [option for option in meeting if option.tried is not None]
    if not meeting or meeting[0].keeps:
        return meeting[0] if meeting else None
    if has_sweep and tried:
        return min(tried, key=lambda option: option.tried["loss_over_donor_nats_per_token"])
    return meeting[0]


def verdict(donor: Donor, wanted: Wanted, options: tuple[Option, ...], chosen: Option | None) -> str:
    if chosen is None:
        least = options[-1]
        return (
            f"No number of KV heads is enough: with {kv_heads_in_words(least)} it takes {human_bytes(least.total_bytes)}, of "
            f"which {human_bytes(least.weight_bytes)} are weights, and decoding gets at most "
            f"{least.allowed_decode_speedup:.2f}x. Ask for less, or quantize."
        )
    if chosen.keeps:
        return f"Leave {donor.name} as it is: it meets everything asked for, and every conversion costs quality."
    return (
        f"Convert {donor.name} to {kv_heads_in_words(chosen)} ({options[0].num_key_value_heads} now), then uptrain it."
    )


def kv_heads_in_words(option: Option) -> str:
    return f"{option.num_key_value_heads} KV head{'s' if option.num_key_value_heads > 1 else ''}"


def reasons(donor: Donor, wanted: Wanted, options: tuple[Option, ...], chosen: Option | None) -> tuple[str, ...]:
    """The arithmetic behind the verdict."""
    before, after = options[0], chosen or options[-1]
    size = f"{wanted.batch_size:,} x {wanted.context_tokens:,} tokens"
    said = [
        f"Donor: weights {human_bytes(before.weight_bytes)} + cache {human_bytes(before.cache_bytes)} for {size} + working "
        f"{human_bytes(before.working_bytes)} = {human_bytes(before.total_bytes)}"
        + (f" of {human_bytes(wanted.memory_bytes)}." if wanted.memory_bytes else "."),
        f"Decoding one step reads {human_bytes(before.step_bytes)}, {before.cache_bytes / before.step_bytes:.0%} of it cache: "
        f"{kv_heads_in_words(options[-1])} would make it at most {options[-1].allowed_decode_speedup:.2f}x faster.",
    ]
    if options[-1].allowed_decode_speedup < WORTH_SAYING_SPEEDUP:
        said.append("At this size and length decoding reads weights, not cache: fewer heads save memory, not time.")
    if after is not before:
        said.append(
            f"With {kv_heads_in_words(after)}: weights {human_bytes(after.weight_bytes)} + cache "
            f"{human_bytes(after.cache_bytes)} + working {human_bytes(after.working_bytes)} = "
            f"{human_bytes(after.total_bytes)}; a step reads {human_bytes(after.step_bytes)}, at most "
            f"{after.allowed_decode_speedup:.2f}x faster."
        )
    if chosen is not None and chosen.tried is not None:
        tried = chosen.tried
        said.append(
            f"It was tried ({tried['plan']}, {tried['uptrain_tokens']:,} tokens of uptraining): "
            f"{tried['loss_over_donor_nats_per_token']:+.3f} nats per token over the donor."
        )
    return tuple(said)


def unknown(donor: Donor, wanted: Wanted, chosen: Option | None, sweep: SweepTable | None) -> tuple[str, ...]:
    """What the reader must not take from this."""
    said = ["Speed-ups are what the bytes allow; what a kernel makes of them is measured by hf-gqa evaluate."]
    if sweep is None:
        said.append(
            "What each costs in quality is not known here: more heads are taken to cost less. Run hf-gqa sweep."
        )
    elif chosen is not None and not chosen.keeps and chosen.tried is None:
        said.append(f"The sweep did not try {chosen.num_key_value_heads} heads, so their cost is not known.")
    longest = donor.longest_tokens
    if longest and wanted.context_tokens > longest:
        said.append(
            f"The donor has positions for {longest:,} tokens; {wanted.context_tokens:,} need a longer model first."
        )
    said.append("Fragmentation, the framework's own memory, and speculative or paged serving are not counted.")
    return tuple(said)
