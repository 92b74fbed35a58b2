"""Random tokens, some of which are said again and must be continued as they were the first time.

It measures copying by itself (an induction head: find where this was said, say what came next), so that it works for models
of any size and language: no words have to be understood.

Source: In-context Learning and Induction Heads (Olsson et al. 2022, arXiv 2209.11895), where repeated random tokens show them.
"""

from random import Random

from transformers import PreTrainedTokenizerBase

from . import Prompt, prefix_ids


CUE_TOKENS, ANSWER_TOKENS = 8, 4


def repeated_tokens(
    tokenizer: PreTrainedTokenizerBase, context_tokens: int, depth_fraction: float, random: Random
) -> Prompt | None:
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    sequence_tokens = CUE_TOKENS + ANSWER_TOKENS
    prefix = prefix_ids(tokenizer)
    filler_tokens = context_tokens - len(prefix) - 2 * sequence_tokens
    if filler_tokens < 0 or len(tokenizer) - len(special) < 2 * sequence_tokens:
        return None
    sequence: list[int] = []
    while len(sequence) < sequence_tokens:
        sequence.append(drawn(tokenizer, {*special, *sequence}, random))
    elsewhere = {*special, *sequence}  # the cue is then said nowhere else, not even in part
    filler = [drawn(tokenizer, elsewhere, random) for _ in range(filler_tokens)]
    before = round(depth_fraction * filler_tokens)
    cue, answer = sequence[:CUE_TOKENS], sequence[CUE_TOKENS:]
    return [*prefix, *filler[:before], *sequence, *filler[before:], *cue], answer


def drawn(tokenizer: PreTrainedTokenizerBase, avoided: set[int], random: Random) -> int:
    while (token := random.randrange(len(tokenizer))) in avoided:
        pass
    return token


TASK = repeated_tokens
