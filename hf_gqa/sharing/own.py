"""Nothing is shared across layers: every layer owns its queries, keys and values."""

from ..runtime.layer_plan import LayerPlan


def rows(lenders: tuple[int, ...], num_key_value_heads: tuple[int, ...]) -> tuple[LayerPlan, ...]:
    return tuple(LayerPlan(num_key_value_heads=heads) for heads in num_key_value_heads)
