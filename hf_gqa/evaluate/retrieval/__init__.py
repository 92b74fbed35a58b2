"""Recall tasks, one file each; the file's name is the task's name.

A file defines `TASK`, a `Task`: a function that writes one prompt. All its randomness comes from the generator it is given,
so that a prompt depends on nothing else.
"""

from collections.abc import Callable
from random import Random

from transformers import PreTrainedTokenizerBase

from ...registry import Registry
from ..inputs.windows import prefix_token, token_ids


RETRIEVAL = Registry(__name__, "recall task", "TASK")

Prompt = tuple[list[int], list[int]]
"""(context, answer): token ids that are read, and those that must follow."""

Task = Callable[[PreTrainedTokenizerBase, int, float, Random], Prompt | None]
"""(tokenizer, context_tokens, depth_fraction, random) -> a prompt of exactly `context_tokens` with its answer.

What is asked for stands at `depth_fraction` of the context, from 0 (its beginning) to 1 (its end). None: it does not fit.
"""


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before every text; nothing for tokenizers without such a token."""
    prefix = prefix_token(tokenizer)
    return [] if prefix is None else [prefix]


def piece_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Of `text` in the middle of a text: alone, some tokenizers put a space before its first word."""
    before, both = token_ids(tokenizer, "."), token_ids(tokenizer, "." + text)
    return both[len(before) :] if both[: len(before)] == before else token_ids(tokenizer, text)
