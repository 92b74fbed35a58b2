"""Every attention of a model, in the order of the table's rows: one row each."""

from dataclasses import dataclass

from .attention_layout import AttentionLayout


KINDS = SELF, CROSS, ENCODER = "self", "cross", "encoder"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSite:
    """Where one attention is, and how many query heads it has.

    Args:
        path: of the attention below the base model.
        kind: "self" in a decoder layer, "cross" from there to the encoder, "encoder" within that.
        layer_idx: of its layer within its stack.
        num_attention_heads: query heads.
        head_dim: numbers of a head.
    """

    path: str
    kind: str
    layer_idx: int
    num_attention_heads: int
    head_dim: int


def attention_sites(layout: AttentionLayout, config) -> tuple[AttentionSite, ...]:
    """The decoder's self-attentions; with an encoder, then its cross-attentions, then the encoder's.

    A decoder-only model has one per layer, so its rows are those of its layers.
    """
    layers, heads = getattr(config, layout.num_layers_field), getattr(config, layout.num_heads_field)
    sites = _stack(layout.attention, SELF, layers, heads, config)
    if layout.cross_attention is not None:
        sites += _stack(layout.cross_attention, CROSS, layers, heads, config)
        layers = getattr(config, layout.num_encoder_layers_field)
        sites += _stack(
            layout.encoder_attention, ENCODER, layers, getattr(config, layout.num_encoder_heads_field), config
        )
    return sites


def _stack(path: str, kind: str, layers: int, heads: int, config) -> tuple[AttentionSite, ...]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return tuple(
        AttentionSite(
            path=path.format(layer_idx=layer_idx),
            kind=kind,
            layer_idx=layer_idx,
            num_attention_heads=heads,
            head_dim=head_dim,
        )
        for layer_idx in range(layers)
    )


def check_site_rows(rows, sites: tuple[AttentionSite, ...]) -> None:
    """Raise ValueError, naming the attention, if the table does not fit."""
    if len(rows) != len(sites):
        raise ValueError(f"layer_plan: {len(rows)} rows for {len(sites)} attentions. Give one row each.")
    for row, site in zip(rows, sites, strict=True):
        heads = row.num_key_value_heads
        if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or site.num_attention_heads % heads:
            allowed = [str(n) for n in range(1, site.num_attention_heads + 1) if site.num_attention_heads % n == 0]
            raise ValueError(
                f"layer_plan row of {site.path}: num_key_value_heads = {heads!r} does not divide its "
                f"{site.num_attention_heads} query heads. Use one of {', '.join(allowed)}."
            )
