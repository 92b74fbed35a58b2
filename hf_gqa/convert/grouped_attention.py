"""Give a loaded model, native or ours, the attention that keeps its few KV heads few."""

from transformers import PreTrainedModel

from ..refusal import Refusal
from ..runtime.grouped_attention import NAME


def use_grouped_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Let every attention layer of `model` use `grouped_sdpa`, in place; `model.set_attn_implementation("sdpa")` undoes it.

    Nothing of it is saved: checkpoints load as before. Also for models that transformers keeps from `sdpa` because
    that knows no softcap and no attention sinks (Gemma 2, GPT-OSS): `grouped_sdpa` computes both.

    Raises:
        Refusal: the model does not call its attention through transformers' AttentionInterface.
    """
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    kept_from_sdpa = [module for module in models if not module._supports_sdpa and module._supports_attention_backend]
    try:
        for module in kept_from_sdpa:
            module._supports_sdpa = True  # on this object and only during the call: stock sdpa would drop the sinks
        model.set_attn_implementation(NAME)
    except ValueError as error:
        raise Refusal(f"{type(model).__name__}: cannot use {NAME} ({error}). Leave its attention as it is.") from error
    finally:
        for module in kept_from_sdpa:
            del module._supports_sdpa
    left = sorted({type(module).__name__ for module in models if module.config._attn_implementation != NAME})
    if left:
        raise Refusal(
            f"{type(model).__name__}: {', '.join(left)} cannot be given {NAME}, for the code does not call its attention "
            f"through transformers' AttentionInterface. Leave its attention as it is."
        )
    return model
