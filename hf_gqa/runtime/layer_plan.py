"""One row per layer: what the attention of that layer owns and what it borrows. The rows travel in `config.json`."""

from dataclasses import asdict, dataclass, fields


Rows = list[dict] | None  # the configuration field `layer_plan`
STATES = ("query_from", "key_from", "value_from")  # columns of what is computed; `parameters_from` is one of weights
TIED = ("attention", "feed_forward", "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One row of the table. A column that says None, or that the JSON leaves out, is the layer's own.

    Source: GQA (Ainslie et al. 2023, arXiv 2305.13245); one KV head is MQA (Shazeer 2019, arXiv 1911.02150). Keys and
    values from an earlier layer: CLA (Brandon et al. 2024, 2405.12981). Queries and keys from an earlier layer, which is
    its attention matrix: EchoAtt (Rajabzadeh et al. 2024, 2409.14595). Weights: ALBERT (Lan et al. 2020, 1909.11942).

    Args:
        num_key_value_heads: KV heads this layer attends with; divides `num_attention_heads`.
        query_from, key_from, value_from: the earlier layer whose queries, keys, values this one uses. Queries are borrowed
            with the keys of the same layer only.
        parameters_from: the earlier layer whose weights this one computes with.
        tied: which weights these are: "attention", "feed_forward", or "all" of the layer, norms included.
    """

    num_key_value_heads: int
    query_from: int | None = None
    key_from: int | None = None
    value_from: int | None = None
    parameters_from: int | None = None
    tied: str | None = None

    @property
    def borrows_states(self) -> bool:
        return any(getattr(self, column) is not None for column in STATES)

    @property
    def borrows(self) -> bool:
        return self.borrows_states or self.parameters_from is not None

    def to_dict(self) -> dict[str, int | str]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, row: dict) -> "LayerPlan":
        known = {field.name for field in fields(cls)}
        if not isinstance(row, dict) or not {"num_key_value_heads"} <= set(row) <= known:
            got = sorted(map(str, row)) if isinstance(row, dict) else row
            optional = ", ".join(sorted(known - {"num_key_value_heads"}))
            raise ValueError(
                f"layer_plan: a row has the key num_key_value_heads and may have {optional}; got {got}. "
                f"Convert the donor again."
            )
        return cls(**row)


def read_rows(config) -> tuple[LayerPlan, ...]:
    return tuple(LayerPlan.from_dict(row) for row in config.layer_plan)


def uniform_rows(num_hidden_layers: int, num_key_value_heads: int) -> tuple[LayerPlan, ...]:
    """The table in which every layer owns `num_key_value_heads` KV heads."""
    return tuple(LayerPlan(num_key_value_heads=num_key_value_heads) for _ in range(num_hidden_layers))


def check_rows(
    rows: tuple[LayerPlan, ...],
    num_hidden_layers: int,
    num_attention_heads: int,
    layer_types: list[str] | None = None,
    counted_by: str = "num_hidden_layers",
) -> None:
    """Raise ValueError, naming the row, if the table breaks an invariant.

    Args:
        layer_types: of each layer, such as "sliding_attention"; None where all are the same.
        counted_by: the configuration field that `num_hidden_layers` is the value of.
    """
    if len(rows) != num_hidden_layers:
        raise ValueError(f"layer_plan: {len(rows)} rows for {counted_by} = {num_hidden_layers}. Give one row each.")
    types = layer_types or ["attention"] * len(rows)
    for layer_idx, row in enumerate(rows):
        heads = row.num_key_value_heads
        if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or num_attention_heads % heads:
            allowed = ", ".join(str(n) for n in range(1, num_attention_heads + 1) if num_attention_heads % n == 0)
            raise ValueError(
                f"layer_plan row {layer_idx}: num_key_value_heads = {heads!r} does not divide "
                f"num_attention_heads = {num_attention_heads}. Use one of {allowed}."
            )
        for column in (*STATES, "parameters_from"):
            if getattr(row, column) is not None:
                _check_lender(rows, layer_idx, column, types)
        _check_together(rows, layer_idx)


def _check_lender(rows: tuple[LayerPlan, ...], layer_idx: int, column: str, types: list[str]) -> None:
    """Raise ValueError unless what one column borrows can be had."""
    row, lender = rows[layer_idx], getattr(rows[layer_idx], column)
    where = f"layer_plan row {layer_idx}: {column} = {lender!r}"
    if layer_idx == 0:
        raise ValueError(f"{where}: the first layer has no earlier one to borrow from. Let it own what it uses.")
    if not isinstance(lender, int) or isinstance(lender, bool) or not 0 <= lender < layer_idx:
        raise ValueError(f"{where} is no earlier layer. Use one of 0 to {layer_idx - 1}, or leave it out.")
    of_its_type = column == "parameters_from" or types[lender] == types[layer_idx]
    if not of_its_type:
        allowed = [n for n in range(layer_idx) if types[n] == types[layer_idx] and getattr(rows[n], column) is None]
        raise ValueError(
            f"{where}: layer {lender} is {types[lender]}, layer {layer_idx} is {types[layer_idx]}. "
            f"Use {_one_of(allowed)}."
        )
    further = getattr(rows[lender], column)
    if further is not None:
        raise ValueError(f"{where}: layer {lender} itself borrows, from layer {further}. Use {further}.")
    if rows[lender].num_key_value_heads != row.num_key_value_heads:
        raise ValueError(
            f"{where}: layer {lender} has num_key_value_heads = {rows[lender].num_key_value_heads}, layer {layer_idx} "
            f"has {row.num_key_value_heads}. Give both the same."
        )


def _check_together(rows: tuple[LayerPlan, ...], layer_idx: int) -> None:
    """Raise ValueError unless the columns of one row fit each other."""
    row, where = rows[layer_idx], f"layer_plan row {layer_idx}"
    if row.query_from is not None and row.query_from != row.key_from:
        raise ValueError(
            f"{where}: query_from = {row.query_from} with key_from = {row.key_from}: borrowed queries fit the keys of "
            f"their own layer only. Set key_from to {row.query_from}."
        )
    if row.query_from is not None and row.value_from is not None:
        raise ValueError(
            f"{where}: query_from, key_from and value_from are all borrowed, so that nothing reads what enters the layer's "
            f"attention. Let it own its values."
        )
    if row.parameters_from is None:
        if row.tied is not None:
            raise ValueError(
                f"{where}: tied = {row.tied!r} without parameters_from. Say of which layer, or leave it out."
            )
        return
    if row.tied not in TIED:
        raise ValueError(f"{where}: tied = {row.tied!r} is unknown. Use one of {', '.join(TIED)}.")
    lender = rows[row.parameters_from]
    for column in STATES if row.tied != "feed_forward" else ():
        if getattr(lender, column) is not None and getattr(row, column) is None:
            raise ValueError(
                f"{where}: parameters_from = {row.parameters_from}: layer {row.parameters_from} borrows by {column}, so it "
                f"has no weights for what layer {layer_idx} computes. Let both borrow, or neither."
            )


def _one_of(layers: list[int]) -> str:
    return f"one of {', '.join(map(str, layers))}" if layers else "its own: no earlier layer of its type owns them"
