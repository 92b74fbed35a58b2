"""Each merged KV head is scaled to the norm its members had on average."""

from dataclasses import dataclass, replace

import torch

from ..weights.attention_weights import AttentionWeights
from . import MethodContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Renormalise:
    """A mean of heads that disagree is shorter than they are, which flattens attention.

    Source: the GQA conversion audit of github.com/rje/microlab: the members' mean Frobenius norm, for keys and for
    values. Biases scale along.
    """

    kind: str = "repair"

    def __call__(self, heads: AttentionWeights, layer: MethodContext) -> AttentionWeights:
        changed = {}
        for weight, bias in (("key_KDE", "key_bias_KD"), ("value_KDE", "value_bias_KD")):
            now_K = getattr(heads, weight).double().norm(dim=(1, 2))
            members_K = getattr(layer.before, weight).double().norm(dim=(1, 2))
            wanted_K = members_K.unflatten(0, (heads.num_key_value_heads, -1)).mean(1)
            scale_K = torch.where(now_K > 0, wanted_K / now_K, 1.0)
            for name in (weight, bias):
                tensor_K = getattr(heads, name)
                if tensor_K is not None:
                    scaled_K = tensor_K.double() * scale_K.reshape(-1, *[1] * (tensor_K.dim() - 1))
                    changed[name] = scaled_K.to(tensor_K)
        return replace(heads, **changed)


METHOD = Renormalise()
