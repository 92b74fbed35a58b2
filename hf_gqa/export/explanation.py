"""Before and after, in numbers, without reading a single weight."""

import math
from dataclasses import asdict, dataclass

import torch

from ..convert.cache_bytes import (
    Heads,
    cache_bytes_per_token_beyond_window,
    cache_bytes_per_token_computed,
    cached_heads,
    cached_heads_of,
    heads_of_layers,
    key_value_bytes_per_token,
)
from ..convert.cache_bytes_by_kind import cache_bytes_by_kind
from ..convert.donor import Donor
from ..convert.donor_folder import left_behind
from ..convert.layer_sharing import removed_parameters
from ..convert.plan import ConversionPlan
from ..convert.surgery import head_tensors
from ..convert.target import Target
from ..human_units import human_bytes, human_count
from ..methods import method_kind
from ..runtime.attention_layout import CROSS, ENCODER, KINDS, SELF
from .sharing_words import sharing_notes


TENSOR_PARALLEL_SIZES = (1, 2, 4, 8, 16, 32, 64)
MOST_NAMED = 8  # files, of those that are left behind
COMMON_TENSOR_PARALLEL_SIZE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What a plan does to a donor.

    Args:
        before, after: model_type, num_attention_heads, num_key_value_heads, parameters, weight_bytes,
            cache_bytes_per_token, cache_bytes_per_token_beyond_window, key_value_bytes_per_token (computed, whether or
            not they are cached), tensor_parallel_sizes; of an encoder-decoder also what `numbers_with_encoder` says.
        notes: what the user should know before starting.
    """

    donor: str
    plan: dict
    export: str
    reason: str
    model_class: str
    before: dict
    after: dict
    files: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict:
        return asdict(self)


def tensor_parallel_sizes(num_attention_heads: int, num_key_value_heads: int) -> list[int]:
    """Group sizes that give every rank whole query heads and whole KV heads of its own."""
    return [n for n in TENSOR_PARALLEL_SIZES if num_attention_heads % n == 0 and num_key_value_heads % n == 0]


def facts(donor: Donor) -> dict:
    """The donor's numbers, as `Explanation.before` holds them."""
    tensors = donor.tensors
    kept = [name for names in tensors.shards.values() for name in names if name not in donor.dropped]
    return _side(
        donor,
        donor.config.model_type,
        donor.num_key_value_heads,
        cached_heads(donor.config),
        parameters=sum(math.prod(tensors.shape(name)) for name in kept),
        weight_bytes=sum(tensors.size_bytes(name) for name in kept),
    )


def explain(donor: Donor, plan: ConversionPlan, target: Target) -> Explanation:
    """Compute before and after from shapes alone."""
    before = facts(donor)
    heads = [row.num_key_value_heads for row in target.rows]
    more = _changed_parameters(donor, heads) - removed_parameters(target)
    after = _side(
        donor,
        target.config.model_type,
        heads,
        cached_heads_of(target.rows),
        parameters=before["parameters"] + more,
        weight_bytes=before["weight_bytes"] + more * stored_dtype(donor).itemsize,
    )
    return Explanation(
        donor=donor.name,
        plan=plan.to_dict(),
        export=target.export,
        reason=target.reason,
        model_class=target.model_class.__name__,
        before=before,
        after=after,
        files=tuple(donor.tensors.shards),
        notes=(*_notes(donor, plan, heads, before, after), *sharing_notes(target.rows, plan.shared_init)),
    )


def _side(donor: Donor, model_type: str, heads: list[int], cached: Heads, parameters: int, weight_bytes: int) -> dict:
    dtype, of_layers = stored_dtype(donor), heads_of_layers(donor.config, heads)
    numbers = {
        "model_type": model_type,
        "num_hidden_layers": len(of_layers),
        "num_attention_heads": donor.num_attention_heads,
        "num_key_value_heads": of_layers,
        "head_dim": donor.head_dim,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": parameters,
        "weight_bytes": weight_bytes,
        "cache_bytes_per_token": cache_bytes_per_token_computed(donor.config, cached, dtype),
        "cache_bytes_per_token_beyond_window": cache_bytes_per_token_beyond_window(donor.config, cached, dtype),
        "key_value_bytes_per_token": key_value_bytes_per_token(donor.config, of_layers, dtype),
        "tensor_parallel_sizes": tensor_parallel_sizes(donor.num_attention_heads, math.gcd(*heads)),
    }
    if donor.layout.cross_attention is None:
        return numbers
    return numbers | numbers_with_encoder(donor, heads, dtype)


