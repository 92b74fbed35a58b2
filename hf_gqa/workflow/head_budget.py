"""A number of KV heads for each layer, out of one cache budget: where fewer heads cost least, there are fewer.

Shapes: N rows, L tokens of a row.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from transformers import PreTrainedModel

from ..convert.cache_bytes import cache_bytes_per_token_computed
from ..convert.calibration import Calibration
from ..convert.donor import Donor
from ..convert.layer_conversion import converted_layer
from ..convert.layer_run import put_heads
from ..convert.plan import ConversionPlan, legal_targets
from ..convert.surgery import layer_heads
from ..evaluate.quality.token_scores import score
from ..export.explanation import stored_dtype
from ..methods import METHODS
from ..progress_bar import progress_bar
from ..refusal import Refusal
from .layer_budget import best_assignment
from .rows_as_windows import rows_as_windows


LOOKED_AT_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Allotment:
    """What a budget buys.

    Args:
        num_key_value_heads: of each layer.
        damages: of each layer, KV heads -> KL to the donor, in nats per token, where that layer alone has so few.
        budget_bytes, spent_bytes: of cache for a token, while it is inside every layer's window.
        method: with which the damages were measured.
    """

    num_key_value_heads: tuple[int, ...]
    damages: tuple[Mapping[int, float], ...]
    budget_bytes: int
    spent_bytes: int
    method: tuple[str, ...]

    @property
    def plan_fields(self) -> dict:
        """Of a `ConversionPlan`: one number where all layers have the same, else rows."""
        heads = self.num_key_value_heads
        if len(set(heads)) == 1:
            return {"num_key_value_heads": heads[0]}
        return {"layer_plan": tuple({"num_key_value_heads": n} for n in heads)}

    def to_dict(self) -> dict:
        listed = {"num_key_value_heads": list(self.num_key_value_heads), "method": list(self.method)}
        return asdict(self) | listed | {"damages": [{str(n): kl for n, kl in each.items()} for each in self.damages]}


def allot_heads(
    donor: Donor,
    model: PreTrainedModel,
    calibration: Calibration,
    budget_bytes: int,
    method: Sequence[str] | str = ("group", "fold"),
    seed: int = 0,
) -> Allotment:
    """The assignment of KV heads to layers that damages least, as far as damages add up.

    Args:
        model: the donor loaded; untouched.
        calibration: its text is read again for every layer and every count, `LOOKED_AT_TOKENS` of it at most.
        budget_bytes: of cache for a token.
        method: what layers are reduced with; of a plan's methods those that need not see the student compute.

    Raises:
        Refusal: no assignment meets the budget; it says what is possible.
    """
    one_head_bytes = cache_bytes_per_token_computed(donor.config, [1], stored_dtype(donor))
    check_budget_bytes(donor, budget_bytes)
    plan = ConversionPlan(num_key_value_heads=1, method=_unobserving(method), seed=seed)
    damages = layer_damages(donor, model, plan, calibration)
    heads = best_assignment(damages, budget_bytes // one_head_bytes)
    return Allotment(
        num_key_value_heads=heads,
        damages=damages,
        budget_bytes=budget_bytes,
        spent_bytes=sum(heads) * one_head_bytes,
        method=plan.method,
    )


def check_budget_bytes(donor: Donor, budget_bytes: int) -> None:
    """Raises Refusal for an encoder, and a budget below one KV head for each layer or above what the donor has."""
    if donor.layout.bidirectional:
        raise Refusal(f"cache budget: '{donor.name}' is an encoder, which keeps no cache. Give num_key_value_heads.")
    dtype, layers = stored_dtype(donor), donor.config.num_hidden_layers
    least = cache_bytes_per_token_computed(donor.config, [1] * layers, dtype)
    most = cache_bytes_per_token_computed(donor.config, donor.num_key_value_heads, dtype)
    if not least <= budget_bytes <= most:
        raise Refusal(
            f"cache budget: {budget_bytes:,} bytes per token ({budget_bytes / most:.1%} of donor '{donor.name}'). With one KV "
            f"head in each of {layers} layers it is {least:,} ({least / most:.1%}), and the donor's is {most:,}. Use a budget "
            f"from {least:,} to {most:,} bytes."
        )


def layer_damages(
    donor: Donor, model: PreTrainedModel, plan: ConversionPlan, calibration: Calibration
) -> tuple[dict[int, float], ...]:
    """Of each layer, KV heads -> KL to the donor where that layer alone has so few."""
    rows_NL = calibration.tokens_NL
    wanted = max(1, LOOKED_AT_TOKENS // rows_NL.shape[1])
    windows = rows_as_windows(rows_NL[:: max(1, -(-len(rows_NL) // wanted))])
    changed, damages = copy.deepcopy(model).eval(), []
    with progress_bar("Trying layers", donor.config.num_hidden_layers, "layer") as bar:
        for layer_idx, heads in layer_heads(donor):
            attention = changed.base_model.get_submodule(donor.layout.attention.format(layer_idx=layer_idx))
            counts = legal_targets(donor.num_attention_heads, heads.num_key_value_heads)[0]
            damage = {heads.num_key_value_heads: 0.0}
            for count in counts[:-1]:
                statistics = calibration.statistics[layer_idx]
                put_heads(donor.layout, attention, converted_layer(donor, plan, heads, layer_idx, count, statistics))
                damage[count] = float(score(model, changed, windows, batch_size=8).kl_N.mean())
            put_heads(donor.layout, attention, heads)
            damages.append(damage)
            bar.update()
    return tuple(damages)


def _unobserving(method: Sequence[str] | str) -> tuple[str, ...]:
    names = method.split(",") if isinstance(method, str) else method
    return tuple(name for name in names if not getattr(METHODS.get(name), "observes", False))
