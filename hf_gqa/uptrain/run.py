"""From a student on disk to an uptrained student on disk."""

import json
import re
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments

from ..convert.decoding import check_decoding
from ..convert.donor import Donor
from ..convert.manifest import donor_identity
from ..convert.student import Student, open_student
from ..refusal import Refusal
from ..staging import check_apart, check_output
from ..text.packing import PackedCollator
from ..text.source import keep_bars_on_terminals
from .callback import UptrainCallback, cache_facts
from .checkpoints import RECORD_FILE
from .export_student import export_student, round_to
from .lora import add_lora, in_four_bits, keep_gradients, merged_into_stored
from .preparation import (
    Text,
    facts_of_run,
    open_stored_teacher,
    open_teacher,
    prepare_text,
    resolve_sizes,
)
from .progress import UptrainProgress, plot_losses
from .recipe import UptrainRecipe
from .stored_teacher import StoredTeacher
from .trainer import UptrainTrainer
from .write_teacher_logits import write_teacher_logits


OF_A_RUN = re.compile(r"(_replaced-)?checkpoint-\d+|sampled")
TEXT_TIMEOUT = timedelta(hours=12)  # the other processes wait while the first one samples and packs
RESULT_FILE, PLOT_FILE = "uptraining.json", "uptraining.svg"


@dataclass(frozen=True, slots=True, kw_only=True)
class UptrainResult:
    """What came out; `uptraining.json` beside the student holds it, with the whole log.

    Args:
        before, after: evaluation on the held-out rows; `after` is of the weights as written.
        seconds, tokens_per_second: of training since it was begun or resumed, evaluations and checkpoints included.
    """

    output: str
    recipe: dict
    tokens_seen: int
    steps: int
    before: dict
    after: dict
    seconds: float
    tokens_per_second: float
    teacher_own_bytes: int | None
    teacher_shared_bytes: int | None
    kv_cache_bytes_per_token: int | None

    def to_dict(self) -> dict:
        return asdict(self)


