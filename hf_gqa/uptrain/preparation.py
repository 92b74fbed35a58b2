"""Everything that is checked and made before the first step: student, teacher, text, and what a run will do."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel

from ..convert.donor import Donor, open_donor
from ..convert.student import Student, check_same_tokens
from ..refusal import Refusal
from ..staging import file_sha256
from ..text.packing import check_packing, packed_rows
from ..text.sampled import sampled_rows
from ..text.source import TextSource, fingerprint, has_columns, open_documents
from .budgeted_rows import BudgetedRows, BudgetedStream
from .recipe import UptrainRecipe
from .stored_teacher import StoredTeacher


STEPS_WANTED = 300
MOST_TOKENS_AT_ONCE = 16_384
SEQUENCE_LENGTH_WANTED = 1024
RATE_TIMES_WIDTH = 0.256


def open_teacher(recipe: UptrainRecipe, student: Student) -> Donor | None:
    """Raises Refusal unless the teacher reads and predicts the same tokens as the student."""
    if recipe.teacher is None:
        return None
    donor = open_donor(recipe.teacher)
    check_same_tokens(donor, student, "teacher", "Distil from the donor that the student was converted from.")
    return donor


def resolve_sizes(recipe: UptrainRecipe, model: PreTrainedModel, processes: int) -> UptrainRecipe:
    """The recipe with the sizes that it leaves open: sequence length, batch size, learning rate, how often to look."""
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or SEQUENCE_LENGTH_WANTED
    length = recipe.sequence_length or min(longest, SEQUENCE_LENGTH_WANTED, recipe.total_tokens)
    if recipe.total_tokens < max(2, length):
        raise Refusal(
            f"budget_tokens = {recipe.total_tokens:,} is less than one row of {max(2, length):,} tokens. Raise the budget, or "
            f"give a shorter sequence_length."
        )
    if length > longest:
        raise Refusal(
            f"sequence_length = {length:,}: the student has positions for {longest:,} tokens. Use {longest:,} or fewer."
        )
    share = recipe.gradient_accumulation_steps * processes
    most = max(1, MOST_TOKENS_AT_ONCE // length)
    fitting = min(most, max(1, round(recipe.total_tokens / (STEPS_WANTED * length * share))))
    rows = recipe.per_device_train_batch_size or fitting
    steps = max(1, math.ceil(recipe.total_tokens / (rows * length * share)))
    return replace(
        recipe,
        sequence_length=length,
        per_device_train_batch_size=rows,
        learning_rate=recipe.learning_rate or float(f"{RATE_TIMES_WIDTH / config.hidden_size:.2g}"),
        eval_tokens=recipe.eval_tokens
        or (None if recipe.eval_file else min(16_384, max(2048, recipe.total_tokens // 20))),
        logging_steps=recipe.logging_steps or max(1, steps // 100),
        eval_steps=min(steps, recipe.eval_steps or max(1, steps // 5)),
        save_steps=recipe.save_steps or max(1, steps // 5),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Rows to train on and rows to evaluate on.

    Args:
        train: exactly the budget.
        all_rows: the corpus that `train` draws from, by whose row numbers stored teacher logits are found.
        eval: rows that are never trained on.
        fingerprint: of what was given.
        passes: how often the corpus is seen; None for a stream.
    """

    train: BudgetedRows | BudgetedStream
    all_rows: Dataset | IterableDataset
    eval: Dataset
    fingerprint: str
    passes: float | None


