"""See what each layer's attention is called with while a model runs, and compute something else in its place.

Shapes: B rows, Q/S query/key length, H query heads, K KV heads, D head_dim.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..convert.grouped_attention import use_grouped_attention
from ..refusal import Refusal
from ..runtime.attention_layout import AttentionLayout
from ..runtime.grouped_attention import NAME, causal_mask, grouped_sdpa


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """What one layer's attention function is called with.

    Args:
        query: `[B, H, Q, D]`, normed and rotated. key, value: `[B, K, S, D]`.
        attention_mask: broadcastable to `[B, H, Q, S]`, boolean or added to the scores; None: causal, if `module` is.
        options: scaling, softcap, and what else the family passes on.
    """

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attention_mask: torch.Tensor | None
    options: dict

    def mixed(self) -> torch.Tensor:
        """`[B, Q, H, D]`."""
        return grouped_sdpa(self.module, self.query, self.key, self.value, self.attention_mask, **self.options)[0]

    def mask(self) -> torch.Tensor | None:
        """With the causal one spelled out."""
        if self.attention_mask is None and getattr(self.module, "is_causal", True):
            return causal_mask(self.query, self.key)
        return self.attention_mask


Mix = Callable[[int, AttentionCall], torch.Tensor]  # (index of the layer, its call) -> [B, Q, H, D]


@contextmanager
def attention_mixed_by(model: PreTrainedModel, layout: AttentionLayout, mix: Mix) -> Iterator[None]:
    """While this lasts, `mix` computes the attention of every layer of `model`; other models are not touched.

    Raises:
        Refusal: the model does not call its attention through transformers' AttentionInterface.
    """
    layer_of, heard = _layer_of_module(model, layout), set()

    def attention(module, query, key, value, attention_mask, dropout=0.0, **options):
        layer_idx = layer_of.get(module)
        heard.add(layer_idx)
        if layer_idx is None or not checked:
            return grouped_sdpa(module, query, key, value, attention_mask, dropout=dropout, **options)
        tensors = {"query": query, "key": key, "value": value, "attention_mask": attention_mask}
        return mix(layer_idx, AttentionCall(module=module, options=options, **tensors)), None

    before, checked = model.config._attn_implementation, False
    try:
        use_grouped_attention(model)
        ALL_ATTENTION_FUNCTIONS[NAME] = attention  # of this object only, over what is registered
        with torch.no_grad():
            two_tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
            model.base_model(two_tokens, attention_mask=torch.ones_like(two_tokens), use_cache=False)
        _check_heard(heard, model)
        checked = True
        yield
    finally:
        if ALL_ATTENTION_FUNCTIONS.get(NAME) is attention:
            del ALL_ATTENTION_FUNCTIONS[NAME]
        model.set_attn_implementation(before)


def _check_heard(heard: set[int], model: PreTrainedModel) -> None:
    """A layer that is not heard would be taken for one that costs nothing."""
    silent = sorted(set(range(model.config.num_hidden_layers)) - heard)
    if silent:
        raise Refusal(
            f"{type(model).__name__}: layers {', '.join(map(str, silent))} do not call their attention through "
            f"transformers' AttentionInterface, so it cannot be looked at. Choose layers by hand (--shared-layers)."
        )


def _layer_of_module(model: PreTrainedModel, layout: AttentionLayout) -> dict[nn.Module, int]:
    """The index of the layer for each attention module, and for those inside it, which may be what calls."""
    found = {}
    for layer_idx in range(model.config.num_hidden_layers):
        attention = model.base_model.get_submodule(layout.attention.format(layer_idx=layer_idx))
        found |= dict.fromkeys(attention.modules(), layer_idx)
    return found
