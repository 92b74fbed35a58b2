"""What a conversion cost and what it bought: the values that `report.json` holds, with their units in their names."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ...convert.model_kind import AUTO_CLASSES, CAUSAL_LM
from ...reading import read_json
from ...refusal import Refusal
from .from_json import value_of


FORMAT = 1
REPORT_FILE, PAGE_FILE = "report.json", "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value and its bootstrap interval.

    Args:
        value: the estimate from all samples.
        low, high: ends of the interval, in the unit of the value.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """One of the two models.

    Args:
        name: what the user called it.
        num_hidden_layers, num_key_value_heads: the KV heads of each layer; of an encoder-decoder, its decoder's.
        cross_num_key_value_heads, encoder_num_key_value_heads: of an encoder-decoder's attentions to the encoder and
            within it; otherwise empty.
        loss_nats_per_token: mean negative log-likelihood of every token of the text (of every masked token for an
            encoder, of every target's token for an encoder-decoder); None for an encoder that predicts none.
        perplexity: its exponential.
        bits_per_byte: the same text in bits over its UTF-8 bytes, comparable across tokenizers; None for encoders.
        cache_bytes_per_token_computed: from the configuration, in the dtype of the evaluation; of an
            encoder-decoder, of each token that it decodes. None for encoders, which keep no cache.
        cache_bytes_per_token_measured: from the cache that the model filled, by class of cache.
        cache_bytes_per_token_beyond_window: of a token beyond the sliding window, where there is one.
        cache_bytes_per_source_token_computed, cache_bytes_per_source_token_measured: what the decoder of an
            encoder-decoder keeps of each source token.
        peak_memory_bytes: most that a fresh process had while it read and decoded; None where it was not measured.
    """

    name: str
    model_type: str
    model_class: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: tuple[int, ...]
    parameters: int
    weight_bytes: int
    loss_nats_per_token: float | None
    perplexity: float | None
    bits_per_byte: float | None
    cache_bytes_per_token_computed: int | None
    cache_bytes_per_token_measured: float | None
    cache_bytes_per_token_beyond_window: int | None
    peak_memory_bytes: int | None = None
    cross_num_key_value_heads: tuple[int, ...] = ()
    encoder_num_key_value_heads: tuple[int, ...] = ()
    cache_bytes_per_source_token_computed: int | None = None
    cache_bytes_per_source_token_measured: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """Student against donor on the same tokens, each with its interval; None where the text has too few windows, and for
    what the kind of model has not.

    Args:
        loss_nats_per_token: student's loss less the donor's.
        perplexity_ratio: student's perplexity over the donor's.
        bits_per_byte: student's less the donor's.
        kl_nats_per_token: of the donor's distribution from the student's, forward.
        top1_agreement_fraction: tokens whose likeliest successor both models agree on.
    """

    loss_nats_per_token: Interval | None
    perplexity_ratio: Interval | None
    bits_per_byte: Interval | None
    kl_nats_per_token: Interval | None
    top1_agreement_fraction: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextLoss:
    """Tokens that were predicted from `first_context_tokens` to `last_context_tokens` tokens before them."""

    first_context_tokens: int
    last_context_tokens: int
    tokens: int
    donor_loss_nats_per_token: float
    student_loss_nats_per_token: float
    kl_nats_per_token: float
    difference: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLengthLoss:
    """Of an encoder-decoder: target tokens of the pairs whose source has so many tokens, as it was read."""

    first_source_tokens: int
    last_source_tokens: int
    pairs: int
    tokens: int
    donor_loss_nats_per_token: float
    student_loss_nats_per_token: float
    kl_nats_per_token: float
    difference: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rouge:
    """How much of the references an encoder-decoder writes: mean F1 over pairs, of the reference that it fits best.

    Args:
        metric: rouge1, rouge2 or rougeL, with stemming, as the package rouge-score computes them.
        num_beams: of the decoding; 1 is greedy.
        most_tokens: after which it was stopped.
        difference: student's less the donor's, paired.
    """

    metric: str
    pairs: int
    num_beams: int
    most_tokens: int
    donor_fraction: float
    student_fraction: float
    difference: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """Of an encoder: mean-pooled last hidden states of the same windows of text, donor's against student's.

    Args:
        windows: that were embedded; a document that fits the context is one.
        mean_cosine: between donor's and student's embedding of a window.
        cosine: the same with its interval.
        spearman: rank correlation of the cosines between windows, donor's against student's; None below 3 windows.
        spearman_windows: between which, evenly spread over the text.
    """

    windows: int
    mean_cosine: float
    cosine: Interval | None
    spearman: float | None
    spearman_windows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """Something said once in a context of `context_tokens`, asked for at its end.

    Args:
        task: name of a file in `retrieval/`.
        donor_accuracy_fraction, student_accuracy_fraction: whole answers that greedy decoding gets right.
        donor_answer_loss_nats_per_token, student_answer_loss_nats_per_token: of the right answer.
        difference: student's answer loss less the donor's.
    """

    task: str
    context_tokens: int
    samples: int
    donor_accuracy_fraction: float
    student_accuracy_fraction: float
    donor_answer_loss_nats_per_token: float
    student_answer_loss_nats_per_token: float
    difference: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """One metric of one lm_eval task, as lm_eval computes it.

    Args:
        version: of the task.
        samples: documents that were scored.
        difference: student's score less the donor's, paired by document; None where the score is no function of the
            documents' mean.
    """

    task: str
    metric: str
    version: str
    num_fewshot: int
    samples: int
    higher_is_better: bool
    donor: float
    donor_stderr: float | None
    student: float
    student_stderr: float | None
    difference: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Reading a prompt and then decoding, donor and student by turns in one process; medians.

    Args:
        batch_size, context_tokens: of the prompts; of an encoder-decoder, of the sources.
        donor_decode_tokens_per_second, student_decode_tokens_per_second: of the whole batch.
        decode_speedup: student's over donor's tokens per second, median over pairs.
        decode_speedup_low, decode_speedup_high: its smallest and largest pair.
        allowed_decode_speedup: the donor's bytes moved per step (weights and cache) over the student's.
    """

    batch_size: int
    context_tokens: int
    repetitions: int
    donor_first_token_seconds: float
    student_first_token_seconds: float
    first_token_speedup: float
    donor_decode_tokens_per_second: float
    student_decode_tokens_per_second: float
    decode_speedup: float
    decode_speedup_low: float
    decode_speedup_high: float
    allowed_decode_speedup: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingSpeed:
    """Reading whole sequences with an encoder, donor and student by turns; medians, and the range of the speed-up."""

    batch_size: int
    length_tokens: int
    repetitions: int
    donor_sequences_per_second: float
    student_sequences_per_second: float
    speedup: float
    speedup_low: float
    speedup_high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Context that fits into `memory_bytes` beside the weights, for `batch_size` sequences at once; computed.

    0 where the weights alone do not fit; None where every layer has a sliding window and all of them fit, so that no
    context is too long; `longest_context_tokens` of the model is not a limit here.
    """

    memory_bytes: int
    batch_size: int
    donor_context_tokens: int | None
    student_context_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What the models write after a prompt, by greedy decoding; `converted` is the student before uptraining.

    Of an encoder-decoder the prompt is the source, and `reference` what was to be written.
    """

    prompt: str
    donor: str
    student: str
    converted: str | None = None
    reference: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFacts:
    """The text that was evaluated.

    Args:
        sources: as the user named them.
        fingerprint: of the text itself.
        tokens: all of which were scored once.
        text_bytes: in UTF-8.
        windows: rows in which the text was read, which are what the bootstrap draws; of an encoder-decoder, pairs.
        context_tokens: longest context of a prediction; for encoders and encoder-decoders, most tokens that are read.
        stride_tokens: tokens scored in each window; None where windows do not overlap.
        longest_context_tokens: what the model takes.
        targets: references of an encoder-decoder's sources, each of which was scored; otherwise None.
        truncated_sources: of them, sources that were cut to `context_tokens`.
        masked_fraction: share of the tokens that an encoder had to guess; otherwise None.
    """

    sources: tuple[str, ...]
    fingerprint: str
    documents: int
    tokens: int
    text_bytes: int
    windows: int
    context_tokens: int
    stride_tokens: int | None
    longest_context_tokens: int | None
    targets: int | None = None
    truncated_sources: int | None = None
    masked_fraction: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the numbers depend on besides models and text.

    Args:
        versions: of python, torch, transformers and hf_gqa.
        confidence_fraction, resamples: of every interval.
    """

    device: str
    device_name: str
    dtype: str
    batch_size: int
    attn_implementation: str
    threads: int
    seed: int
    confidence_fraction: float
    resamples: int
    versions: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything measured about a student and its donor; exact round trip through JSON.

    Args:
        kl_nats_per_token: forward KL from donor to student, mean over all tokens; None where no tokens are predicted.
        top1_agreement_fraction: tokens on whose likeliest successor both agree; None with it.
        kind: "causal_lm", "seq2seq", "masked_lm" or "encoder". What a kind has not is None or empty.
        conversion: the student's `conversion_manifest.json`; None if it has none.
        recipe: of `hf-gqa run`, which made all this; None otherwise.
        command: that repeats the evaluation.
        notes: what the reader must know about the numbers.
    """

    format: int
    donor: ModelFacts
    student: ModelFacts
    kl_nats_per_token: float | None
    top1_agreement_fraction: float | None
    differences: Differences
    by_context: tuple[ContextLoss, ...]
    retrieval: tuple[Retrieval, ...]
    tasks: tuple[TaskScore, ...]
    speed: tuple[Speed, ...]
    capacity: tuple[Capacity, ...]
    continuations: tuple[Continuation, ...]
    text: TextFacts
    settings: Settings
    conversion: dict | None
    recipe: dict | None
    command: str
    notes: tuple[str, ...]
    kind: str = CAUSAL_LM
    by_source_length: tuple[SourceLengthLoss, ...] = ()
    rouge: tuple[Rouge, ...] = ()
    embeddings: Embeddings | None = None
    encoding_speed: tuple[EncodingSpeed, ...] = ()

    def to_dict(self) -> dict:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: dict, where: str = "report") -> "Report":
        """Raises Refusal for anything that is not a report of this format, saying where it differs."""
        found = values.get("format") if isinstance(values, dict) else None
        if found != FORMAT:
            raise Refusal(
                f"{where}: format = {found!r}, this hf_gqa reads {FORMAT}. Evaluate the student again with this hf_gqa."
            )
        report = value_of(cls, values, where)
        if report.kind not in AUTO_CLASSES:
            raise Refusal(f"{where}: kind = {report.kind!r}, expected one of {', '.join(AUTO_CLASSES)}. Make it again.")
        return report

    @classmethod
    def read(cls, path: str | Path) -> "Report":
        """Of a `report.json`, or of a folder that holds one."""
        path = Path(path).expanduser()
        path = path / REPORT_FILE if path.is_dir() else path
        if not path.is_file():
            raise Refusal(f"{path}: no such report. Write one with hf-gqa evaluate.")
        return cls.from_dict(read_json(path, "Evaluate the student again."), str(path))