class UptrainRun:
    """A run that has been checked and explained, and not begun.

    Checkpoints and sampled text are kept in `work`, beside the output, until the run is complete.

    Args:
        student: folder of the student; it is only read.
        output: folder to write; it appears complete or not at all.
        recipe: what to do.
        overwrite: replace `output`, and discard an unfinished run.
        resume: go on where an unfinished run of the same recipe stopped.
        explain_only: sample only a little where the text is sampled, for a run that is not going to be.

    Raises:
        Refusal: bad input; nothing is written.
    """

    def __init__(
        self,
        student: str | Path,
        output: str | Path,
        recipe: UptrainRecipe,
        *,
        overwrite: bool = False,
        resume: bool = False,
        explain_only: bool = False,
    ):
        self.output, self.overwrite, self.resume = Path(output).expanduser(), overwrite, resume
        self.work = self.output.parent / f"{self.output.name}.unfinished"
        check_outputs(self.output, overwrite, student, recipe)
        PartialState(cpu=not torch.accelerator.is_available(), timeout=TEXT_TIMEOUT)
        keep_bars_on_terminals()
        self._check_work()
        dtype = getattr(torch, recipe.dtype)
        loading = in_four_bits(student, dtype) if recipe.load_in_4bit else {}
        self.student: Student = open_student(student, dtype, **loading)
        check_decoding(self.student.model, str(student))
        keep_gradients(self.student.model)
        self.recipe = resolve_sizes(recipe, self.student.model, PartialState().num_processes)
        self.donor: Donor | None = open_teacher(recipe, self.student)
        self.text: Text = self._sampled_a_little() if explain_only and recipe.sample_from_teacher else self._text()
        made = [folder for folder in (self.work, *self.work.parents) if not folder.exists()]
        try:
            self.trainer = self._make_trainer()
        finally:  # Trainer makes its folder before there is anything to put into it
            with suppress(OSError):
                for folder in made:
                    folder.rmdir()

    @cached_property
    def donor_identity(self) -> dict | None:
        """Read once: it may take the hash of many gigabytes."""
        return donor_identity(self.donor) if self.donor is not None else None

    def _text(self) -> Text:
        donor_id, sampler = "", None
        if self.recipe.sample_from_teacher:
            if self.overwrite and not self.resume and PartialState().is_main_process:
                shutil.rmtree(self.work / "sampled", ignore_errors=True)
            donor_id, sampler = json.dumps(self.donor_identity), load_whole(self.donor, self.student.model.dtype)
        with PartialState().main_process_first():
            return prepare_text(self.recipe, self.student, sampler, self.work, donor_id)

    def _teacher(self) -> Donor | PreTrainedModel | None:
        recipe, donor = self.recipe, self.donor
        if recipe.teacher_dtype is None and recipe.teacher_device_map is None:
            return donor  # of which the trainer makes one that shares
        dtype = getattr(torch, recipe.teacher_dtype or recipe.dtype)
        return load_whole(donor, dtype, recipe.teacher_device_map)

    def _sampled_a_little(self) -> Text:
        recipe, work = self.recipe, self.work
        few = 32 * recipe.sequence_length
        with tempfile.TemporaryDirectory() as folder:
            self.recipe, self.work = replace(recipe, sampled_tokens=few, eval_tokens=few), Path(folder)
            text = self._text()
        self.recipe, self.work = recipe, work
        return replace(text, passes=recipe.total_tokens / (recipe.sampled_tokens or recipe.total_tokens))

    def _check_work(self) -> None:
        foreign = [] if self.work.is_dir() else [self.work] * self.work.exists()
        foreign = foreign or [path for path in self.work.glob("*") if not OF_A_RUN.fullmatch(path.name)]
        if foreign:
            raise Refusal(
                f"{foreign[0]}: no run wrote it, and the run needs that place. Move it, or give another output."
            )
        has_checkpoints = any(self.work.glob(f"checkpoint-*/{RECORD_FILE}"))
        if self.resume and not has_checkpoints:
            raise Refusal(f"{self.work}: holds no checkpoint to resume. Run without --resume.")
        if has_checkpoints and not (self.resume or self.overwrite):
            raise Refusal(
                f"{self.work}: is an unfinished run. Use --resume to go on with it, or --overwrite to discard it."
            )

    def _make_trainer(self) -> UptrainTrainer:
        recipe, model = self.recipe, self.student.model
        if recipe.lora_rank is not None:
            model = add_lora(model, recipe.lora_rank, recipe.seed)
        self.callback = UptrainCallback(
            budget_tokens=recipe.total_tokens, phases=recipe.resolved_phases(), ends_with_data=True
        )
        trainer = _RunTrainer(
            model=model,
            args=self._arguments(),
            train_dataset=self.text.train,
            eval_dataset=self.text.eval,
            data_collator=PackedCollator(),
            processing_class=self.student.tokenizer,
            uptrain=self.callback,
            teacher=open_stored_teacher(recipe, self.text, model.config.vocab_size) or self._teacher(),
            callbacks=[UptrainProgress(recipe.total_tokens)],
        )
        if recipe.lora_rank is not None and trainer.is_fsdp_enabled:
            raise Refusal(
                "--lora-rank: adapters of a student in shards cannot be merged. Launch with DDP "
                "(examples/accelerate/ddp.yaml), or train without adapters."
            )
        trainer.remove_callback(PrinterCallback)  # the bar shows it, the log keeps it
        return trainer

    def _arguments(self) -> TrainingArguments:
        recipe = self.recipe
        checkpointing = next(
            field.name
            for field in fields(TrainingArguments)
            if field.name in ("activation_checkpointing", "gradient_checkpointing")
        )
        return TrainingArguments(
            output_dir=str(self.work),
            num_train_epochs=1,
            train_sampling_strategy="sequential",  # the rows are in their order already
            per_device_train_batch_size=recipe.per_device_train_batch_size,
            per_device_eval_batch_size=max(1, min(16, 8192 // recipe.sequence_length)),
            gradient_accumulation_steps=recipe.gradient_accumulation_steps,
            learning_rate=recipe.learning_rate,
            adam_beta2=0.95,
            use_cpu=not torch.accelerator.is_available(),
            bf16=recipe.bf16,
            torch_compile=recipe.torch_compile,
            seed=recipe.seed,
            logging_steps=recipe.logging_steps,
            eval_strategy="steps",
            eval_steps=recipe.eval_steps,
            eval_on_start=not self.resume,
            save_strategy="steps",
            save_steps=recipe.save_steps if recipe.export == "last" else recipe.eval_steps,
            save_total_limit=2,
            load_best_model_at_end=recipe.export == "best",
            metric_for_best_model="eval_loss",
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="none",
            accelerator_config={"dispatch_batches": False},  # a stream is cut up by its readers, not by one of them
            **{checkpointing: recipe.gradient_checkpointing},
        )

    def explanation(self) -> dict:
        """What will be done, in numbers, before it is done."""
        recipe, memory = self.recipe, self.trainer.teacher_memory()
        model, text = self.trainer.model, self.text
        trained = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
        step_tokens = recipe.per_device_train_batch_size * recipe.sequence_length
        step_tokens *= recipe.gradient_accumulation_steps * PartialState().num_processes
        return {
            "student": str(self.student.folder),
            "output": str(self.output),
            "teacher": recipe.teacher_logits or (self.donor.name if self.donor is not None else None),
            "budget_tokens": recipe.total_tokens,
            "budget_fraction": recipe.budget_fraction,
            "tokens_per_step": step_tokens,
            "steps": -(-recipe.total_tokens // step_tokens),
            "corpus_passes": text.passes,
            "held_out_tokens": len(text.eval) * recipe.sequence_length,
            "learning_rate": recipe.learning_rate,
            "parameters": model.num_parameters(),
            "trained_parameters": trained,
            "lora_rank": recipe.lora_rank,
            "weight_bytes": sum(tensor.nbytes for tensor in model.parameters()),
            "gradient_and_optimizer_bytes": trained * 3 * model.dtype.itemsize,
            "teacher_own_bytes": memory.own_bytes if memory else None,
            "teacher_shared_bytes": memory.shared_bytes if memory else None,
            "teacher_disk_bytes": getattr(self.trainer.teacher, "bytes_on_disk", None),
            "phases": [asdict(phase) for phase in recipe.resolved_phases()],
            **cache_facts(self.student.model),
        }

    def train(self) -> UptrainResult:
        """Train, evaluate what will be written, write it, and remove what was only for resuming.

        Raises:
            Refusal: the run diverged, or cannot be resumed; complete checkpoints are kept.
            OSError: the disk failed or is full; complete checkpoints are kept.
        """
        begun = time.perf_counter()
        explanation = self.explanation()
        trainer = self.trainer
        if not self.resume and trainer.is_world_process_zero():
            for folder in self.work.glob("checkpoint-*"):  # of a run that --overwrite discards
                shutil.rmtree(folder)
        trainer.facts = facts_of_run(self.recipe, self.student, self.donor_identity, self.text, trainer.teacher)
        trainer.train(resume_from_checkpoint=True if self.resume else None)
        seconds = time.perf_counter() - begun
        model = trainer.model = trainer.model_wrapped = self._merged(trainer.model)
        round_to(model, self.student.stored_dtype)
        after = trainer.evaluate()
        evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        tokens = self.callback.tokens_seen(trainer.state)
        result = UptrainResult(
            output=str(self.output),
            recipe=self.recipe.to_dict(),
            tokens_seen=tokens,
            steps=trainer.state.global_step,
            before=evaluation_of(evaluated[0]),
            after=evaluation_of(after),
            seconds=seconds,
            tokens_per_second=(tokens - self.callback.tokens_at_begin) / seconds,
            teacher_own_bytes=explanation["teacher_own_bytes"],
            teacher_shared_bytes=explanation["teacher_shared_bytes"],
            kv_cache_bytes_per_token=explanation.get("kv_cache_bytes_per_token"),
        )
        self._export(model, result)
        if trainer.is_world_process_zero():
            shutil.rmtree(self.work, ignore_errors=True)
        return result

    def _merged(self, model: torch.nn.Module) -> torch.nn.Module:
        if not hasattr(model, "merge_and_unload"):
            return model
        if self.recipe.load_in_4bit:
            merged = merged_into_stored(self.student.folder, getattr(torch, self.recipe.dtype), model)
            return merged.to(PartialState().device)
        return model.merge_and_unload(safe_merge=True)  # into new tensors: the old ones are the teacher's too

    def _export(self, model, result: UptrainResult) -> None:
        history = self.trainer.state.log_history

        def add_report(folder: Path) -> None:
            text = json.dumps(asdict(result) | {"log": history}, indent=2) + "\n"
            (folder / RESULT_FILE).write_text(text, encoding="utf-8")
            plot_losses(history, folder / PLOT_FILE)

        export_student(
            model,
            self.output,
            source=self.student.folder,
            uptraining={name: getattr(result, name) for name in ("recipe", "tokens_seen", "steps", "before", "after")},
            dtype=self.student.stored_dtype,
            overwrite=self.overwrite,
            writes=self.trainer.is_world_process_zero(),
            also=add_report,
        )


class _RunTrainer(UptrainTrainer):
    facts: dict

    def checkpoint_facts(self) -> dict:
        return self.facts


def uptrain(student: str | Path, output: str | Path, recipe: UptrainRecipe, *, overwrite=False, resume=False):
    """Give a converted student its quality back: train it for a budget of tokens, and write it to `output`.

    Source: GQA (Ainslie et al. 2023, arXiv 2305.13245), section 2.1, for uptraining; the objectives name theirs.

    Args:
        student: folder that `convert_checkpoint` wrote.
        output: folder to write; it appears complete or not at all.
        recipe: text, budget, teacher and objective.
        overwrite: replace `output`, and discard an unfinished run.
        resume: go on with an unfinished run of the same recipe.

    Returns:
        An `UptrainResult`.

    Raises:
        Refusal: bad input, or a run that diverged.
        OSError: the disk failed or is full; the run can be resumed.
    """
    return UptrainRun(student, output, recipe, overwrite=overwrite, resume=resume).train()


def check_outputs(output: Path, overwrite: bool, student: str | Path, recipe: UptrainRecipe) -> None:
    """Refuse an output that exists, or that touches what is only read."""
    for folder, whose in ((student, "student"), (recipe.teacher, "teacher")):
        if folder is not None and Path(folder).expanduser().is_dir():
            check_apart(output, Path(folder).expanduser(), whose)
    check_output(output, overwrite, None)


def write_teacher_of_recipe(
    student: str | Path, output: str | Path, recipe: UptrainRecipe, top_k: int
) -> StoredTeacher:
    """Run a recipe's teacher over its text once and store its `top_k` likeliest tokens at each position in `output`.

    Raises:
        Refusal: no teacher, a streamed corpus, or a folder of other logits.
    """
    if recipe.teacher is None or recipe.streaming:
        raise Refusal("teacher-logits: needs a recipe with a teacher, and text that is not streamed.")
    check_outputs(Path(output).expanduser() / "logits", False, student, recipe)
    opened = open_student(student, getattr(torch, recipe.dtype))
    recipe = resolve_sizes(recipe, opened.model, PartialState().num_processes)
    donor = open_teacher(recipe, opened)
    teacher = load_whole(donor, opened.model.dtype)
    identity = json.dumps(donor_identity(donor))
    sampled = Path(f"{output}.sampled")
    text = prepare_text(recipe, opened, teacher, sampled, identity)
    write_teacher_logits(teacher, text.all_rows, output, top_k=top_k, donor_id=identity)
    shutil.rmtree(sampled, ignore_errors=True)
    return StoredTeacher.open(output, text.all_rows, vocab_size=donor.config.vocab_size)


def load_whole(donor: Donor, dtype: torch.dtype, device_map: str | None = None) -> PreTrainedModel:
    """The donor as a model of its own, by default where this process computes."""
    model = donor.model_class.from_pretrained(
        donor.folder, config=donor.model_config, dtype=dtype, device_map=device_map
    ).eval()
    return model if device_map is not None else model.to(PartialState().device)


def evaluation_of(metrics: dict) -> dict:
    """The model's part of Trainer's metrics, without the machine's."""
    names = "loss", "teacher_loss", "kl_nats_per_token", "top1_agreement_fraction", "gap_nats_per_token"
    names += ("gap_closed_fraction",)
    return {f"eval_{name}": metrics[f"eval_{name}"] for name in names if f"eval_{name}" in metrics}
