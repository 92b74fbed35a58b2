"""The table of an encoder-decoder: the plan's rows for its decoder's two kinds of attention, and for its encoder's."""

from itertools import groupby

from ..methods import METHODS
from ..refusal import Refusal
from ..runtime.attention_layout import ENCODER, check_site_rows
from ..runtime.layer_plan import LayerPlan
from .donor import Donor
from .plan import ConversionPlan, check_plan


def checked_rows_with_encoder(donor: Donor, plan: ConversionPlan) -> tuple[LayerPlan, ...]:
    """One row for each of the donor's sites; an encoder that is not converted keeps its heads.

    Source: GQA (Ainslie et al. 2023, arXiv 2305.13245), section 3.1: decoder self-attention and cross-attention are
    grouped, the encoder is not, since it is computed in parallel and is not bound by memory bandwidth.

    Raises:
        Refusal: the plan does not fit the donor's heads, lets layers share, or has a method that needs text.
    """
    if plan.sharing != "own" or plan.layer_plan is not None or plan.shared_init != "own":
        raise Refusal(
            f"'{donor.name}': in a {donor.family.model_type}, which has an encoder, layers cannot share. Give "
            f"num_key_value_heads, and leave sharing and layer_plan out."
        )
    observing = [name for name in plan.method if getattr(METHODS.get(name), "observes", False)]
    if observing:
        raise Refusal(
            f"method = {','.join(plan.method)}: '{observing[0]}' watches the student read text, layer by layer, and hf_gqa runs no "
            f"{donor.family.model_type} that way. Use methods that go by the weights."
        )
    rows: list[LayerPlan] = []
    for kind, group in groupby(zip(donor.sites, donor.num_key_value_heads, strict=True), lambda pair: pair[0].kind):
        sites, present = zip(*group, strict=True)
        if kind == ENCODER and not plan.convert_encoder:
            rows += [LayerPlan(num_key_value_heads=heads) for heads in present]
            continue
        wanted = plan.rows(list(present), ["attention"] * len(sites))
        for site, heads, row in zip(sites, present, wanted, strict=True):
            check_plan(plan, site.num_attention_heads, heads, donor.name, row.num_key_value_heads)
        rows += wanted
    try:
        check_site_rows(rows, donor.sites)
    except ValueError as error:
        raise Refusal(str(error)) from None
    return tuple(rows)
