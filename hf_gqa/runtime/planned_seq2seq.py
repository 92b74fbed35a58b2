"""Encoder-decoders: planned attention in all of its three places, in the family's own configuration and models.

Shapes: B batch, Q query length, S key length, H query heads, K KV heads, D head_dim.
"""

from torch import nn
from transformers import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_layout import SELF, AttentionLayout, AttentionSite, attention_sites, check_site_rows
from .layer_plan import LayerPlan
from .native_call import guard_cache
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


def eager_attention(module, query, key, value, attention_mask, **kwargs):
    """The family's own attention in the open, on keys and values repeated for it."""
    if module.num_key_value_groups > 1:  # a copy of the same would be laid out anew, and summed in another order
        key = key.repeat_interleave(module.num_key_value_groups, dim=1)
        value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    return module.native_eager(module, query, key, value, attention_mask, **kwargs)


class PlannedSeq2SeqAttention:
    """Mixin after `NativeCall`, before a family's native attention class; `compute` is that of BART and its like.

    Source: GQA (Ainslie et al. 2023, arXiv 2305.13245), which groups the decoder's self-attention and cross-attention.
    """

    donor_layout: AttentionLayout
    native_eager = None  # the family's own eager attention function, as a staticmethod

    @classmethod
    def take_over(cls, native: nn.Module, site: AttentionSite, num_key_value_heads: int, config) -> None:
        """Make a native attention one of ours, in place, with new key and value projections.

        What a native block builds its three kinds of attention with differs by family and release, so it builds them.
        """
        native.__class__ = cls
        native.num_key_value_groups = site.num_attention_heads // num_key_value_heads
        for name in (cls.donor_layout.key, cls.donor_layout.value):
            donor = getattr(native, name)
            planned = nn.Linear(donor.in_features, num_key_value_heads * site.head_dim, bias=donor.bias is not None)
            setattr(native, name, planned)
        native.planned_head_dim = site.head_dim
        if not hasattr(native, "config"):  # older releases of transformers
            native.config = config

    def compute(self, hidden_states, key_value_states=None, cache=None, attention_mask=None, **kwargs):
        """The output `[B, Q, E]`, and the attention weights where there are any."""
        query, key, value = self.query_key_value(hidden_states, key_value_states, cache)
        return self.mix(query, key, value, attention_mask, **kwargs)

    def query_key_value(self, hidden_states, encoder_states, cache):
        """Project, and keep keys and values; those of the encoder are projected once for each cache.

        Args:
            hidden_states: `[B, Q, E]`, what asks. encoder_states: `[B, S, E]`, what is asked; None: `hidden_states`.

        Returns:
            `[B, H, Q, D]`, `[B, K, S, D]`, `[B, K, S, D]`.
        """
        query = self.heads(self.donor_layout.query, hidden_states)
        kept, is_filled = cache, False
        if isinstance(cache, EncoderDecoderCache):
            is_cross = encoder_states is not None
            kept = cache.cross_attention_cache if is_cross else cache.self_attention_cache
            is_filled = is_cross and cache.is_updated.get(self.layer_idx)
        if is_filled:
            return query, kept.layers[self.layer_idx].keys, kept.layers[self.layer_idx].values
        asked = hidden_states if encoder_states is None else encoder_states
        key, value = self.heads(self.donor_layout.key, asked), self.heads(self.donor_layout.value, asked)
        if kept is not None:
            key, value = kept.update(key, value, self.layer_idx)
            if kept is not cache and encoder_states is not None:
                cache.is_updated[self.layer_idx] = True
        return query, key, value

    def heads(self, projection: str, states):
        return getattr(self, projection)(states).unflatten(-1, (-1, self.planned_head_dim)).transpose(1, 2)

    def mix(self, query, key, value, attention_mask, scaling=None, **kwargs):
        """`[B, Q, E]`, and the attention weights `[B, H, Q, S]` where the implementation has them."""
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling if scaling is None else scaling,
            **kwargs,
        )
        return getattr(self, self.donor_layout.output)(mixed.flatten(2)), weights


class PlannedSeq2SeqConfig(PlannedConfig):
    """Mixin before a family's native configuration; the subclass adds the field `layer_plan`, and names its layout.

    One row for each of `attention_sites`. There is no `num_key_value_heads` beside them: some families take that name for
    another of their fields.
    """

    donor_layout: AttentionLayout

    def fill_plan(self) -> None:
        if self.layer_plan is None:
            sites = attention_sites(self.donor_layout, self)
            self.layer_plan = [{"num_key_value_heads": site.num_attention_heads} for site in sites]

    def validate_layer_plan(self):
        rows = tuple(LayerPlan.from_dict(row) for row in self.layer_plan)
        check_site_rows(rows, attention_sites(self.donor_layout, self))


def take_over_attentions(model, attention_class: type[PlannedSeq2SeqAttention], config) -> None:
    layout = attention_class.donor_layout
    sites = attention_sites(layout, config)
    heads = [LayerPlan.from_dict(row).num_key_value_heads for row in config.layer_plan]
    own = {site.layer_idx: count for site, count in zip(sites, heads, strict=True) if site.kind == SELF}
    guard_cache(model.get_submodule(layout.stack), own)
    for site, count in zip(sites, heads, strict=True):
        attention_class.take_over(model.get_submodule(site.path), site, count, config)


class PlannedSeq2SeqModel(PlannedModel):
    """Mixin before a family's native base model of encoder and decoder."""

    def plan_attention(self, config) -> None:
        take_over_attentions(self, self.attention_class, config)


class PlannedWholeHead:
    """Mixin before `PlannedHead` and a native head class that holds encoder and decoder itself, not in a base model (T5)."""

    def __init__(self, config):
        super(PlannedHead, self).__init__(config)
        take_over_attentions(self, self.model_class.attention_class, config)
        self.post_init()
