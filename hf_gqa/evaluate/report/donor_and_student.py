"""The tables that say each thing of donor and student in a row: quality, and cost; the page shows both as one."""

from collections.abc import Callable

from .forms import (
    AGREEMENT,
    BYTES,
    BYTES_OR_NOTHING,
    CHANGE,
    CORRELATION,
    COSINE,
    HEADS,
    KL,
    NUMBER,
    PARAMETERS,
    RATIO,
    SHARE,
    SMALLER,
    TEXT,
    Difference,
)
from .table import CARD, PAGE, Cells, Comparison, Fact, cells_of_facts
from .values import Report


def _less(interval: str) -> Callable[[Report, float, float], Difference]:
    return lambda report, donor, student: Difference(student - donor, getattr(report.differences, interval))


def _over(interval: str) -> Callable[[Report, float, float], Difference]:
    """A ratio; of nothing there is none."""

    def over(report: Report, donor: float, student: float) -> Difference:
        return Difference(student / donor if donor else None, getattr(report.differences, interval))

    return over


def _sizes(report: Report, donor: float, student: float) -> tuple[float, float]:
    return donor, student


def _both(field: str) -> Callable[[Report], Difference | None]:
    """A field of the report, with the interval of the same name."""

    def found(report: Report) -> Difference | None:
        value = getattr(report, field)
        return None if value is None else Difference(value, getattr(report.differences, field))

    return found


def _embeddings(field: str, interval: str | None = None) -> Callable[[Report], Difference | None]:
    def found(report: Report) -> Difference | None:
        value = None if report.embeddings is None else getattr(report.embeddings, field)
        return None if value is None else Difference(value, interval and getattr(report.embeddings, interval))

    return found


def _has_two_stacks(report: Report) -> bool:
    """An encoder and a decoder that attends to it."""
    return bool(report.donor.cross_num_key_value_heads)


def _has_one_stack(report: Report) -> bool:
    return not _has_two_stacks(report)


def _has_window(report: Report) -> bool:
    return any(
        model.cache_bytes_per_token_beyond_window != model.cache_bytes_per_token_computed
        for model in (report.donor, report.student)
    )


PERPLEXITY = Fact("perplexity", NUMBER, _over("perplexity_ratio"), RATIO, both="{words.perplexity}")

QUALITY = (
    PERPLEXITY.only(CARD),
    Fact("loss_nats_per_token", NUMBER, _less("loss_nats_per_token"), CHANGE, both="{words.loss}"),
    PERPLEXITY.only(PAGE),
    Fact("bits_per_byte", NUMBER, _less("bits_per_byte"), CHANGE, both="bits per byte"),
    Comparison(
        _both("kl_nats_per_token"),
        *(NUMBER, KL),
        page="KL to the donor, nats per token",
        card="KL from the donor, nats per token",
    ),
    Comparison(
        _both("top1_agreement_fraction"),
        *(SHARE, AGREEMENT),
        page="same likeliest token",
        card="{words.same_token}",
    ),
    Comparison(
        _embeddings("mean_cosine", "cosine"),
        *(NUMBER, COSINE),
        page="cosine of the embeddings",
        card="cosine of its embeddings to the donor's",
    ),
    Comparison(_embeddings("spearman"), NUMBER, CORRELATION, both="rank correlation of similarities"),
)

KV_HEADS = (
    Fact("num_key_value_heads", HEADS, card="KV heads of a layer"),
    Fact("num_key_value_heads", HEADS, page="KV heads", where=_has_one_stack),
    Fact("num_key_value_heads", HEADS, page="KV heads of the decoder", where=_has_two_stacks),
    Fact(
        "cross_num_key_value_heads",
        HEADS,
        page="KV heads across",
        card="KV heads of a layer to the encoder",
        where=_has_two_stacks,
    ),
    Fact(
        "encoder_num_key_value_heads",
        HEADS,
        page="KV heads of the encoder",
        card="KV heads of an encoder layer",
        where=_has_two_stacks,
    ),
    Fact("num_attention_heads", TEXT, card="query heads of a layer"),
)

COST = (
    *KV_HEADS,
    Fact("cache_bytes_per_token_computed", BYTES, _sizes, SMALLER, both="cache per token, computed"),
    Fact("cache_bytes_per_token_measured", BYTES, _sizes, SMALLER, both="cache per token, measured"),
    Fact(
        "cache_bytes_per_token_beyond_window",
        *(BYTES, _sizes, SMALLER),
        both="cache per token beyond the window",
        where=_has_window,
    ),
    Fact("cache_bytes_per_source_token_computed", BYTES, _sizes, SMALLER, both="cache per source token, computed"),
    Fact("cache_bytes_per_source_token_measured", BYTES, _sizes, SMALLER, both="cache per source token, measured"),
    Fact("parameters", PARAMETERS, _sizes, SMALLER, both="parameters"),
    Fact("weight_bytes", BYTES, _sizes, SMALLER, both="weights"),
    Fact("peak_memory_bytes", BYTES, _sizes, SMALLER, page="peak memory"),
    Fact(lambda model: model.peak_memory_bytes or 0, BYTES_OR_NOTHING, card="peak memory"),
)

SIDES = ("", "donor", "student")


def quality_and_cost(report: Report) -> Cells:
    """For the page and the terminal."""
    return cells_of_facts((*SIDES, "difference ({confidence} interval)"), (*QUALITY, *COST), report, PAGE)


def quality_on_card(report: Report) -> Cells:
    return cells_of_facts((*SIDES, "student against donor ({confidence} interval)"), QUALITY, report, CARD)


def cost_on_card(report: Report) -> Cells:
    """Without a column that compares."""
    return cells_of_facts(SIDES, COST, report, CARD)
