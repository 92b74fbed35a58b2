"""Train adapters on what conversion left alone, and the converted projections in full.

Source: LoRA (Hu et al. 2021, arXiv 2106.09685); over four-bit weights, QLoRA (Dettmers et al. 2023, arXiv 2305.14314).
"""

import importlib.util
import re
import warnings
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel

from ..convert.layouts import layout_of
from ..convert.student import open_student
from ..refusal import Refusal


def lora_config(model: PreTrainedModel, rank: int = 16, seed: int = 0) -> LoraConfig:
    """For `get_peft_model`: key and value projections in full, adapters on attention's query and output projections.

    peft knows no default targets for model types of our own; the family says what they are called.

    Args:
        model: a student of a known family.
        rank: of the adapters.
        seed: of their initial values.

    Raises:
        Refusal: the family is unknown, its key and value projections are not separate, or several layers are one.
    """
    layout = layout_of(model.config.model_type, "lora")
    if layout.fused is not None:
        raise Refusal(
            f"lora: '{layout.model_type}' keeps queries, keys and values in one projection, '{layout.fused}', so the "
            f"converted part cannot be trained by itself. Convert with --export bundle, or train everything."
        )
    tied = getattr(model.base_model, "tied_layers", {})
    if tied:
        mine, theirs = next(iter(tied.items()))
        raise Refusal(
            f"lora: '{mine}' is '{theirs}', and each would get an adapter of its own, which cannot be merged into one weight. "
            f"Train everything, or attention."
        )
    if layout.transposed and getattr(model, "is_quantized", False):
        raise Refusal(
            f"lora: '{layout.model_type}' stores its projections the other way round (Conv1D), which four-bit adapters do not "
            f"merge with. Train adapters without --load-in-4bit."
        )
    torch.manual_seed(seed)
    # whole paths, for GPT-2 calls the output of its feed-forward layers c_proj too
    attention = re.escape(layout.attention).replace(re.escape("{layer_idx}"), r"\d+")
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=rf"(.*\.)?{attention}\.({re.escape(layout.query)}|{re.escape(layout.output)})",
        modules_to_save=[short.rpartition(".")[2] for short in (layout.key, layout.value)],
        fan_in_fan_out=layout.output in layout.transposed,
        task_type="CAUSAL_LM",
    )


def add_lora(model: PreTrainedModel, rank: int, seed: int = 0) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for an attribute by its old name
        warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)  # peft sets it right where GPT-2 needs it
        return get_peft_model(model, lora_config(model, rank, seed))


def in_four_bits(student: str | Path, dtype: torch.dtype) -> dict:
    """What `from_pretrained` takes to load a student in NF4, but for what is trained in full and for its head.

    Raises:
        Refusal: bitsandbytes is not installed, or the family is unknown.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Refusal("--load-in-4bit: needs bitsandbytes. Install it: pip install 'hf_gqa[qlora]'.")
    model_type = AutoConfig.from_pretrained(student).model_type
    layout = layout_of(model_type, "--load-in-4bit")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[layout.key, layout.value, "lm_head"],
    )
    return {"quantization_config": quantization, "device_map": {"": PartialState().device}}


def keep_gradients(model: torch.nn.Module) -> None:
    """On a CPU with bfloat16, bitsandbytes packs four-bit weights anew in an evaluation, and no gradient passes them then."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            module.state_dict()  # unpacks what was packed before


def merged_into_stored(student: Path, dtype: torch.dtype, adapted: PeftModel) -> PreTrainedModel:
    """The student on disk with the adapters, and what was trained in full, of its quantized twin; merging into that would round."""
    whole = open_student(student, dtype).model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in add_lora
        made = get_peft_model(whole, adapted.peft_config[adapted.active_adapter])
    set_peft_model_state_dict(made, get_peft_model_state_dict(adapted))
    return made.merge_and_unload()
