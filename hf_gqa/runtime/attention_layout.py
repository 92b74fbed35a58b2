"""How a family's attention projects, norms, rotates and names its tensors; as data."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayout:
    """Where the heads of one `model_type` live.

    Args:
        model_type: the `model_type` of the configuration whose checkpoints look like this.
        attention: path of a layer's attention below the base model, with `{layer_idx}`.
        query, key, value, output: names of the projections below `attention`.
        fused: name of the one projection that holds query, key and value rows, or None. Then `query`, `key` and
            `value` are not names of tensors on disk.
        fused_order: what comes after what in each block of a fused projection.
        fused_blocks: blocks of a fused projection, each with its share of the heads; None for one block per KV head,
            which holds the query heads that read it.
        transposed: names of projections stored `[in, out]` (Conv1D) instead of `[out, in]` (Linear).
        query_norm, key_norm: names of the norms over head_dim, one weight shared by all heads, or None.
        output_normed: whether a norm stands between the attention's output and the residual stream.
        rotary: how pairs lie in the R first dimensions of a head, which rotate: "halves" (i with i + R/2), "interleaved"
            (2i with 2i + 1), or None for no rotary embedding. R follows from the configuration.
        unrotated_layer_types: the `layer_types` of layers that rotate nothing; `no_rope_layers` is read besides.
        key_value_heads_field: the configuration field that sets the number of KV heads, or None if the native class
            has as many KV heads as query heads whatever its configuration says.
        passes_keywords: whether blocks hand keywords that they do not know to their attention; layers cannot share
            states otherwise.
        position: the position scheme in words, for people.
    """

    model_type: str
    attention: str
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    fused: str | None = None
    fused_order: tuple[str, str, str] = ("query", "key", "value")
    fused_blocks: int | None = 1
    transposed: frozenset[str] = frozenset()
    query_norm: str | None = None
    key_norm: str | None = None
    output_normed: bool = False
    rotary: str | None = None
    unrotated_layer_types: frozenset[str] = frozenset()
    key_value_heads_field: str | None = "num_key_value_heads"
    passes_keywords: bool = True
    position: str

    def unfused(self, model_type: str) -> "AttentionLayout":
        """The layout of our own class for this family: separate Linear query, key and value; the rest as it was."""
        return replace(
            self,
            model_type=model_type,
            fused=None,
            fused_order=("query", "key", "value"),
            fused_blocks=1,
            transposed=self.transposed - {self.fused},
            key_value_heads_field="num_key_value_heads",
        )
