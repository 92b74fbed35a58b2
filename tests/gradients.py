"""Gradients by parameter, and checkpointing of what they need."""

import torch
from transformers import PreTrainedModel

from .tiny_donors import tokens_and_mask


def gradients(model: PreTrainedModel, **kwargs) -> dict[str, torch.Tensor]:
    """Of the language modelling loss, by parameter name; every parameter must have one."""
    model.zero_grad()
    tokens, mask = tokens_and_mask()
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)  # what padding computes is undefined, so it predicts nothing
    model(tokens, attention_mask=mask, labels=labels, **kwargs).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    return found


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Under its new name where there is one: the old one warns since transformers 5.23."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(**{enable.__name__.replace("_enable", "_kwargs"): {"use_reentrant": False}})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
