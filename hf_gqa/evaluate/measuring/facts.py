"""What a report says of each model, of their differences and of the machine, from what was measured."""

import math
import platform
from dataclasses import fields
from importlib.metadata import version

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from ...convert.cache_bytes import (
    cache_bytes_per_token_beyond_window,
    cache_bytes_per_token_computed,
    cache_bytes_per_token_measured,
    cached_heads,
    key_value_heads,
)
from ..cost.memory import weight_bytes
from ..quality.bootstrap import Bootstrap
from ..quality.token_scores import TokenScores
from ..recipe import EvaluationRecipe
from ..report import Differences, ModelFacts, Settings


def model_facts(model: PreTrainedModel, name: str, peak_memory_bytes: int | None, **measured) -> ModelFacts:
    """Of one model; `measured` are the fields that its kind of evaluation fills."""
    config = model.config
    facts = {
        "name": name,
        "model_type": config.model_type,
        "model_class": type(model).__name__,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": tuple(key_value_heads(config)),
        "parameters": model.num_parameters(),
        "weight_bytes": weight_bytes(model),
        "peak_memory_bytes": peak_memory_bytes,
        "loss_nats_per_token": None,
        "perplexity": None,
        "bits_per_byte": None,
        "cache_bytes_per_token_computed": None,
        "cache_bytes_per_token_measured": None,
        "cache_bytes_per_token_beyond_window": None,
    }
    return ModelFacts(**facts | measured)


def loss_facts(losses_N: np.ndarray, text_bytes: int | None) -> dict:
    """Fields of `ModelFacts`: a model's losses on the text; without `text_bytes` no bits per byte."""
    nats = float(losses_N.sum())
    return {
        "loss_nats_per_token": nats / len(losses_N),
        "perplexity": math.exp(nats / len(losses_N)),
        "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else None,
    }


def cache_facts(model: PreTrainedModel) -> dict:
    """Fields of `ModelFacts`: the cache of a decoder-only model."""
    config, heads = model.config, cached_heads(model.config)
    return {
        "cache_bytes_per_token_computed": cache_bytes_per_token_computed(config, heads, model.dtype),
        "cache_bytes_per_token_measured": cache_bytes_per_token_measured(model),
        "cache_bytes_per_token_beyond_window": cache_bytes_per_token_beyond_window(config, heads, model.dtype),
    }


NO_DIFFERENCES = Differences(**dict.fromkeys(field.name for field in fields(Differences)))


def differences(scores: TokenScores, text_bytes: int | None, bootstrap: Bootstrap) -> Differences:
    """Student against donor, drawn together by window; without `text_bytes` no bits per byte."""
    tokens_W = scores.by_window(np.ones(len(scores)))
    loss_W = scores.by_window(scores.student_loss_N - scores.donor_loss_N)
    bits = len(scores) / math.log(2) / text_bytes if text_bytes else None
    return Differences(
        loss_nats_per_token=bootstrap.interval(loss_W, tokens_W),
        perplexity_ratio=bootstrap.interval(loss_W, tokens_W, np.exp),
        bits_per_byte=bootstrap.interval(loss_W, tokens_W, lambda nats: nats * bits) if bits else None,
        kl_nats_per_token=bootstrap.interval(scores.by_window(scores.kl_N), tokens_W),
        top1_agreement_fraction=bootstrap.interval(scores.by_window(scores.agrees_N), tokens_W),
    )


def settings(recipe: EvaluationRecipe, model: PreTrainedModel) -> Settings:
    """Of this machine, and of the recipe whose sizes are resolved."""
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return Settings(
        device=str(device),
        device_name=name,
        dtype=str(model.dtype).removeprefix("torch."),
        batch_size=recipe.batch_size,
        attn_implementation=str(model.config._attn_implementation),
        threads=torch.get_num_threads(),
        seed=recipe.seed,
        confidence_fraction=recipe.confidence,
        resamples=recipe.resamples,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf_gqa": version("hf_gqa"),
        },
    )
