"""Which layers may borrow from which, and the rows of text that they are compared on."""

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..convert.donor import Donor
from ..refusal import Refusal
from ..text.packing import packed_rows
from ..text.source import TextSource, open_documents
from .recipe import AnalysisRecipe


PAPER_SAMPLE_TOKENS = 512


def check_donor(donor: Donor) -> None:
    """Refuse what predicts no next token, and layers that share already."""
    if not donor.model_class.__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise Refusal(
            f"{donor.name}: is a {donor.model_class.__name__}, which predicts no next tokens, so there is no output to "
            f"compare. Analyze a causal language model."
        )
    sharing = [n for n, row in enumerate(getattr(donor.config, "layer_plan", None) or []) if len(row) > 1]
    if sharing:
        raise Refusal(f"{donor.name}: its layer {sharing[0]} borrows from another already. Analyze its donor.")


def layer_kinds(donor: Donor) -> tuple[str, ...]:
    """Of each layer: how it attends, and its KV heads. Only layers of one kind share."""
    types = getattr(donor.config, "layer_types", None) or ["attention"] * donor.config.num_hidden_layers
    return tuple(f"{kind}, {heads} KV heads" for kind, heads in zip(types, donor.num_key_value_heads, strict=True))


def candidate_pairs(kinds: tuple[str, ...], reach: int | None, where: str) -> list[tuple[int, int]]:
    """(borrower, owner) of every two layers of one kind, at most `reach` layers apart.

    Raises:
        Refusal: there are none.
    """
    pairs = [
        (borrower, owner)
        for borrower in range(len(kinds))
        for owner in range(max(0, borrower - (reach or borrower)), borrower)
        if kinds[owner] == kinds[borrower]
    ]
    if not pairs:
        within = "" if reach is None else f" within reach = {reach}"
        raise Refusal(
            f"{where}: none of its {len(kinds)} layers has an earlier one of its kind to borrow from{within} "
            f"({'; '.join(kinds)}). Analyze a donor with more layers, or with a longer --reach."
        )
    return pairs


def resolved_sample_tokens(donor: Donor, asked: int | None) -> int:
    """The paper's 512, or the longest that the donor takes, unless another length is asked for."""
    longest = donor.longest_tokens
    if asked is not None and longest is not None and asked > longest:
        raise Refusal(
            f"sample_tokens = {asked:,}: '{donor.name}' has positions for {longest:,} tokens. Use {longest:,} or fewer."
        )
    return asked or min(PAPER_SAMPLE_TOKENS, longest or PAPER_SAMPLE_TOKENS)


def rows_of_text(recipe: AnalysisRecipe, tokenizer: PreTrainedTokenizerBase, length: int, wanted: int) -> torch.Tensor:
    """Rows `[N, T]` from all over the text; an even number, at most `wanted`.

    Raises:
        Refusal: unreadable text, or less of it than two rows.
    """
    try:
        documents = open_documents(TextSource(train_file=recipe.text, text_column=recipe.text_column), tokenizer)
    except Refusal as error:
        raise Refusal(str(error).replace("train_file", "--text")) from None
    where, advice = ", ".join(recipe.text), "Give more text, or a shorter --sample-tokens."
    try:
        rows = packed_rows(documents, tokenizer, length, attend_across_documents=True)
    except Refusal:
        raise Refusal(f"{where}: holds less than one sample of {length:,} tokens. {advice}") from None
    if len(rows) < 2:
        raise Refusal(
            f"{where}: holds one sample of {length:,} tokens, and choosing and checking need one each. {advice}"
        )
    count = min(wanted, len(rows) // 2 * 2)
    picked = np.linspace(0, len(rows) - 1, count).round().astype(int).tolist()
    return torch.from_numpy(np.stack([rows[row]["input_ids"] for row in picked])).long()
