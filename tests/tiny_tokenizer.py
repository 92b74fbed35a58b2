"""A tokenizer of single characters, which puts a space before every text as sentencepiece does."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


SPACE = "\u2581"
LETTERS = [*".:\n?,", SPACE, *map(chr, range(48, 58)), *map(chr, range(65, 91)), *map(chr, range(97, 123))]


def letter_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {letter: number for number, letter in enumerate(["<s>", "<unk>", *LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
