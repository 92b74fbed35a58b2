"""What cannot be asked of an encoder-decoder, and what its native class would do without a word."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    BartForCausalLM,
    T5EncoderModel,
    WhisperConfig,
    WhisperForAudioClassification,
    WhisperForConditionalGeneration,
)

from hf_gqa import ConversionPlan, Refusal, convert
from hf_gqa.runtime.modeling_gqa_t5 import GQAT5Config
from hf_gqa.runtime.modeling_gqa_whisper import GQAWhisperConfig

from .seq2seq_conformance import assert_close, assert_same_logits, every_family, overwrite_groups
from .seq2seq_donors import NUM_ATTENTION_HEADS, logits_of, randomised, seq2seq_config, seq2seq_donor
from .tiny_donors import tiny_donor


@pytest.mark.parametrize(
    "part, model_type",
    [(T5EncoderModel, "t5"), (BartForCausalLM, "bart"), (WhisperForAudioClassification, "whisper")],
)
@pytest.mark.parametrize("heads", [NUM_ATTENTION_HEADS, 2])
def test_part_of_an_encoder_decoder_is_refused(part, model_type, heads):
    config = seq2seq_config(model_type)
    with pytest.raises(Refusal, match=rf"{part.__name__} is a part of a '{model_type}' and has no .* Use a donor of"):
        convert(randomised(part(config)), num_key_value_heads=heads)


def test_encoder_of_a_decoder_is_refused():
    with pytest.raises(Refusal, match=r"^convert_encoder: donor '.*' has no encoder .* Leave --convert-encoder out\.$"):
        convert(tiny_donor("llama"), num_key_value_heads=2, convert_encoder=True)
    with pytest.raises(Refusal, match=r"^convert_encoder = 'yes' is not true or false\. Use one of these\.$"):
        ConversionPlan(num_key_value_heads=2, convert_encoder="yes")


@every_family
def test_what_the_decoder_has_not_is_refused(model_type):
    donor = seq2seq_donor(model_type)
    with pytest.raises(Refusal, match=r"num_key_value_heads = 3 does not divide num_attention_heads = 4 "):
        convert(donor, num_key_value_heads=3)
    with pytest.raises(Refusal, match=r"num_key_value_heads = 8 is more than the 4 KV heads"):
        convert(donor, num_key_value_heads=8)
    with pytest.raises(
        Refusal, match=rf"export = native: a native {model_type} has as many KV heads as query heads\. "
    ):
        convert(donor, num_key_value_heads=2, export="native")


def test_encoder_with_other_heads_is_checked_by_its_own():
    donor = seq2seq_donor("bart", encoder_attention_heads=2)
    student = convert(donor, num_key_value_heads=4, method="mean_pool")
    assert type(student) is type(donor)
    assert [row["num_key_value_heads"] for row in convert(donor, num_key_value_heads=1).config.layer_plan] == [
        *[1] * 4,
        *[2] * 2,
    ]
    with pytest.raises(Refusal, match=r"num_key_value_heads = 4 is more than the 2 KV heads"):
        convert(donor, num_key_value_heads=4, convert_encoder=True)


def test_layers_that_share_are_refused():
    with pytest.raises(Refusal, match=r"in a t5, which has an encoder, layers cannot share\. Give num_key_value_heads"):
        convert(seq2seq_donor("t5"), num_key_value_heads=2, sharing="cross_layer_kv", share_every=2)


def test_calibration_is_refused():
    rows = torch.randint(3, 99, (4, 8))
    with pytest.raises(Refusal, match=r"^calibration: '.*' is an encoder-decoder, whose cross-attention reads pairs"):
        convert(seq2seq_donor("t5"), num_key_value_heads=2, method="fold", calibration=rows)


def test_method_that_must_see_text_is_refused():
    with pytest.raises(
        Refusal, match=r"method = mean_pool,refit: 'refit' watches the student read text, .* no t5 that way\."
    ):
        convert(seq2seq_donor("t5"), num_key_value_heads=2, method="mean_pool,refit")


def test_table_that_does_not_fit_is_refused():
    shape = seq2seq_config("t5").to_dict()
    for unwanted in ("model_type", "architectures", "transformers_version"):
        shape.pop(unwanted, None)
    with pytest.raises(StrictDataclassError, match=r"layer_plan: 2 rows for 6 attentions\. Give one row each\."):
        GQAT5Config(**shape, layer_plan=[{"num_key_value_heads": 2}] * 2)
    rows = [{"num_key_value_heads": 4}] * 5 + [{"num_key_value_heads": 3}]
    with pytest.raises(
        StrictDataclassError, match=r"row of encoder\.block\.1\.layer\.0\.SelfAttention: .*3 does not divide its 4"
    ):
        GQAT5Config(**shape, layer_plan=rows)


def test_number_of_key_value_heads_of_whisper_is_another_word_for_encoder_heads():
    """Why our configuration has rows and no such number: setting it would change the encoder."""
    assert WhisperConfig.attribute_map["num_key_value_heads"] == "encoder_attention_heads"
    student = convert(seq2seq_donor("whisper"), num_key_value_heads=1)
    assert isinstance(student.config, GQAWhisperConfig)
    assert student.config.encoder_attention_heads == NUM_ATTENTION_HEADS


class Shrunken(WhisperForConditionalGeneration):
    """The naive way: the native class, its key and value projections replaced by smaller ones."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.decoder.layers:
            for attention in (layer.self_attn, layer.encoder_attn):
                for name in ("k_proj", "v_proj"):
                    donor = getattr(attention, name)
                    smaller = nn.Linear(donor.in_features, donor.out_features // 2, bias=donor.bias is not None)
                    setattr(attention, name, smaller)


def test_native_whisper_with_fewer_heads_is_silently_wrong_and_the_oracle_sees_it():
    """Its forward folds keys of half the heads into half the tokens: shapes fit again, and nothing complains."""
    donor = seq2seq_donor("whisper")
    student = convert(donor, num_key_value_heads=2)
    naive = Shrunken(copy.deepcopy(donor.config)).eval()
    naive.load_state_dict(student.state_dict())
    overwrite_groups(donor, 2)
    assert_same_logits(student, donor, "whisper")
    for model in (naive, donor):
        model.set_attn_implementation("sdpa")
    wrong, right = logits_of(naive), logits_of(donor)
    assert wrong.shape == right.shape and wrong.isfinite().all(), "no error, no NaN"
    with pytest.raises(AssertionError, match="not close"):
        assert_close(wrong, right)
