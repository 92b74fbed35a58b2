"""Floor 2: sharing patterns, one file each, pure integers; the file's name is the pattern's name.

A pattern file defines `rows(lenders, num_key_value_heads) -> tuple[LayerPlan, ...]`, where `lenders` says of each layer from
which one it borrows (itself: it owns all), and `num_key_value_heads` how many KV heads it attends with. A pattern whose
layers must be of one attention type to share sets `OF_ONE_TYPE = True`.
"""

from collections.abc import Iterable, Sequence

from ..refusal import Refusal
from ..registry import Registry


SHARINGS = Registry(__name__, "sharing pattern", "rows")


def nearest_owners(shared_layers: Iterable[int], layer_types: Sequence[str]) -> tuple[int, ...]:
    """From which layer each borrows: a shared one from the nearest earlier one of its type that is not shared.

    Raises:
        Refusal: a layer that does not exist, or has no such owner.
    """
    shared, lenders = sorted(set(shared_layers)), list(range(len(layer_types)))
    for layer_idx in shared:
        if not 0 <= layer_idx < len(layer_types):
            raise Refusal(f"shared_layers: there is no layer {layer_idx}. Use some of 1 to {len(layer_types) - 1}.")
        owners = [n for n in range(layer_idx) if n not in shared and layer_types[n] == layer_types[layer_idx]]
        if not owners:
            first = (
                "it is the first" if layer_types.index(layer_types[layer_idx]) == layer_idx else "all of them borrow"
            )
            raise Refusal(
                f"shared_layers: layer {layer_idx} ({layer_types[layer_idx]}) has no earlier layer of its type to borrow "
                f"from; {first}. Leave layer {layer_types.index(layer_types[layer_idx])} out."
            )
        lenders[layer_idx] = owners[-1]
    return tuple(lenders)


def every(share_every: int, layer_types: Sequence[str]) -> tuple[int, ...]:
    """The layers that borrow when of each `share_every` consecutive layers of a type the first owns.

    Source: CLA (Brandon et al. 2024, arXiv 2405.12981), which calls `share_every` the sharing factor.
    """
    places = [layer_types[:layer_idx].count(kind) for layer_idx, kind in enumerate(layer_types)]
    return tuple(layer_idx for layer_idx, place in enumerate(places) if place % share_every)
