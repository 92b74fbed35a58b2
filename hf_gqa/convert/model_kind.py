"""What a model predicts, which decides how it is loaded, scored and described: text, targets, masked tokens, or nothing."""

from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)


CAUSAL_LM, SEQ2SEQ, MASKED_LM, ENCODER = "causal_lm", "seq2seq", "masked_lm", "encoder"
AUTO_CLASSES = {
    CAUSAL_LM: "AutoModelForCausalLM",
    SEQ2SEQ: "AutoModelForSeq2SeqLM",
    MASKED_LM: "AutoModelForMaskedLM",
    ENCODER: "AutoModel",
}


def kind_of(model_class: type[PreTrainedModel], config: PretrainedConfig) -> str | None:
    """The kind of a model, native or ours; None if it predicts no tokens and is no encoder of text either.

    An encoder is what also comes with a head for masked tokens; whatever other head it has is not looked at.
    """
    name, model_type = model_class.__name__, config.model_type.removeprefix("gqa_")
    if model_type in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES:
        return None
    if getattr(config, "is_encoder_decoder", False):
        native = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.get(model_type)
        return SEQ2SEQ if name == native or name.endswith("ForSeq2SeqLM") else None
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return CAUSAL_LM
    if name.endswith("ForMaskedLM"):
        return MASKED_LM
    return ENCODER if any(c in MODEL_FOR_MASKED_LM_MAPPING for c in type(config).__mro__[:-1]) else None


def why_no_kind(model_class: type[PreTrainedModel], config: PretrainedConfig) -> str:
    """For a model that `kind_of` knows nothing of."""
    if config.model_type.removeprefix("gqa_") in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES:
        return f"is a {model_class.__name__}, which reads sound, and only text is evaluated"
    return f"is a {model_class.__name__}, which predicts no tokens"