def numbers_with_encoder(donor: Donor, heads: list[int], dtype: torch.dtype) -> dict:
    """What is otherwise in an encoder-decoder: KV heads of its three kinds of attention, and bytes of its two caches.

    Without a suffix, what is said of the decoder's self-attention; `cache_bytes_per_encoder_token` is of the keys and
    values that cross-attention keeps of what the encoder read.
    """
    of = {kind: [n for site, n in zip(donor.sites, heads, strict=True) if site.kind == kind] for kind in KINDS}
    cached = cache_bytes_by_kind(donor.sites, heads, dtype)
    return {
        "num_hidden_layers": len(of[SELF]),
        "num_key_value_heads": of[SELF],
        "num_key_value_heads_cross": of[CROSS],
        "num_key_value_heads_encoder": of[ENCODER],
        "cache_bytes_per_token": cached[SELF],
        "cache_bytes_per_token_beyond_window": cached[SELF],
        "cache_bytes_per_encoder_token": cached[CROSS],
        "key_value_bytes_per_token": sum(cached.values()),
        "tensor_parallel_sizes": tensor_parallel_sizes(donor.num_attention_heads, math.gcd(*of[SELF], *of[CROSS])),
    }


def _changed_parameters(donor: Donor, heads: list[int]) -> int:
    """How many more than the donor has."""
    further = sum(_has_bias(donor, name) for name in (donor.layout.key, donor.layout.value)) + _has_own_norms(donor)
    rows = zip(donor.sites, heads, donor.num_key_value_heads, strict=True)
    return sum(
        (after - before) * site.head_dim * (2 * donor.config.hidden_size + further) for site, after, before in rows
    )


def _notes(donor: Donor, plan: ConversionPlan, heads: list[int], before: dict, after: dict) -> list[str]:
    notes = []
    if heads != donor.num_key_value_heads and method_kind(plan.head_count_method) == "reduce":
        notes.append(
            "The student will be far worse than its donor until it is uptrained: merged heads were never trained to agree."
        )
    if donor.layout.bidirectional:
        notes.append(
            f"An encoder keeps no cache. What changes is parameters, {human_count(before['parameters'])} to "
            f"{human_count(after['parameters'])}, and the keys and values computed for a token, over all layers "
            f"{human_bytes(before['key_value_bytes_per_token'])} to {human_bytes(after['key_value_bytes_per_token'])}."
        )
    most = max(after["tensor_parallel_sizes"])
    if most < COMMON_TENSOR_PARALLEL_SIZE and donor.num_attention_heads >= COMMON_TENSOR_PARALLEL_SIZE:
        notes.append(
            f"Tensor parallelism over more GPUs than {most} cannot give each its own KV heads: engines then copy heads, "
            f"so that the cache per GPU shrinks no further, or refuse."
        )
    behind = left_behind(donor.folder, donor.tensors.shards) if donor.folder and donor.revision is None else []
    if behind:
        more = f" and {len(behind) - MOST_NAMED} more" if len(behind) > MOST_NAMED else ""
        notes.append(f"Left behind in the donor's folder: {', '.join(behind[:MOST_NAMED])}{more}.")
    return notes


def _has_bias(donor: Donor, projection: str) -> bool:
    return bool(_tensors_of(donor, f"{projection}.bias"))


def _tensors_of(donor: Donor, name: str) -> list[str]:
    """The head tensors of this name, or the fused ones of its kind; other towers of a composite have keys too."""
    projection, _, kind = name.rpartition(".")
    ending, heads = f".{donor.layout.fused or projection}.{kind}", head_tensors(donor)
    stored = (name for shard in donor.tensors.shards.values() for name in shard)
    return [name for name in stored if name.endswith(ending) and name in heads]


def _has_own_norms(donor: Donor) -> bool:
    """Whether each KV head has weights of its own in the norm on keys."""
    return donor.has_head_norms and donor.layout.norm_weights != "shared"


def stored_dtype(donor: Donor) -> torch.dtype:
    """Of the keys, which is the cache's."""
    return donor.tensors.dtype(_tensors_of(donor, f"{donor.layout.key}.weight")[0])
