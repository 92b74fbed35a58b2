"""A tiny random donor of every encoder-decoder; a new family has one by existing."""

from dataclasses import fields

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_gqa.convert.families import load_family
from hf_gqa.runtime.attention_layout import attention_sites


NUM_ATTENTION_HEADS = 4
VOCAB_SIZE = 99
SINUSOIDAL = ("marian", "pegasus")
SPECIAL = {"marian": {"pad_token_id": 0, "decoder_vocab_size": VOCAB_SIZE}}


def seq2seq_config(model_type: str, **changes):
    """Two layers on either side."""
    wanted = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": NUM_ATTENTION_HEADS,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": NUM_ATTENTION_HEADS,
        "decoder_attention_heads": NUM_ATTENTION_HEADS,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "num_mel_bins": 8,
        "max_source_positions": 12,
        "max_target_positions": 64,
        "dropout_rate": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "forced_eos_token_id": None,
        "decoder_start_token_id": 1,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
        **SPECIAL.get(model_type, {}),
        **changes,
    }
    config_class = CONFIG_MAPPING[model_type]
    known = {field.name for field in fields(config_class)} | {"decoder_start_token_id"}
    return config_class(**{key: value for key, value in wanted.items() if key in known})


def randomised(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Weights large enough that no head, bias or norm can be ignored without showing in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" in name and model.config.model_type in SINUSOIDAL:
                continue  # some classes leave these tables out when they save, and compute them anew
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name and "weight" in name else 0.25 * noise)
    return model.eval()


def seq2seq_donor(model_type: str, seed: int = 0, auto_class: str | None = None, **changes) -> PreTrainedModel:
    config = seq2seq_config(model_type, **changes)
    auto_class = auto_class or language_model_class(model_type)
    return randomised(getattr(transformers, auto_class).from_config(config), seed)


def language_model_class(model_type: str) -> str:
    return next(name for name in load_family(model_type).head_classes if "Seq2Seq" in name)


def encoder_inputs(model: PreTrainedModel, padded: bool = True) -> dict[str, torch.Tensor]:
    """Of a batch of two, the second row left-padded; of Whisper features, which are never padded."""
    generator = torch.Generator().manual_seed(3)
    if hasattr(model.config, "num_mel_bins"):
        shape = (2, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        return {"input_features": torch.randn(shape, generator=generator)}
    tokens = torch.randint(3, VOCAB_SIZE, (2, 11), generator=generator)
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, :4] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def decoder_tokens(length: int = 14) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def logits_of(model: PreTrainedModel, padded: bool = True, **kwargs) -> torch.Tensor:
    wanted = {"decoder_input_ids": decoder_tokens(), "use_cache": False, **kwargs}
    return model(**encoder_inputs(model, padded), **wanted).logits


def sites_of(model: PreTrainedModel):
    """From hf_gqa: for tests of something else than of the sites."""
    family = load_family(model.config.model_type.removeprefix("gqa_"))
    return attention_sites(family.donor_layout, model.config)
