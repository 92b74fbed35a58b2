"""Borrowers compute with the weights of its attention of an earlier layer.

Source: ALBERT (Lan et al. 2020, arXiv 1909.11942): shared-attention, which the paper finds nearly free. Every layer still has keys, values and a cache of its own:
this saves parameters, neither cache nor arithmetic.
"""

from ..runtime.layer_plan import LayerPlan


def rows(lenders: tuple[int, ...], num_key_value_heads: tuple[int, ...]) -> tuple[LayerPlan, ...]:
    return tuple(
        LayerPlan(num_key_value_heads=heads)
        if lender == layer_idx
        else LayerPlan(num_key_value_heads=heads, parameters_from=lender, tied="attention")
        for layer_idx, (lender, heads) in enumerate(zip(lenders, num_key_value_heads, strict=True))
    )
