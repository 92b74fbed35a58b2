"""What a report says of each model, of their differences and of the machine, from what was measured."""

import math
import platform
from dataclasses import asdict
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
from ..inputs.documents import Documents
from ..inputs.seq2seq_pairs import Seq2SeqText
from ..quality.bootstrap import FEWEST_GROUPS, Bootstrap
from ..quality.token_scores import TokenScores
from ..recipe import EvaluationRecipe
from ..report import Differences, ModelFacts, Settings, TextFacts
from .measured import Asked, CacheBytes, LayerHeads, Losses, MeasuredModel, MeasuredParts


def model_facts(
    model: PreTrainedModel, name: str, peak_memory_bytes: int | None, measured: MeasuredModel
) -> ModelFacts:
    """Of one model."""
    config = model.config
    heads = measured.heads or LayerHeads(
        num_hidden_layers=config.num_hidden_layers, num_key_value_heads=tuple(key_value_heads(config))
    )
    return ModelFacts(
        name=name,
        model_type=config.model_type,
        model_class=type(model).__name__,
        num_attention_heads=config.num_attention_heads,
        parameters=model.num_parameters(),
        weight_bytes=weight_bytes(model),
        peak_memory_bytes=peak_memory_bytes,
        **asdict(heads),
        **asdict(measured.losses),
        **asdict(measured.cache),
    )


def losses_of(losses_N: np.ndarray, text_bytes: int | None) -> Losses:
    """Of a model on the text; without `text_bytes` no bits per byte."""
    nats = float(losses_N.sum())
    return Losses(
        loss_nats_per_token=nats / len(losses_N),
        perplexity=math.exp(nats / len(losses_N)),
        bits_per_byte=nats / math.log(2) / text_bytes if text_bytes else None,
    )


def cache_of(model: PreTrainedModel) -> CacheBytes:
    """Of a decoder-only model."""
    config, heads = model.config, cached_heads(model.config)
    return CacheBytes(
        cache_bytes_per_token_computed=cache_bytes_per_token_computed(config, heads, model.dtype),
        cache_bytes_per_token_measured=cache_bytes_per_token_measured(model),
        cache_bytes_per_token_beyond_window=cache_bytes_per_token_beyond_window(config, heads, model.dtype),
    )


def compared(scores: TokenScores, text_bytes: int | None, bootstrap: Bootstrap) -> MeasuredParts:
    """How far donor and student are apart on the text."""
    return MeasuredParts(
        kl_nats_per_token=float(scores.kl_N.mean()),
        top1_agreement_fraction=float(scores.agrees_N.mean()),
        differences=differences(scores, text_bytes, bootstrap),
    )


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


def text_facts(
    asked: Asked,
    recipe: EvaluationRecipe,
    text: Documents | Seq2SeqText,
    *,
    documents: int,
    tokens: int,
    windows: int,
    longest_context_tokens: int | None,
    **of_a_kind,
) -> TextFacts:
    """Of what was read by a recipe whose sizes are resolved; `of_a_kind` are fields that other kinds leave open."""
    return TextFacts(
        sources=recipe.text or (recipe.dataset_name or f"sampled from {asked.donor_name}",),
        fingerprint=text.fingerprint,
        documents=documents,
        tokens=tokens,
        text_bytes=text.text_bytes,
        windows=windows,
        context_tokens=recipe.context_length,
        stride_tokens=recipe.stride,
        longest_context_tokens=longest_context_tokens,
        **of_a_kind,
    )


def notes_on_windows(windows: int, context_tokens: int, longest_context_tokens: int | None) -> list[str]:
    """Where they are too few for intervals, or shorter than what the models take."""
    notes = []
    if windows < FEWEST_GROUPS:
        notes.append(
            f"The text has {windows} windows; intervals need {FEWEST_GROUPS}. Give more text, or a shorter context_length."
        )
    if longest_context_tokens is not None and longest_context_tokens > context_tokens:
        notes.append(
            f"The models take {longest_context_tokens:,} tokens; what happens beyond {context_tokens:,} was not measured."
        )
    return notes


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
