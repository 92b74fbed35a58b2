"""Borrowers mix their own values by the attention matrix of an earlier layer.

Source: EchoAtt (Rajabzadeh et al. 2024, arXiv 2409.14595). Borrowers own no query and key projections and cache values
only; the output projection is their own.
"""

from ..runtime.layer_plan import LayerPlan


OF_ONE_TYPE = True


def rows(lenders: tuple[int, ...], num_key_value_heads: tuple[int, ...]) -> tuple[LayerPlan, ...]:
    return tuple(
        LayerPlan(num_key_value_heads=heads)
        if lender == layer_idx
        else LayerPlan(num_key_value_heads=heads, query_from=lender, key_from=lender)
        for layer_idx, (lender, heads) in enumerate(zip(lenders, num_key_value_heads, strict=True))
    )
