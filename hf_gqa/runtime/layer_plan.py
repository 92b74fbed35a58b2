"""One row per layer: what the attention of that layer owns. The rows travel in `config.json`."""

from dataclasses import asdict, dataclass, fields


Rows = list[dict] | None  # the configuration field `layer_plan`


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One row of the table.

    Source: GQA (Ainslie et al. 2023, arXiv 2305.13245); one KV head is MQA (Shazeer 2019, arXiv 1911.02150).

    Args:
        num_key_value_heads: KV heads this layer projects and caches; divides `num_attention_heads`.
    """

    num_key_value_heads: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict) -> "LayerPlan":
        known = {field.name for field in fields(cls)}
        if not isinstance(row, dict) or set(row) != known:
            got = sorted(row) if isinstance(row, dict) else row
            raise ValueError(f"layer_plan: a row has the keys {sorted(known)}, got {got}. Convert the donor again.")
        return cls(**row)


def uniform_rows(num_hidden_layers: int, num_key_value_heads: int) -> tuple[LayerPlan, ...]:
    """The table in which every layer owns `num_key_value_heads` KV heads."""
    return tuple(LayerPlan(num_key_value_heads=num_key_value_heads) for _ in range(num_hidden_layers))


def check_rows(rows: tuple[LayerPlan, ...], num_hidden_layers: int, num_attention_heads: int) -> None:
    """Raise ValueError, naming the row, if the table breaks an invariant."""
    if len(rows) != num_hidden_layers:
        raise ValueError(
            f"layer_plan: {len(rows)} rows for num_hidden_layers = {num_hidden_layers}. Give one row each."
        )
    for layer_idx, row in enumerate(rows):
        heads = row.num_key_value_heads
        if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or num_attention_heads % heads:
            allowed = ", ".join(str(n) for n in range(1, num_attention_heads + 1) if num_attention_heads % n == 0)
            raise ValueError(
                f"layer_plan row {layer_idx}: num_key_value_heads = {heads!r} does not divide "
                f"num_attention_heads = {num_attention_heads}. Use one of {allowed}."
            )
