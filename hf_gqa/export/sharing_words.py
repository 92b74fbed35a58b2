"""What layer sharing saves and what it does not, in words, from the rows alone."""

from collections.abc import Sequence

from ..runtime.layer_plan import LayerPlan


def sharing_notes(rows: Sequence[LayerPlan], shared_init: str = "own") -> list[str]:
    """One sentence or two for each kind of sharing in the table, and for what borrowers start from."""
    found = [f"{_layers(layers, len(rows))} {words}" for layers, words in _kinds(rows) if layers]
    borrowers = [layer_idx for layer_idx, row in enumerate(rows) if row.borrows_states]
    if shared_init == "fit":
        found.append(
            f"{_layers(borrowers, len(rows))}: fitted on calibration text to what is lent, namely which of the heads reads which "
            "of the lender's, with what queries where these are the layer's own, and the output projection."
        )
    return found


def _kinds(rows: Sequence[LayerPlan]) -> list[tuple[list[int], str]]:
    """The layers that share in a way, and what it means."""

    def having(condition) -> list[int]:
        return [layer_idx for layer_idx, row in enumerate(rows) if condition(row)]

    return [
        (
            having(lambda row: row.query_from is not None),
            "reuse the attention matrix of an earlier layer: no query and key projections, no cached keys, and no keys read "
            "while decoding; values are cached and read as before.",
        ),
        (
            having(lambda row: row.query_from is None and row.key_from is not None and row.value_from is not None),
            "attend to the keys and values of an earlier layer: no key and value projections and nothing cached; the "
            "borrowed cache is read again by each, so that a decoding step reads as much as before.",
        ),
        (
            having(lambda row: row.query_from is None and (row.key_from is None) != (row.value_from is None)),
            "borrow either keys or values of an earlier layer, and cache the other.",
        ),
        (
            having(lambda row: row.parameters_from is not None),
            "compute with weights of an earlier layer: fewer parameters to store and load; cache, arithmetic and weights "
            "read per token stay.",
        ),
    ]


def _layers(layers: list[int], of: int) -> str:
    return f"Layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))} of 0 to {of - 1}"
