"""How alike the attention matrices of layers are, computed without ever holding all of them.

Shapes: N samples, T tokens of a sample, L layers, H query heads, K KV heads, R query rows of a block, D head_dim.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ..evaluating import evaluating
from ..runtime.attention_layout import AttentionLayout
from .attention_calls import AttentionCall, attention_mixed_by


BLOCK_ELEMENTS = 1 << 23  # of probabilities at once: all layers' rows of a block, for one head


@torch.inference_mode()
def attention_similarity(
    model: PreTrainedModel,
    layout: AttentionLayout,
    tokens_NT: torch.Tensor,
    seen: Callable[[int], object] = lambda samples: None,
    block_elements: int = BLOCK_ELEMENTS,
) -> torch.Tensor:
    """Cosine between the flattened attention matrices of every two layers, averaged over samples.

    Source: EchoAtt (Rajabzadeh et al. 2024, arXiv 2409.14595), section 3.1: probabilities of all heads and positions as
    one vector for each layer and sample.

    Held at once: queries and keys of all layers for one sample, `L * T * (H + K) * D` numbers, and for one head as many
    query rows of every layer as make `block_elements` probabilities, at least one row. Reading whole matrices would
    take `L * H * T * T`.

    Args:
        tokens_NT: samples of one length, without padding.
        seen: told after each sample.

    Returns:
        `[L, L]`, float64, ones on the diagonal.

    Raises:
        Refusal: the model does not call its attention through transformers' AttentionInterface.
    """
    layers = model.config.num_hidden_layers
    total_LL = torch.zeros(layers, layers, dtype=torch.float64)
    calls: dict[int, AttentionCall] = {}

    def keep(layer_idx: int, call: AttentionCall) -> torch.Tensor:
        calls[layer_idx] = call
        return call.mixed()

    with evaluating(model), attention_mixed_by(model, layout, keep):
        for tokens_T in tokens_NT:
            model.base_model(tokens_T[None].to(model.device), use_cache=False)
            total_LL += cosines([calls[layer_idx] for layer_idx in range(layers)], block_elements)
            seen(1)
    return total_LL / len(tokens_NT)


def cosines(calls: list[AttentionCall], block_elements: int = BLOCK_ELEMENTS) -> torch.Tensor:
    """`[L, L]`, float64, of one sample: one call of each layer, all with the same numbers of heads and tokens."""
    heads, tokens = calls[0].query.shape[1:3]
    rows = max(1, block_elements // (len(calls) * tokens))
    products_LL = torch.zeros(len(calls), len(calls), dtype=torch.float64)
    for head in range(heads):
        for begin in range(0, tokens, rows):
            block = slice(begin, begin + rows)
            flat_LX = torch.stack([probabilities(call, head, block).flatten() for call in calls])
            products_LL += (flat_LX @ flat_LX.T).double().cpu()
    norm_L = products_LL.diagonal().sqrt()
    return products_LL / torch.outer(norm_L, norm_L)


def probabilities(call: AttentionCall, head: int, rows: slice) -> torch.Tensor:
    """`[R, S]`, float32: what some tokens of the one sample look at with one query head."""
    options = call.options
    kv_head = head // (call.query.shape[1] // call.key.shape[1])
    scaling = options.get("scaling") or call.query.shape[3] ** -0.5
    scores = call.query[0, head, rows].float() @ call.key[0, kv_head].float().T * scaling
    bias, softcap, sinks_H = (options.get(name) for name in ("position_bias", "softcap", "s_aux"))
    if bias is not None:
        scores = scores + _of_rows(bias, head, rows)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = call.mask()
    if mask is not None:
        mask = _of_rows(mask, head, rows)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks_H is None:
        return scores.softmax(-1)
    sink = sinks_H.float()[head].expand(len(scores), 1)  # a key without a value: takes its share and is dropped
    return torch.cat([scores, sink], dim=-1).softmax(-1)[:, :-1]


def _of_rows(tensor: torch.Tensor, head: int, rows: slice) -> torch.Tensor:
    """`[R or 1, S]` of what broadcasts to `[1, H, Q, S]`."""
    of_head = tensor[0, head if tensor.shape[1] > 1 else 0]
    return of_head[rows] if of_head.shape[0] > 1 else of_head
