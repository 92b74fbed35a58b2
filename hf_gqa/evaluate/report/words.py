"""What the parts of a report are called for each kind of model."""

from dataclasses import dataclass

from ...convert.model_kind import CAUSAL_LM, ENCODER, MASKED_LM, SEQ2SEQ
from .values import Report


@dataclass(frozen=True, slots=True, kw_only=True)
class KindWords:
    """Words for one kind.

    Args:
        loss, perplexity: the names of these numbers.
        agreement, same_token: where both find the same token likeliest, in a sentence and in a table.
        context: what the length in a table of speeds is the length of.
        continuations, prompt: headings of the texts side by side.
        tokens: what `TextFacts.tokens` counts.
        drawn: what the bootstrap draws.
        task, pipeline: how the Hub calls what the model does.
    """

    loss: str = "loss, nats per token"
    perplexity: str = "perplexity"
    agreement: str = "both expect the same next token"
    same_token: str = "same likeliest next token"
    context: str = "context"
    continuations: str = "What they write"
    prompt: str = "Prompt"
    tokens: str = "tokens, each scored once"
    drawn: str = "windows"
    task: str = "text-generation"
    pipeline: str | None = "text-generation"


WORDS = {
    CAUSAL_LM: KindWords(),
    SEQ2SEQ: KindWords(
        loss="loss of the targets, nats per token",
        context="source",
        continuations="What they write for a source",
        prompt="Source",
        tokens="tokens of the targets, each scored once",
        drawn="pairs",
        task="text2text-generation",
        pipeline=None,
    ),
    MASKED_LM: KindWords(
        loss="loss of masked tokens, nats per token",
        perplexity="its exponential",
        agreement="both guess the same token",
        same_token="same guess",
        tokens="masked tokens, each guessed once",
        context="length",
        task="fill-mask",
        pipeline="fill-mask",
    ),
    ENCODER: KindWords(context="length", tokens="tokens", task="feature-extraction", pipeline="feature-extraction"),
}


def words_of(report: Report) -> KindWords:
    return WORDS[report.kind]
