"""What an evaluation shall measure: the options of `hf-gqa evaluate`, checked, as one value."""

from dataclasses import dataclass
from typing import ClassVar

from ..recipe import Recipe
from ..refusal import Refusal
from ..text.source import OF_DATASETS, TextSource


DTYPES = ("auto", "float32", "bfloat16", "float16")
POSITIVE = (
    "context_length",
    "stride",
    "batch_size",
    "max_tokens",
    "limit",
    "resamples",
    "decode_tokens",
    "repetitions",
)
POSITIVE += ("continuation_tokens", "sampled_tokens", "num_beams", "generation_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecipe(Recipe):
    """Checked when made; exact round trip through YAML, unknown keys refused.

    Args:
        text: files (.txt, .jsonl, .json, .parquet) and folders of them; or a dataset, as in `TextSource`; or
            `sampled_tokens`, which the donor writes.
        source_column, target_column: of an encoder-decoder's text, which is pairs: a source is text or a list of texts to
            be joined, a target is text or a list of references.
        max_tokens: stop after so many; None: every token of the text is scored.
        context_length: most tokens before a prediction, or of a source; None: what the models take, up to 2048.
        stride: tokens scored in each further window; None: `context_length`, which reads everything once.
        batch_size: windows at once; None: as many as make some 8192 tokens.
        dtype: to compute in, and of the cache; "auto": the donor's.
        device: such as "cuda:1"; None: the accelerator, if there is one.
        attn_implementation: such as "sdpa" or "eager"; None: what transformers chooses.
        resamples, confidence: of the bootstrap intervals.
        retrieval_samples: prompts for each recall task and length; 0: none.
        tasks: of lm_eval; `tasks_folder` holds the data of those named local_*.
        limit, num_fewshot: of the tasks; None: all documents, and the task's own shots.
        speed: whether to measure it, over `speed_batch_sizes` and `speed_context_lengths` (empty: a quarter of
            `context_length`, and all of it).
        repetitions, decode_tokens: medians are over so many runs of so many tokens.
        peak_memory: whether to measure it, in a process for each model.
        memory: sizes, such as "24GB", for which the context that fits is computed.
        prompts: to continue; empty: beginnings of windows of the text.
        continuation_tokens: how long the continuations are.
        rouge_pairs: sources of an encoder-decoder for which targets are written; None: all, 0: none.
        num_beams, generation_tokens: how they are written, and after how many tokens that is stopped.

    Raises:
        Refusal: contradictory or unknown values.
    """

    replaces: ClassVar = {
        "text": (*OF_DATASETS, "sampled_tokens"),
        "dataset_name": ("text", "sampled_tokens"),
        "sampled_tokens": ("text", *OF_DATASETS, "text_column", "streaming"),
    }

    text: tuple[str, ...] = ()
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_split: str = "test"
    text_column: str | None = None
    source_column: str = "source"
    target_column: str = "target"
    streaming: bool = False
    sampled_tokens: int | None = None
    max_tokens: int | None = None
    context_length: int | None = None
    stride: int | None = None
    batch_size: int | None = None
    dtype: str = "auto"
    device: str | None = None
    attn_implementation: str | None = None
    seed: int = 0
    resamples: int = 2000
    confidence: float = 0.95
    retrieval_samples: int = 32
    tasks: tuple[str, ...] = ()
    tasks_folder: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    speed: bool = True
    speed_batch_sizes: tuple[int, ...] = (1, 8)
    speed_context_lengths: tuple[int, ...] = ()
    repetitions: int = 5
    decode_tokens: int = 16
    peak_memory: bool = True
    memory: tuple[str, ...] = ("24GB",)
    prompts: tuple[str, ...] = ()
    continuation_tokens: int = 40
    rouge_pairs: int | None = None
    num_beams: int = 1
    generation_tokens: int = 128

    def __post_init__(self):
        self.check_fields()
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Refusal(f"{name} = {value} is not a positive whole number. Use 1 or more.")
        if not self.speed_batch_sizes:
            raise Refusal("speed_batch_sizes: is empty. Give one or more, or leave it out.")
        for name in ("speed_batch_sizes", "speed_context_lengths"):
            if any(value < 1 for value in getattr(self, name)):
                raise Refusal(f"{name} = {list(getattr(self, name))}: use whole numbers from 1 on.")
        counts = (self.retrieval_samples, self.num_fewshot or 0, self.rouge_pairs or 0)
        if min(counts) < 0 or not 0 <= self.seed < 2**32:
            raise Refusal("retrieval_samples, num_fewshot, rouge_pairs, seed: must not be negative. Use 0 or more.")
        if self.dtype not in DTYPES:
            raise Refusal(f"dtype = {self.dtype!r} is unknown. Use one of {', '.join(DTYPES)}.")
        if not 0.5 <= self.confidence < 1:
            raise Refusal(f"confidence = {self.confidence}: use a fraction from 0.5 to less than 1, such as 0.95.")
        if self.stride is not None and self.context_length is not None and self.stride > self.context_length:
            raise Refusal(
                f"stride = {self.stride:,} is more than context_length = {self.context_length:,}, so that tokens would be "
                f"left out. Use {self.context_length:,} or fewer."
            )
        ways = {"--text": self.text, "--dataset-name": self.dataset_name, "--sampled-tokens": self.sampled_tokens}
        given = [name for name, value in ways.items() if value]
        if len(given) != 1:
            raise Refusal(f"text: got {', '.join(given) or 'none'}. Give exactly one of {', '.join(ways)}.")
        if self.sampled_tokens is None:
            self.text_source()

    def text_source(self) -> TextSource:
        return TextSource(
            train_file=self.text,
            dataset_name=self.dataset_name,
            dataset_config_name=self.dataset_config_name,
            dataset_split=self.dataset_split,
            text_column=self.text_column,
            streaming=self.streaming,
        )
