"""Tiny stock encoder-decoders and encoders with students that are perturbed copies of them, and their tokenizers."""

import copy
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_gqa.convert.donor import Donor
from hf_gqa.convert.model_kind import kind_of
from hf_gqa.evaluate import evaluation
from hf_gqa.evaluate.inputs.opened import Pair

from .tiny_tokenizer import LETTERS


SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>", "<mask>", "<s>")
VOCAB_SIZE = len(SPECIAL_TOKENS) + len(LETTERS)


def tokenizer_of_kind(kind: str, longest: int = 64) -> PreTrainedTokenizerFast:
    """Characters; with </s> behind a text for encoder-decoders, and <s> before it too for encoders."""
    vocabulary = {letter: number for number, letter in enumerate([*SPECIAL_TOKENS, *LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    single = "$A </s>" if kind == "seq2seq" else "<s> $A </s>"
    special = [(token, vocabulary[token]) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
    names |= {} if kind == "seq2seq" else {"bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=longest, **names)


def tiny_t5(seed: int = 0, **changes) -> T5ForConditionalGeneration:
    """Two decoder layers, three encoder layers, heads that are not hidden size over number."""
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return seeded(T5ForConditionalGeneration, T5Config(vocab_size=VOCAB_SIZE, **sizes, **special, **changes), seed)


def tiny_bart(seed: int = 0) -> BartForConditionalGeneration:
    stacks = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 80}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 4, "decoder_start_token_id": 1}
    config = BartConfig(vocab_size=VOCAB_SIZE, **stacks, **sizes, **special, forced_eos_token_id=1)
    return seeded(BartForConditionalGeneration, config, seed)


def tiny_bert(model_class: type[PreTrainedModel] = BertForMaskedLM, seed: int = 0) -> PreTrainedModel:
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=64, pad_token_id=0, **sizes)
    return seeded(model_class, config, seed)


def tiny_sentence_bert() -> BertModel:
    return tiny_bert(BertModel)


def seeded(model_class: type[PreTrainedModel], config, seed: int) -> PreTrainedModel:
    """Weights large enough for distributions that are not flat."""
    torch.manual_seed(seed)
    model = model_class(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def perturbed(model: PreTrainedModel, amount: float = 0.05) -> PreTrainedModel:
    """A copy with other key projections."""
    student, generator = copy.deepcopy(model), torch.Generator().manual_seed(7)
    for name, parameter in student.named_parameters():
        if name.endswith((".k.weight", "k_proj.weight", "key.weight")):
            parameter += amount * torch.randn(parameter.shape, generator=generator)
    return student


def as_pair(donor: PreTrainedModel, student: PreTrainedModel, tokenizer) -> Pair:
    """As `open_pair` gives it for a donor and a student on disk."""
    return Pair(
        opened_donor=SimpleNamespace(folder=Path("donor")),
        opened_student=SimpleNamespace(folder=Path("student"), manifest=None, tokenizer=tokenizer),
        student_name="student",
        donor=donor,
        student=student,
        notes=(),
        kind=kind_of(type(donor), donor.config),
    )


def evaluation_of(monkeypatch, pair: Pair, **recipe_fields) -> evaluation.Evaluation:
    """An evaluation of models in memory."""
    monkeypatch.setattr(evaluation, "open_pair", lambda *_: pair)
    monkeypatch.setattr(evaluation, "open_donor", lambda name: object.__new__(Donor))
    return evaluation.Evaluation("student", "donor", **recipe_fields)
