"""What a donor is, and every head count it can be converted to."""

from ..convert.donor import Donor
from ..convert.donor_sites import decoder_key_value_heads
from ..convert.plan import ConversionPlan, legal_targets
from ..convert.target import choose_target
from ..refusal import Refusal
from .explanation import Explanation, explain, facts
from .support_table import support_row


NUMBERS = (
    "cache_bytes_per_token",
    "cache_bytes_per_token_beyond_window",
    "cache_bytes_per_encoder_token",
    "key_value_bytes_per_token",
    "parameters",
    "tensor_parallel_sizes",
)


def inspect_donor(donor: Donor) -> dict:
    """The donor's numbers, and for each legal head count what the student would be and why."""
    before = facts(donor)
    own = decoder_key_value_heads(donor.family, donor.layout, donor.config)
    fewer, more = legal_targets(donor.num_attention_heads, min(own))
    targets, impossible = [], []
    for heads in reversed([*fewer, *more]):
        kind = "keep" if {heads} == set(own) else "expand" if heads in more else "reduce"
        plan = ConversionPlan(num_key_value_heads=heads, method=("expand",) if kind == "expand" else ("mean_pool",))
        asked = {"num_key_value_heads": heads, "kind": kind}
        try:
            explained = explain(donor, plan, choose_target(donor, plan))
        except Refusal as refusal:
            impossible.append(asked | {"reason": str(refusal)})
        else:
            targets.append(asked | _numbers(explained, before))
    model_class, position = donor.model_class.__name__, donor.family.donor_layout.position
    known = {"model_class": model_class, "position": position, "family": support_row(donor.family.model_type)}
    return {"donor": donor.name, **known, **before, "targets": targets, "impossible": impossible}


def _numbers(explained: Explanation, before: dict) -> dict:
    """Of one student."""
    after = explained.after
    return {
        **{name: after[name] for name in NUMBERS if name in after},
        "cache_fraction": _fraction(after, before, "cache_bytes_per_token"),
        "key_value_fraction": _fraction(after, before, "key_value_bytes_per_token"),
        "export": explained.export,
        "model_class": explained.model_class,
        "reason": explained.reason,
    }


def _fraction(after: dict, before: dict, name: str) -> float | None:
    """None of nothing: an encoder has no cache."""
    return after[name] / before[name] if before[name] else None
