"""Train adapters on what conversion left alone, and the converted projections in full. Source: LoRA, arXiv 2106.09685."""

import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from ..convert.layouts import layout_of
from ..refusal import Refusal


def lora_config(model: PreTrainedModel, rank: int = 16, seed: int = 0) -> LoraConfig:
    """For `get_peft_model`: key and value projections in full, adapters on attention's query and output projections.

    peft knows no default targets for model types of our own; the family says what they are called.

    Args:
        model: a student of a known family.
        rank: of the adapters.
        seed: of their initial values.

    Raises:
        Refusal: the family is unknown, or its key and value projections are not separate.
    """
    layout = layout_of(model.config.model_type, "lora")
    if layout.fused is not None:
        raise Refusal(
            f"lora: '{layout.model_type}' keeps queries, keys and values in one projection, '{layout.fused}', so the "
            f"converted part cannot be trained by itself. Convert with --export bundle, or train everything."
        )
    torch.manual_seed(seed)
    names = {short: short.rpartition(".")[2] for short in (layout.query, layout.key, layout.value, layout.output)}
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=[names[layout.query], names[layout.output]],
        modules_to_save=[names[layout.key], names[layout.value]],
        fan_in_fan_out=layout.output in layout.transposed,
        task_type="CAUSAL_LM",
    )


def add_lora(model: PreTrainedModel, rank: int, seed: int = 0) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an attribute by its old name
        warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)  # peft sets it right where GPT-2 needs it
        return get_peft_model(model, lora_config(model, rank, seed))
