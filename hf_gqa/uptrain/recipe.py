"""What a run of uptraining shall be: the options of `hf-gqa uptrain`, checked, as one value."""

from dataclasses import dataclass, fields, replace
from typing import ClassVar

from ..recipe import Recipe
from ..refusal import Refusal
from ..text.source import OF_DATASETS, TextSource
from .callback import EXPORTED, resolve_budget
from .objectives import OBJECTIVES
from .phases import TRAINED, Phase


DTYPES = ("float32", "bfloat16")
OF_SAMPLES = ("sample_from_teacher", "sampled_tokens")
WHOLE = ("sequence_length", "per_device_train_batch_size", "gradient_accumulation_steps", "lora_rank", "logging_steps")
WHOLE += ("save_steps", "eval_steps", "eval_tokens", "sampled_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class UptrainRecipe(Recipe):
    """Checked when made; exact round trip through YAML, unknown keys refused.

    Args:
        teacher: folder or Hub repository of the donor; None trains on the text alone.
        teacher_dtype, teacher_device_map: load the teacher as a model of its own, so and there ("auto" spreads it over what
            there is), instead of over the student's frozen tensors.
        teacher_logits: folder written by `hf-gqa teacher-logits`, instead of running the teacher.
        train_file, dataset_name, dataset_config_name, dataset_split, text_column, streaming: see `TextSource`.
        sample_from_teacher: no data: the donor samples its own, `sampled_tokens` of it; None: as many as the budget.
        eval_file: text to evaluate on; without it, `eval_tokens` of the training text are held out.
        budget_tokens, budget_fraction, pretraining_tokens: how long to train.
        objective: name of a file in `objectives/`; None: "distill" with a teacher, "kl" with its
            stored logits, else "cross_entropy".
        phases: in place of an objective, for what no file offers.
        train: in place of the objective's own choice of what to train.
        lora_rank: train adapters of this rank, and the converted projections in full, instead of everything.
        load_in_4bit: keep what is neither an adapter nor trained in full in four bits (QLoRA); written out are whole weights.
        learning_rate: peak; None: 0.256 / hidden_size, see docs/uptraining.md.
        dtype: of the weights while they are trained; "bfloat16" halves their memory and loses small updates.
        per_device_train_batch_size: rows; None: as many as leave some 300 steps.
        eval_tokens: held out where there is no `eval_file`; None: a twentieth of the budget, from 2,048 to 16,384.
        export: "last" student or "best" by `eval_loss`.

    Raises:
        Refusal: contradictory or unknown values.
    """

    replaces: ClassVar = {
        "budget_tokens": ("budget_fraction", "pretraining_tokens"),
        "budget_fraction": ("budget_tokens",),
        "train_file": (*OF_DATASETS, *OF_SAMPLES),
        "dataset_name": ("train_file", *OF_SAMPLES),
        "sample_from_teacher": ("train_file", *OF_DATASETS, "text_column", "streaming"),
        "eval_file": ("eval_tokens",),
        "eval_tokens": ("eval_file",),
        "objective": ("phases",),
        "teacher_logits": ("teacher_dtype", "teacher_device_map"),
    }

    teacher: str | None = None
    teacher_dtype: str | None = None
    teacher_device_map: str | None = None
    teacher_logits: str | None = None
    train_file: tuple[str, ...] = ()
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_split: str = "train"
    text_column: str | None = None
    streaming: bool = False
    sample_from_teacher: bool = False
    sampled_tokens: int | None = None
    eval_file: tuple[str, ...] = ()
    eval_tokens: int | None = None
    budget_tokens: int | None = None
    budget_fraction: float | None = None
    pretraining_tokens: int | None = None
    objective: str | None = None
    phases: tuple[Phase, ...] = ()
    train: str | None = None
    lora_rank: int | None = None
    load_in_4bit: bool = False
    learning_rate: float | None = None
    sequence_length: int | None = None
    attend_across_documents: bool = False
    per_device_train_batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    bf16: bool = False
    dtype: str = "float32"
    torch_compile: bool = False
    seed: int = 0
    logging_steps: int | None = None
    eval_steps: int | None = None
    save_steps: int | None = None
    export: str = "last"

    def __post_init__(self):
        self.check_fields()
        phases = [phase if isinstance(phase, Phase) else Phase.from_dict(phase) for phase in self.phases]
        object.__setattr__(self, "phases", tuple(phases))
        for name in WHOLE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Refusal(f"{name} = {value!r} is not a positive whole number. Use 1 or more.")
        for name in ("teacher", "teacher_logits", "dataset_name"):
            if getattr(self, name) == "":
                raise Refusal(f"{name} = '' names nothing. Give a folder or a repository, or leave it out.")
        if not 0 <= self.seed < 2**32:
            raise Refusal(f"seed = {self.seed} is out of range. Use a whole number from 0 to {2**32 - 1:,}.")
        self._check_text()
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise Refusal(f"learning_rate = {self.learning_rate!r}: use a number between 0 and 1, such as 1e-4.")
        if self.train is not None and self.train not in TRAINED:
            raise Refusal(f"train = {self.train!r} is unknown. Use one of {', '.join(TRAINED)}.")
        for name, known in {"dtype": DTYPES, "teacher_dtype": (*DTYPES, None)}.items():
            if getattr(self, name) not in known:
                raise Refusal(f"{name} = {getattr(self, name)!r} is unknown. Use {' or '.join(DTYPES)}.")
        if self.export not in EXPORTED:
            raise Refusal(f"export = {self.export!r} is unknown. Use last or best.")
        if self.objective is not None and self.phases:
            raise Refusal("objective and phases: both say what is learned. Give one of them.")
        OBJECTIVES.get(self.objective or "distill")
        resolve_budget(self.budget_tokens, self.budget_fraction, self.pretraining_tokens)

    def _check_text(self) -> None:
        ways = {"--train-file": self.train_file, "--dataset-name": self.dataset_name}
        ways["--sample-from-teacher"] = self.sample_from_teacher
        given = [name for name, value in ways.items() if value]
        if len(given) != 1:
            raise Refusal(f"text: got {', '.join(given) or 'none'}. Give exactly one of {', '.join(ways)}.")
        if self.sample_from_teacher and self.teacher is None:
            raise Refusal("--sample-from-teacher: there is no teacher to sample from. Give --teacher.")
        self._check_belongings(given[0])
        if self.teacher_logits is not None and self.streaming:
            raise Refusal("--teacher-logits: are stored row by row for a corpus on disk. Leave --streaming out.")
        if not self.sample_from_teacher:
            self.text_source()

    def _check_belongings(self, text: str) -> None:
        """Refuse options that would be passed over."""
        of_files_and_datasets = ("--train-file", "--dataset-name")
        by_fraction = self.budget_fraction is not None or self.budget_tokens is None
        belongs = {
            "sampled_tokens": (text == "--sample-from-teacher", "--sample-from-teacher"),
            "dataset_config_name": (text == "--dataset-name", "--dataset-name"),
            "dataset_split": (text == "--dataset-name", "--dataset-name"),
            "text_column": (text in of_files_and_datasets or self.eval_file, " or ".join(of_files_and_datasets)),
            "streaming": (text in of_files_and_datasets, " or ".join(of_files_and_datasets)),
            "eval_tokens": (not self.eval_file, "text that is held out, and --eval-file is given"),
            "pretraining_tokens": (by_fraction, "--budget-fraction, and --budget-tokens is given"),
            "load_in_4bit": (self.lora_rank is not None, "--lora-rank"),
            "teacher_dtype": (self.teacher is not None and self.teacher_logits is None, "--teacher"),
            "teacher_device_map": (self.teacher is not None and self.teacher_logits is None, "--teacher"),
        }
        defaults = {field.name: field.default for field in fields(self)}
        for name, (fits, whose) in belongs.items():
            if getattr(self, name) != defaults[name] and not fits:
                raise Refusal(
                    f"{name} = {getattr(self, name)!r} would be passed over: it belongs to {whose}. Leave it out."
                )

    def text_source(self) -> TextSource:
        names = [field.name for field in fields(TextSource)]
        return TextSource(**{name: getattr(self, name) for name in names})

    @property
    def total_tokens(self) -> int:
        return resolve_budget(self.budget_tokens, self.budget_fraction, self.pretraining_tokens)

    def resolved_phases(self) -> tuple[Phase, ...]:
        """The phases themselves, whatever named them."""
        default = "kl" if self.teacher_logits else "distill" if self.teacher else "cross_entropy"
        name = self.objective or default
        phases = self.phases or OBJECTIVES.get(name)
        if self.train is None:
            return phases
        kept = self.train == "all"  # a teacher-forced phase can teach attention only
        return tuple(p if kept and p.objective.teacher_forced else replace(p, train=self.train) for p in phases)
