"""How a family's attentions project, norm, rotate and name their tensors, and where each stands in a model; as data."""

from dataclasses import dataclass, replace


KINDS = SELF, CROSS, ENCODER = "self", "cross", "encoder"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayout:
    """Where the heads of one `model_type` live.

    Args:
        model_type: the `model_type` of the configuration whose checkpoints look like this.
        attention: path of a layer's attention below the base model, with `{layer_idx}`.
        query, key, value, output: names of the projections below `attention`.
        inner: name below `attention` of the module that projects queries, keys and values and mixes them, where the
            output projection stands beside it; None where `attention` is that module.
        fused: name of the one projection that holds query, key and value rows, or None. Then `query`, `key` and
            `value` are not names of tensors on disk.
        fused_order: what comes after what in each block of a fused projection.
        fused_blocks: blocks of a fused projection, each with its share of the heads; None for one block per KV head,
            which holds the query heads that read it.
        transposed: names of projections stored `[in, out]` (Conv1D) instead of `[out, in]` (Linear).
        query_norm, key_norm: names of the norms on queries and on keys, or None.
        norm_switch: the configuration field that says whether there are such norms; None: there always are.
        norm_weights: what a norm goes over, and has weights for: "shared", over head_dim with one weight for all
            heads; "per_head", over head_dim with a weight `[heads, D]`; "joint", over all heads' numbers together
            with a weight `[heads * D]`.
        norm_list: name below a norm of the list that holds the norm of each head, or None for one tensor of them all.
        output_normed: whether a norm or a factor stands between the attention's output and the residual stream.
        rotary: how pairs lie in the R first dimensions of a head, which rotate: "halves" (i with i + R/2), "interleaved"
            (2i with 2i + 1), or None for no rotary embedding. R follows from the configuration.
        position_names: what the blocks of any release call the argument with which they say how far to rotate.
        sine_first: whether what they hand over are sines before cosines.
        unrotated_layer_types: the `layer_types` of layers that rotate nothing; `no_rope_layers` is read besides.
        key_value_heads_field: the configuration field that sets the number of KV heads, or None if the native class
            has as many KV heads as query heads whatever its configuration says.
        head_positions: the configuration field that says whether positions differ between query heads (ALiBi), "always"
            where they do (relative bias), or None; such heads cannot change places.
        plain_scores: whether scores are scaled products of queries and keys under the mask that the layer is given, so that
            a method can compute them.
        passes_keywords: whether blocks hand keywords that they do not know on to their attention, without which layers cannot
            lend each other queries, keys and values.
        bidirectional: whether every token looks at all others, as in an encoder; then nothing is cached.
        position: the position scheme in words, for people.
        ties_layers: whether layers at several depths compute with the same attention, as in ALBERT; then `num_layers_field`
            says how many attentions there are.
        cross_attention: path of a decoder layer's attention to the encoder, or None where there is no encoder. Then
            `attention` is the path in the decoder.
        encoder_attention: path of an encoder layer's attention, with `cross_attention`.
        num_layers_field, num_heads_field: configuration fields with the layers, and the query heads, of the decoder.
        num_encoder_layers_field, num_encoder_heads_field: those of the encoder.
    """

    model_type: str
    attention: str
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    inner: str | None = None
    fused: str | None = None
    fused_order: tuple[str, str, str] = ("query", "key", "value")
    fused_blocks: int | None = 1
    transposed: frozenset[str] = frozenset()
    query_norm: str | None = None
    key_norm: str | None = None
    norm_switch: str | None = None
    norm_weights: str = "shared"
    norm_list: str | None = None
    output_normed: bool = False
    rotary: str | None = None
    position_names: tuple[str, ...] = ("position_embeddings",)
    sine_first: bool = False
    unrotated_layer_types: frozenset[str] = frozenset()
    key_value_heads_field: str | None = "num_key_value_heads"
    head_positions: str | None = None
    plain_scores: bool = True
    passes_keywords: bool = True
    bidirectional: bool = False
    position: str
    ties_layers: bool = False
    cross_attention: str | None = None
    encoder_attention: str | None = None
    num_layers_field: str = "num_hidden_layers"
    num_heads_field: str = "num_attention_heads"
    num_encoder_layers_field: str = "num_hidden_layers"
    num_encoder_heads_field: str = "num_attention_heads"

    def mixing_module(self, layer_idx: int) -> str:
        """Path, below the base model, of the module that projects a layer's queries, keys and values and mixes them."""
        return self.attention.format(layer_idx=layer_idx) + (f".{self.inner}" if self.inner else "")

    @property
    def stack(self) -> str:
        """Path, below the base model, of the module that runs the blocks one after the other and hands them the cache."""
        return self.attention.partition(".{layer_idx}")[0].rpartition(".")[0]

    def unfused(self, model_type: str) -> "AttentionLayout":
        """The layout of our own class for this family: separate Linear query, key and value; the rest as it was.

        With an encoder they are separate already.
        """
        if self.cross_attention is not None:
            return replace(self, model_type=model_type)
        below = f"{self.inner}." if self.inner else ""
        return replace(
            self,
            model_type=model_type,
            query=f"{below}q_proj",
            key=f"{below}k_proj",
            value=f"{below}v_proj",
            fused=None,
            fused_order=("query", "key", "value"),
            fused_blocks=1,
            transposed=self.transposed - {self.fused},
            key_value_heads_field="num_key_value_heads",
        )


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
