"""Which plan to choose: what fits, what each saves, what each cost where it was tried, and what nobody knows yet."""

from dataclasses import asdict, dataclass
from pathlib import Path

from ..convert.donor import Donor
from ..convert.donor_sites import decoder_key_value_heads
from ..convert.plan import ConversionPlan, legal_targets
from ..convert.target import choose_target
from ..export.explanation import explain, facts
from ..human_units import human_bytes
from ..refusal import Refusal
from .serving import ServingBytes, Wanted, serving_bytes, serving_bytes_with_encoder
from .sweep_table import SweepRow, SweepTable, donor_hash


WORTH_SAYING_SPEEDUP = 1.1


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

    Of an encoder-decoder the decoder's heads are compared, for an encoder of all its heads.

    Raises:
        Refusal: an encoder, which keeps no cache; a sweep of another donor; heads that differ between layers.
    """
    if donor.layout.bidirectional:
        raise Refusal(
            f"recommend: '{donor.name}' is an encoder, which keeps no cache and decodes nothing: fewer KV heads take away "
            f"parameters only. Use hf-gqa inspect, which shows how many."
        )
    wanted = wanted.of(donor)
    if isinstance(sweep, str | Path):
        sweep = SweepTable.read(sweep)
    if sweep is not None and sweep.donor_identity != donor_hash(donor):
        raise Refusal(f"sweep: is of another donor ('{sweep.donor}') than {donor.name}. Make one with hf-gqa sweep.")
    if len(set(decoder_key_value_heads(donor.family, donor.layout, donor.config))) != 1:
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
        bytes_of = serving_bytes if donor.layout.cross_attention is None else serving_bytes_with_encoder
        serving = bytes_of(donor, target.config, after["weight_bytes"], wanted)
        found.append(_option(heads, target.export, after, serving, wanted, found, best_try(heads, sweep)))
    return tuple(found)


def _option(
    heads: int, export: str, after: dict, serving: ServingBytes, wanted: Wanted, above: list[Option], tried: dict | None
) -> Option:
    weights, step = after["weight_bytes"], after["weight_bytes"] - serving.unread + serving.cache
    speedup = above[0].step_bytes / step if above else 1.0
    meets = (
        (wanted.memory_bytes is None or weights + serving.cache + serving.working <= wanted.memory_bytes)
        and (wanted.cache_bytes is None or serving.cache <= wanted.cache_bytes)
        and (wanted.decode_speedup is None or speedup >= wanted.decode_speedup)
    )
    return Option(
        num_key_value_heads=heads,
        keeps=not above,
        export=export if above else "none needed",
        weight_bytes=weights,
        cache_bytes=serving.cache,
        working_bytes=serving.working,
        step_bytes=step,
        allowed_decode_speedup=speedup,
        longest_context_tokens=serving.longest_context_tokens,
        tensor_parallel_sizes=after["tensor_parallel_sizes"],
        meets=meets,
        tried=tried,
    )


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
    if wanted.target_tokens is not None:
        size = f"{wanted.batch_size:,} x ({wanted.context_tokens:,} tokens read + {wanted.target_tokens:,} written)"
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