def prepare_text(recipe: UptrainRecipe, student: Student, teacher: PreTrainedModel | None, work: Path, donor_id: str):
    """The rows of a recipe whose sizes are resolved.

    Args:
        teacher: the donor, loaded, where it samples the text.
        work: folder in which sampled text is kept.
        donor_id: what identifies the donor.
    """
    length, tokenizer = recipe.sequence_length, student.tokenizer
    if recipe.sample_from_teacher:
        wanted = (recipe.sampled_tokens or recipe.total_tokens) + (recipe.eval_tokens or 0)
        rows = sampled_rows(
            *(teacher, tokenizer, work / "sampled"),
            **{"donor_id": donor_id, "tokens": wanted, "sequence_length": length, "seed": recipe.seed},
        )
        identity = f"sampled from {donor_id} with seed {recipe.seed}"
    else:
        rows = text_rows(recipe.text_source(), recipe, student)
        identity = fingerprint(recipe.text_source())
    if recipe.eval_file:
        held_out, of_eval = eval_rows(recipe, student)
        identity = f"{identity}, evaluated on {of_eval}"
    else:
        rows, held_out = hold_out(rows, max(1, recipe.eval_tokens // length))
    fill = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    made = BudgetedStream if isinstance(rows, IterableDataset) else BudgetedRows
    processes = PartialState().num_processes
    together = processes * recipe.per_device_train_batch_size if processes > 1 else 1
    train = made(rows, recipe.total_tokens, recipe.seed, fill, multiple_of=together)
    return Text(train=train, all_rows=rows, eval=held_out, fingerprint=identity, passes=getattr(train, "passes", None))


def eval_rows(recipe: UptrainRecipe, student: Student) -> tuple[Dataset, str]:
    """Rows of the files to evaluate on, and their fingerprint."""
    source = TextSource(train_file=recipe.eval_file)
    try:
        source = replace(source, text_column=recipe.text_column if has_columns(source) else None)
        return text_rows(source, recipe, student), fingerprint(source)
    except Refusal as error:
        raise Refusal(f"text to evaluate on: {error}".replace("train_file", "eval_file")) from None


def text_rows(source: TextSource, recipe: UptrainRecipe, student: Student) -> Dataset | IterableDataset:
    """Packed rows of a source, for a model that keeps documents in a row apart, or is not asked to."""
    if not recipe.attend_across_documents:
        check_packing(student.model, min(2, recipe.per_device_train_batch_size))  # one row, or several
    return packed_rows(
        open_documents(source, student.tokenizer),
        student.tokenizer,
        recipe.sequence_length,
        attend_across_documents=recipe.attend_across_documents,
    )


def hold_out(rows: Dataset | IterableDataset, wanted: int):
    """(rows to train on, rows to evaluate on): of a stream its first rows; of a corpus every n-th, at most a tenth."""
    if isinstance(rows, IterableDataset):
        kept = rows.skip(wanted)
        if next(iter(kept), None) is None:
            raise Refusal(f"text: the stream ends within the {wanted:,} rows that are held out. Lower --eval-tokens.")
        return kept, Dataset.from_list(list(rows.take(wanted)))
    if len(rows) < 2:
        raise Refusal(
            f"text: fills {len(rows)} row of sequence_length, so none is left to evaluate on. Give more text, a shorter "
            f"--sequence-length, or --eval-file."
        )
    every = max(10 if len(rows) >= 10 else 2, len(rows) // wanted)
    held_out = [row for row in range(len(rows)) if row % every == every - 1]
    return rows.select(sorted(set(range(len(rows))) - set(held_out))), rows.select(held_out)


def open_stored_teacher(recipe: UptrainRecipe, text: Text, vocab_size: int) -> StoredTeacher | None:
    if recipe.teacher_logits is None:
        return None
    return StoredTeacher.open(recipe.teacher_logits, text.all_rows, vocab_size=vocab_size)


def facts_of_run(
    recipe: UptrainRecipe, student: Student, donor: dict | None, text: Text, teacher: StoredTeacher | object
) -> dict:
    """What a run that resumes must agree with.

    Args:
        donor: what identifies it, if there is one.
        teacher: the trainer's; stored logits are compared by what they say of themselves, wherever they lie.
    """
    names = (
        "logging_steps",
        "eval_steps",
        "save_steps",
        "teacher",
        "teacher_logits",
        "train_file",
        "eval_file",
        "export",
    )
    asked = {name: value for name, value in recipe.to_dict().items() if name not in names}
    plan = student.manifest.plan if student.manifest is not None else None
    facts = {
        "recipe": asked | {"phases": [asdict(phase) for phase in recipe.resolved_phases()]},
        "plan": plan,
        "student": {path.name: file_sha256(path) for path in sorted(student.folder.glob("*.safetensors"))},
        "teacher": donor,
        "teacher_logits": asdict(teacher.settings) if isinstance(teacher, StoredTeacher) else None,
        "text": text.fingerprint,
        "processes": PartialState().num_processes,
    }
    return json.loads(json.dumps(facts))
