"""Views of a model's key and value heads by transformers' own parameter names.

Nothing of hf_gqa is known here, so that no mistake can be shared with it.
"""

import re
from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel

from .conformance import ATTENTIONS, assert_close_for_float32, logits_of
from .tiny_donors import NUM_ATTENTION_HEADS, tokens_and_mask, use_attention


PROJECTION = re.compile(
    r"\.(\d+)\.(?:attn|self_attn|attention|attention\.self|self_attention|attn\.attention|albert_layers\.0\.attention)\."
    r"(c_attn|Wqkv|qkv_proj|query_key_value|k_proj|v_proj|key|value|k_lin|v_lin)\.(weight|bias)$"
)


def key_value_views(tensors: Mapping[str, torch.Tensor], head_dim: int) -> dict[tuple[int, str, str], torch.Tensor]:
    """Views `[K, D, ...]` of keys and values by (layer, "key" or "value", "weight" or "bias"); writing changes the model.

    Args:
        tensors: native names, or those of our own classes -> parameters, or anything of their shapes.
    """
    views = {}
    for name, tensor in tensors.items():
        match = PROJECTION.search(name)
        if match is None:
            continue
        layer_idx, projection, kind = int(match[1]), match[2], match[3]
        if projection in ("c_attn", "Wqkv", "qkv_proj", "query_key_value"):
            shape = tensors[f"{name.rpartition('.')[0]}.weight"].shape
            is_conv1d = shape[0] < shape[1]  # GPT-2: the last axis holds queries, keys and values
            rows = tensor.detach().movedim(-1, 0) if is_conv1d else tensor.detach()
            _, key, value = split_of(name, is_conv1d)(rows, head_dim)
            parts = {"key": key, "value": value}
        else:
            rows = tensor.detach().unflatten(0, (-1, head_dim))
            parts = {"key" if projection.startswith("k") else "value": rows}
        for part, view in parts.items():
            assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr(), "a copy changes nothing"
            views[layer_idx, part, kind] = view
    return views


def split_of(name: str, is_conv1d: bool) -> Callable[[torch.Tensor, int], list[torch.Tensor]]:
    """How the rows of the fused projection of this native name fall into query, key and value heads."""
    if "query_key_value" in name or ("c_attn" in name and not is_conv1d):
        return split_groups
    if ".self_attn.qkv_proj" in name:
        return split_phi3
    return split_quarters if "qkv_proj" in name else split_thirds


def split_thirds(rows: torch.Tensor, head_dim: int) -> list[torch.Tensor]:
    """All queries, all keys, all values."""
    return [part.unflatten(0, (-1, head_dim)) for part in rows.chunk(3)]


def split_phi3(rows: torch.Tensor, head_dim: int) -> list[torch.Tensor]:
    """The same, with as many keys and values as there are."""
    query, rest = rows.split((NUM_ATTENTION_HEADS * head_dim, len(rows) - NUM_ATTENTION_HEADS * head_dim))
    return [part.unflatten(0, (-1, head_dim)) for part in (query, *rest.chunk(2))]


def split_groups(rows: torch.Tensor, head_dim: int) -> list[torch.Tensor]:
    """The query heads of a group side by side, then their key and value: GPT-NeoX, BLOOM, any Falcon, GPT-BigCode."""
    groups = (len(rows) // head_dim - NUM_ATTENTION_HEADS) // 2
    grouped = rows.unflatten(0, (groups, -1, head_dim))
    return [grouped[:, :-2].flatten(0, 1), grouped[:, -2], grouped[:, -1]]


def split_quarters(rows: torch.Tensor, head_dim: int) -> list[torch.Tensor]:
    """CodeGen: four blocks of queries, values and keys, in this order."""
    query, value, key = rows.unflatten(0, (4, 3, -1, head_dim)).unbind(1)
    return [part.flatten(0, 1) for part in (query, key, value)]


OWN_NORMS = {
    "olmo2": "k_norm",
    "cohere": "k_norm",
    "stablelm": "k_layernorm",
}  # with weights of their own for each head


def key_norm_views(
    tensors: Mapping[str, torch.Tensor], model_type: str, head_dim: int
) -> dict[tuple[int, str, str], list[torch.Tensor]]:
    """Views `[D]` of each head's weights by (layer, "key norm", "weight"), in families whose heads have their own."""
    views = {}
    for name, tensor in tensors.items():
        match = re.search(
            rf"\.(\d+)\.self_attn\.{OWN_NORMS.get(model_type.removeprefix('gqa_'))}\.(?:\w+\.)*weight$", name
        )
        if match is not None:
            rows = tensor.detach().view(-1, head_dim)
            views.setdefault((int(match[1]), "key norm", "weight"), []).extend(rows)
    return views


def head_dim(model: PreTrainedModel) -> int:
    return getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads


def model_key_value_views(model: PreTrainedModel) -> dict[tuple[int, str, str], torch.Tensor]:
    views = key_value_views(dict(model.named_parameters()), head_dim(model))
    assert {(layer, part) for layer, part, _ in views} == {
        (layer, part) for layer in range(model.config.num_hidden_layers) for part in ("key", "value")
    }, "a family with other native names: extend key_value_views"
    return views | key_norm_views(dict(model.named_parameters()), model.config.model_type, head_dim(model))


def mean_of(members: list[torch.Tensor]) -> torch.Tensor:
    return (sum(member.double() for member in members) / len(members)).to(members[0])


def overwrite_groups(donor: PreTrainedModel, groups: int, merge: Callable = mean_of) -> None:
    """Overwrite, in place, every KV head of `donor` by what its group becomes."""
    for view_K in model_key_value_views(donor).values():
        size = len(view_K) // groups
        for start in range(0, len(view_K), size):
            merged = merge([view_K[head] for head in range(start, start + size)])
            for head in range(start, start + size):
                view_K[head].copy_(merged)


def assert_same_logits(student: PreTrainedModel, oracle: PreTrainedModel) -> None:
    """With every attention implementation, with and without padding; what a padding token computes is undefined."""
    real = tokens_and_mask()[1].bool()
    for attention in ATTENTIONS:
        use_attention(student, attention)
        use_attention(oracle, attention, or_skip=False)
        assert_close_for_float32(logits_of(student), logits_of(oracle))
        assert_close_for_float32(logits_of(student, padded=True)[real], logits_of(oracle, padded=True)[real])
