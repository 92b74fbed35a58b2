"""A list of numbers, each with its value; the value of one of them is asked for.

It measures whether the right one of many like facts is found, as the whole context consists of others that could be meant.

Source: Lost in the Middle (Liu et al. 2023, arXiv 2307.03172), section 3, key-value retrieval, there with UUIDs in JSON.
"""

from random import Random

from transformers import PreTrainedTokenizerBase

from . import Prompt, piece_ids, prefix_ids


FEWEST_PAIRS = 2


def key_value(
    tokenizer: PreTrainedTokenizerBase, context_tokens: int, depth_fraction: float, random: Random
) -> Prompt | None:
    prefix, pairs = prefix_ids(tokenizer), new_pairs(tokenizer, context_tokens, random)
    sizes = [len(key) + len(value) for key, value in pairs]
    cut, room = 0, context_tokens - len(prefix) - max(sizes)
    left = sum(sizes)
    while left > room and cut < len(pairs):
        left -= sizes[cut]
        cut += 1
    whole = pairs[cut:]
    if len(whole) < FEWEST_PAIRS:
        return None
    question, answer = whole[round(depth_fraction * (len(whole) - 1))]
    said = [token for pair in pairs for part in pair for token in part]
    room = context_tokens - len([*prefix, *question, *answer])
    return [*prefix, *said[len(said) - room :], *question], answer  # what is left of a pair that was cut fills the room


def new_pairs(tokenizer: PreTrainedTokenizerBase, tokens: int, random: Random) -> list[tuple[list[int], list[int]]]:
    """(key, value) pairs of `tokens` or a few more in all; no key twice."""
    pairs, keys, size = [], set(), 0
    while size < tokens:
        key, value = random.randrange(100_000, 1_000_000), random.randrange(1000, 10_000)
        if key not in keys:
            keys.add(key)
            pairs.append((piece_ids(tokenizer, f"\n{key}:"), piece_ids(tokenizer, f" {value}")))
            size += len(pairs[-1][0]) + len(pairs[-1][1])
    return pairs


TASK = key_value
