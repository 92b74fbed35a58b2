"""A number is said once among sentences that have nothing to do with it, and asked for at the end.

It measures whether one fact is found again in running text, whatever else was read since.

Source: Landmark Attention (Mohtashami and Jaggi 2023, arXiv 2305.16300), section 4.2, which asks for a pass key so.
"""

from itertools import accumulate, chain
from random import Random

from transformers import PreTrainedTokenizerBase

from . import Prompt, piece_ids, prefix_ids


SENTENCES = (
    " The river is low in summer and the boats stay on the sand.",
    " A baker opens his shop before the sun is up.",
    " In the garden there are roses, and a bench under an old tree.",
    " The children walk to school along the wall.",
    " Rain fell all night, and in the morning the road was wet.",
    " My brother reads the paper and drinks his coffee.",
    " From the hill one can see the harbour and the ships.",
    " The train comes late, but nobody is in a hurry.",
)


def passkey(
    tokenizer: PreTrainedTokenizerBase, context_tokens: int, depth_fraction: float, random: Random
) -> Prompt | None:
    answer = piece_ids(tokenizer, f" {random.randrange(10_000, 100_000)}")
    said = piece_ids(tokenizer, " The pass key is")
    needle = [*said, *answer, *piece_ids(tokenizer, ". Remember it.")]
    question = [*piece_ids(tokenizer, " What is the pass key?"), *said]
    prefix = prefix_ids(tokenizer)
    filler_tokens = context_tokens - len([*prefix, *needle, *question, *answer])
    if filler_tokens < 0:
        return None
    sentences = filler(tokenizer, filler_tokens, random)
    ends = [0, *accumulate(map(len, sentences))]
    depth = min(range(len(ends)), key=lambda place: abs(ends[place] - depth_fraction * filler_tokens))
    before, after = chain(*sentences[:depth]), chain(*sentences[depth:])
    return [*prefix, *before, *needle, *after, *question], answer


def filler(tokenizer: PreTrainedTokenizerBase, tokens: int, random: Random) -> list[list[int]]:
    """Sentences in random order, of `tokens` in all; the first lacks its beginning if it must."""
    sentences, found, size = [piece_ids(tokenizer, sentence) for sentence in SENTENCES], [], 0
    while size < tokens:
        found.insert(0, random.choice(sentences))
        size += len(found[0])
    return [found[0][size - tokens :], *found[1:]] if found else []


TASK = passkey
