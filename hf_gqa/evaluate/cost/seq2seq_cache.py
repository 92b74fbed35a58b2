"""What an encoder-decoder's decoder keeps: of each token it decodes, and of each token of the source."""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...convert.cache_bytes import bytes_of_layers
from ...runtime.native_call import cache_in


@dataclass(frozen=True, slots=True, kw_only=True)
class Seq2SeqHeads:
    """KV heads of each attention, and the numbers of one head."""

    decoder: tuple[int, ...]
    cross: tuple[int, ...]
    encoder: tuple[int, ...]
    head_dim: int


def seq2seq_heads(config: PretrainedConfig) -> Seq2SeqHeads:
    """As the configuration says; a plan has rows for the decoder's own attentions, for those across, for the encoder's."""
    layers = _first(config, "num_decoder_layers", "decoder_layers", "num_hidden_layers")
    encoder_layers = _first(config, "encoder_layers", "num_layers", "num_hidden_layers")
    heads = _first(config, "decoder_attention_heads", "num_attention_heads")
    encoder_heads = _first(config, "encoder_attention_heads", "num_attention_heads")
    head_dim = _first(config, "d_kv", "head_dim") or config.hidden_size // heads
    plan = getattr(config, "layer_plan", None)
    found = [heads] * (2 * layers) + [encoder_heads] * encoder_layers
    if plan is not None:
        found = [row["num_key_value_heads"] for row in plan]
        assert len(found) == 2 * layers + encoder_layers
    return Seq2SeqHeads(
        decoder=tuple(found[:layers]),
        cross=tuple(found[layers : 2 * layers]),
        encoder=tuple(found[2 * layers :]),
        head_dim=head_dim,
    )


def cache_bytes_of_a_token(config: PretrainedConfig, dtype: torch.dtype) -> tuple[int, int]:
    """(of each token that is decoded, of each token of the source), computed."""
    heads = seq2seq_heads(config)
    return tuple(2 * sum(each) * heads.head_dim * dtype.itemsize for each in (heads.decoder, heads.cross))


@torch.inference_mode()
def measured_cache_bytes_of_a_token(
    model: PreTrainedModel, source_tokens: int = 8, target_tokens: int = 4
) -> tuple[float, float]:
    """The same, from the cache that the model fills."""
    source = torch.zeros(1, source_tokens, dtype=torch.long, device=model.device)
    target = torch.zeros(1, target_tokens, dtype=torch.long, device=model.device)
    cache = cache_in(model(input_ids=source, decoder_input_ids=target, use_cache=True).values())
    own, cross = (bytes_of_layers(each.layers) for each in (cache.self_attention_cache, cache.cross_attention_cache))
    return own / target_tokens, cross / source_tokens


def _first(config: PretrainedConfig, *names: str) -> int | None:
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)
