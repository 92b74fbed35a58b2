"""What a report says of each model, of their differences and of the machine, from what was measured."""

import math
import platform
from importlib.metadata import version

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from ..convert.cache_bytes import (
    cache_bytes_per_token_beyond_window,
    cache_bytes_per_token_computed,
    cache_bytes_per_token_measured,
    cached_heads,
    key_value_heads,
)
from .bootstrap import Bootstrap
from .memory import weight_bytes
from .quality import TokenScores
from .recipe import EvaluationRecipe
from .report import Differences, ModelFacts, Settings


def model_facts(
    model: PreTrainedModel, name: str, losses_N: np.ndarray, text_bytes: int, peak_memory_bytes: int | None
) -> ModelFacts:
    """Of one model, its losses on the text among them."""
    config, nats = model.config, float(losses_N.sum())
    cached = cached_heads(config)
    return ModelFacts(
        name=name,
        model_type=config.model_type,
        model_class=type(model).__name__,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=tuple(key_value_heads(config)),
        parameters=model.num_parameters(),
        weight_bytes=weight_bytes(model),
        loss_nats_per_token=nats / len(losses_N),
        perplexity=math.exp(nats / len(losses_N)),
        bits_per_byte=nats / math.log(2) / text_bytes,
        cache_bytes_per_token_computed=cache_bytes_per_token_computed(config, cached, model.dtype),
        cache_bytes_per_token_measured=cache_bytes_per_token_measured(model),
        cache_bytes_per_token_beyond_window=cache_bytes_per_token_beyond_window(config, cached, model.dtype),
        peak_memory_bytes=peak_memory_bytes,
    )


def differences(scores: TokenScores, text_bytes: int, bootstrap: Bootstrap) -> Differences:
    """Student against donor, drawn together by window."""
    tokens_W = scores.by_window(np.ones(len(scores)))
    loss_W = scores.by_window(scores.student_loss_N - scores.donor_loss_N)
    bits = len(scores) / math.log(2) / text_bytes
    return Differences(
        loss_nats_per_token=bootstrap.interval(loss_W, tokens_W),
        perplexity_ratio=bootstrap.interval(loss_W, tokens_W, np.exp),
        bits_per_byte=bootstrap.interval(loss_W, tokens_W, lambda nats: nats * bits),
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
