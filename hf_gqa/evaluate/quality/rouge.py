"""What an encoder-decoder writes, held against the references: ROUGE of donor and student, and samples side by side."""

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...refusal import Refusal
from ...text.pairs import TextPair
from ..inputs.padding import evenly_spread, padded
from ..inputs.seq2seq_pairs import Seq2SeqText
from ..report import Continuation, Rouge
from .bootstrap import Bootstrap


METRICS = ("rouge1", "rouge2", "rougeL")
SAMPLES = 3
WORD = re.compile(r"[a-z0-9]")


def check_rouge() -> None:
    """Raises Refusal where the package is missing, before anything else has been computed."""
    try:
        import rouge_score.rouge_scorer  # noqa: F401
    except ImportError as error:
        raise Refusal(
            f"rouge: rouge-score cannot be imported ({error}). Run pip install 'hf_gqa[eval]', or give --rouge-pairs 0."
        ) from None


@torch.inference_mode()
def written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Sequence[int]],
    *,
    num_beams: int,
    most_tokens: int,
    batch_size: int,
    seen: Callable[[int], object] = lambda pairs: None,
) -> list[str]:
    """What the model writes for each source, without sampling; in the order of the sources.

    Whatever else its generation settings say (forced tokens, lengths, repetitions) holds.
    """
    texts = [""] * len(sources)
    ordered = sorted(range(len(sources)), key=lambda number: -len(sources[number]))
    for begin in range(0, len(ordered), batch_size):
        batch = ordered[begin : begin + batch_size]
        ids_BS, mask_BS = padded([sources[number] for number in batch], tokenizer.pad_token_id or 0)
        answers = model.generate(
            input_ids=ids_BS.to(model.device),
            attention_mask=mask_BS.to(model.device),
            max_new_tokens=most_tokens,
            num_beams=num_beams,
            do_sample=False,
        )
        for number, text in zip(batch, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True):
            texts[number] = text.strip()
        seen(len(batch))
    return texts


def rouge(
    pairs: Sequence[TextPair],
    donor_texts: Sequence[str],
    student_texts: Sequence[str],
    *,
    num_beams: int,
    most_tokens: int,
    bootstrap: Bootstrap,
) -> tuple[Rouge, ...]:
    """Mean F1 of each metric over the pairs; of several references the one that fits best counts."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(METRICS, use_stemmer=True)

    def fractions(texts: Sequence[str]) -> dict[str, np.ndarray]:
        scored = [scorer.score_multi(pair.references, text) for pair, text in zip(pairs, texts, strict=True)]
        return {metric: np.array([one[metric].fmeasure for one in scored]) for metric in METRICS}

    theirs, ours = fractions(donor_texts), fractions(student_texts)
    return tuple(
        Rouge(
            metric=metric,
            pairs=len(pairs),
            num_beams=num_beams,
            most_tokens=most_tokens,
            donor_fraction=float(theirs[metric].mean()),
            student_fraction=float(ours[metric].mean()),
            difference=bootstrap.interval(ours[metric] - theirs[metric], np.ones(len(pairs))),
        )
        for metric in METRICS
    )


def without_words(pairs: Sequence[TextPair]) -> int:
    """References that hold nothing that rouge-score reads: it knows Latin letters without accents, and digits."""
    return sum(not WORD.search(reference.lower()) for pair in pairs for reference in pair.references)


def sources_of(text: Seq2SeqText, chosen: Sequence[int]) -> list[tuple[int, ...]]:
    found = {row.pair: row.source_ids for row in text.rows}
    return [found[number] for number in chosen]


def samples(
    pairs: Sequence[TextPair], donor_texts: Sequence[str], student_texts: Sequence[str], converted_texts: Sequence[str]
) -> tuple[Continuation, ...]:
    """Some of what was written, beside the reference."""
    return tuple(
        Continuation(
            prompt=pairs[number].source,
            donor=donor_texts[number],
            student=student_texts[number],
            converted=converted_texts[number] if converted_texts else None,
            reference=pairs[number].references[0],
        )
        for number in evenly_spread(len(pairs), SAMPLES)
    )
