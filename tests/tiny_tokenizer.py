"""Tokenizers of single characters."""

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


SPACE = "\u2581"
LETTERS = [*".:\n?,", SPACE, *map(chr, range(48, 58)), *map(chr, range(65, 91)), *map(chr, range(97, 123))]


def letter_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {letter: number for number, letter in enumerate(["<s>", "<unk>", *LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@functools.cache
def letters(bos: bool = True, eos: bool = True, same: bool = False) -> PreTrainedTokenizerFast:
    """One token per character: a is 4, b is 5, ...; BOS is 1, EOS 2, or both are 1."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "\n": 3} | {chr(97 + n): 4 + n for n in range(26)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    end = "<s>" if same else "</s>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token=end if eos else None,
        model_max_length=8,
    )
