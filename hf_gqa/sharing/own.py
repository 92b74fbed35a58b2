"""Nothing is shared across layers: every layer owns its keys and values."""

from ..runtime.layer_plan import LayerPlan, uniform_rows


def rows(num_hidden_layers: int, num_key_value_heads: int) -> tuple[LayerPlan, ...]:
    return uniform_rows(num_hidden_layers, num_key_value_heads)
