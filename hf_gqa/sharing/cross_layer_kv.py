"""Borrowers attend to the keys and values of an earlier layer, as it cached them.

Source: CLA (Brandon et al. 2024, arXiv 2405.12981); YOCO (2405.05254), MLKV (2406.09297) and the layouts of the systematic
study 2410.14442 differ in which layers borrow. Borrowers own no key and value projections and cache nothing.
"""

from ..runtime.layer_plan import LayerPlan


OF_ONE_TYPE = True


def rows(lenders: tuple[int, ...], num_key_value_heads: tuple[int, ...]) -> tuple[LayerPlan, ...]:
    return tuple(
        LayerPlan(num_key_value_heads=heads)
        if lender == layer_idx
        else LayerPlan(num_key_value_heads=heads, key_from=lender, value_from=lender)
        for layer_idx, (lender, heads) in enumerate(zip(lenders, num_key_value_heads, strict=True))
    )
