"""What a table of rows costs in cache and parameters, and what a budget asks of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from ..convert.donor import Donor
from ..convert.surgery import layer_heads
from ..runtime.layer_plan import LayerPlan
from ..runtime.planned_attention import borrowed_modules
from ..sharing import SHARINGS


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Args:
    cache_bytes_per_token: of keys and values that layers keep, inside every sliding window.
    parameters: of the whole model, tied ones once.
    """

    cache_bytes_per_token: int
    parameters: int


class PriceList:
    """Prices of tables for one donor, without converting it.

    Args:
        model: the donor loaded.
        num_key_value_heads: KV heads of every layer of the student; None: the donor's own.
    """

    def __init__(self, donor: Donor, model: PreTrainedModel, num_key_value_heads: int | None = None):
        self.layout, self.head_dim = donor.layout.unfused(donor.layout.model_type), donor.head_dim
        self.heads = tuple(num_key_value_heads or own for own in donor.num_key_value_heads)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.modules: list[dict[str, int]] = []  # parameters of each that a borrower may be without
        self.itemsize = 0
        for layer_idx, own in layer_heads(donor):
            self.itemsize = own.key_KDE.element_size()
            sizes = {
                name: sum(tensor.numel() for tensor in tensors if tensor is not None)
                for name, *tensors in (
                    ("q_proj", own.query_HDE, own.query_bias_HD),
                    ("k_proj", own.key_KDE, own.key_bias_KD),
                    ("v_proj", own.value_KDE, own.value_bias_KD),
                )
            }
            for name in ("k_proj", "v_proj"):
                fewer = sizes[name] * self.heads[layer_idx] // own.num_key_value_heads
                self.parameters += fewer - sizes[name]
                sizes[name] = fewer
            attention = model.base_model.get_submodule(donor.layout.attention.format(layer_idx=layer_idx))
            for name in filter(None, (donor.layout.query_norm, donor.layout.key_norm)):
                sizes[name] = sum(parameter.numel() for parameter in attention.get_submodule(name).parameters())
            self.modules.append(sizes)

    def of_rows(self, rows: Sequence[LayerPlan]) -> Price:
        kept = sum(row.num_key_value_heads * ((row.key_from is None) + (row.value_from is None)) for row in rows)
        gone = sum(
            sizes[name]
            for row, sizes in zip(rows, self.modules, strict=True)
            for name in borrowed_modules(row, self.layout)
        )
        return Price(
            cache_bytes_per_token=kept * self.head_dim * self.itemsize,
            parameters=self.parameters - gone,
        )

    def of_sharing(self, pattern: str, owners: dict[int, int]) -> Price:
        """Of a table in which some layers borrow by one pattern: borrower -> owner."""
        lenders = tuple(owners.get(layer, layer) for layer in range(len(self.heads)))
        return self.of_rows(SHARINGS.get(pattern)(lenders, self.heads))

    def saved(self, pattern: str, budget: str) -> list[int]:
        """What each layer saves of a budget's unit as a borrower, from whichever layer it borrows."""
        layers = range(len(self.heads))
        if budget == "shared_layers":
            return [1 for _ in layers]
        whole = getattr(self.of_sharing(pattern, {}), budget)
        return [whole - getattr(self.of_sharing(pattern, {layer: 0 if layer else 1}), budget) for layer in layers]

    def to_save(self, pattern: str, budget: str, amount: int) -> int:
        """What a budget of `amount` asks borrowers to save; not positive where none are needed."""
        return amount if budget == "shared_layers" else getattr(self.of_sharing(pattern, {}), budget) - amount
