"""Long texts as windows that a model can read, in which every token is predicted exactly once."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Tokens to read, each of which predicts the next.

    Args:
        tokens: what is read, and after it the last token that is predicted.
        scored: predictions that count, the last ones; those before them were counted in an earlier window.
    """

    tokens: tuple[int, ...]
    scored: int

    @property
    def contexts(self) -> range:
        """How many tokens stand before each scored one."""
        predictions = len(self.tokens) - 1
        return range(predictions - self.scored + 1, predictions + 1)


def windows_of(tokens: list[int], prefix: int | None, context_tokens: int, stride_tokens: int) -> Iterator[Window]:
    """Each window scores `stride_tokens` more tokens (the first as many as it holds), with all the context that fits.

    Args:
        tokens: of one document.
        prefix: token before the first, so that it is predicted too; None: the first token is only read.
        context_tokens: most tokens to read at once.
        stride_tokens: at most `context_tokens`, which reads everything once.
    """
    whole = tokens if prefix is None else [prefix, *tokens]
    end = 0
    while end < len(whole) - 1:
        before, end = end, min(len(whole) - 1, end + stride_tokens if end else context_tokens)
        begin = max(0, end - context_tokens)
        yield Window(tokens=tuple(whole[begin : end + 1]), scored=end - before)


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What stands before a document: the beginning of a sequence, or else the end of the one before."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Of the text alone, without special tokens around it."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def batches(windows: Iterable[Window], batch_size: int, at_once: int = 4096) -> Iterator[list[tuple[int, Window]]]:
    """(number, window) of windows of like length, so that little is padded; the longest of each `at_once` first."""
    numbered = enumerate(windows)
    while part := sorted(islice(numbered, at_once), key=lambda pair: -len(pair[1].tokens)):
        for begin in range(0, len(part), batch_size):
            yield part[begin : begin + batch_size]
