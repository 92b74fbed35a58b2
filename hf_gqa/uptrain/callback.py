"""The part of uptraining that any `transformers.Trainer` can have: budget, phases, safety, export."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from ..convert.cache_bytes import cache_bytes_per_token_computed, cached_heads
from ..refusal import Refusal
from .export_student import check_exportable, export_student
from .freezing import trained_names
from .phases import Phase, locate


logger = logging.get_logger(__name__)
EXPORTED = ("last", "best")


class NonFiniteGradient(Refusal):
    """Training diverged; nothing was updated with the values that are not numbers."""


class UptrainCallback(TrainerCallback):
    """Train a converted student for a budget of tokens, in phases, and export it.

    Source: GQA (Ainslie et al. 2023, arXiv 2305.13245): the length of uptraining is a fraction of pre-training.

    It counts through Trainer's own `num_input_tokens_seen`, so a resumed run goes on counting, and every tracker sees it.
    The run ends after the last optimizer step that fits into the budget. Losses are not its business: a callback never
    sees one (see `UptrainTrainer`).

    Args:
        budget_tokens: how many tokens to train on; or
        budget_fraction: as a fraction of `pretraining_tokens`, the donor's.
        tokens_per_step: of one optimizer step over all processes. Where it is given, `max_steps` is set from it, so that
            Trainer's own learning rate schedules end where the budget does.
        phases: which parameters are trained when; objectives with a teacher and rates of their own need
            `UptrainTrainer`. Default: everything, always.
        export_dir: folder to write the student into when training ends.
        export: "last", or "best": the one with the lowest loss in evaluation, written whenever it improves. With several
            evaluation sets, `metric_for_best_model` says of which.
        export_dtype: of the exported weights; None: as trained.
        source: folder the student was loaded from; None: the model's `name_or_path`.
        overwrite: whether `export_dir` may exist already.
        ends_with_data: the data hold exactly the budget, so the run ends where they do, with a step that may be smaller.

    Raises:
        Refusal: a budget that is no positive number, or without its base; reentrant gradient checkpointing; a Trainer that
            cannot do what the phases say, or was made before the callback was given to it; steps of another size than
            `tokens_per_step`; when the gradients of a step are not finite, before they are used.
    """

    follows_objectives = False  # set by a Trainer that does

    def __init__(
        self,
        *,
        budget_tokens: int | None = None,
        budget_fraction: float | None = None,
        pretraining_tokens: int | None = None,
        tokens_per_step: int | None = None,
        phases: Sequence[Phase] = (),
        export_dir: str | Path | None = None,
        export: str = "last",
        export_dtype: torch.dtype | None = None,
        source: str | Path | None = None,
        overwrite: bool = False,
        ends_with_data: bool = False,
    ):
        self.budget_tokens = resolve_budget(budget_tokens, budget_fraction, pretraining_tokens)
        if export not in EXPORTED:
            raise Refusal(f"export = {export!r} is unknown. Use one of {', '.join(EXPORTED)}.")
        if tokens_per_step is not None and tokens_per_step > self.budget_tokens:
            raise Refusal(
                f"budget_tokens = {self.budget_tokens:,} is less than one step of {tokens_per_step:,} tokens. "
                f"Raise the budget, or make the batch smaller."
            )
        self.tokens_per_step, self.phases = tokens_per_step, tuple(phases)
        self.export_dir = Path(export_dir).expanduser() if export_dir is not None else None
        self.export, self.export_dtype, self.source = export, export_dtype, source
        self.overwrite, self.ends_with_data = overwrite, ends_with_data
        if self.export_dir is not None and self.export_dir.exists() and not overwrite:
            raise Refusal(f"{self.export_dir}: exists. Give another folder, or overwrite=True to replace it.")
        self._trained: dict[str, frozenset[str]] = {}
        self._phase = self._best_loss = self._args = self._use_cache = None
        self._tokens_before_step = self._step_tokens = self.tokens_at_begin = 0

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._args, self._use_cache = args, getattr(getattr(model, "config", None), "use_cache", None)
        self.set_arguments(args)
        if self.export == "best" and args.eval_strategy == IntervalStrategy.NO:
            raise Refusal(
                "export = best: nothing is evaluated (eval_strategy = 'no'). Set eval_strategy, or export last."
            )

    def set_arguments(self, args) -> None:
        """What Trainer must know of the budget; before Trainer is made, where it wants to know at once."""
        if args.include_num_input_tokens_seen == "no":
            args.include_num_input_tokens_seen = "all"
        if self.tokens_per_step is not None:
            args.max_steps = self.budget_tokens // self.tokens_per_step
        refuse_reentrant_checkpointing(args)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._check_trainer(args)
        if self.export_dir is not None:
            check_exportable(model)
        self._tokens_before_step = self.tokens_at_begin = state.num_input_tokens_seen
        self._phase = None
        if not self._trained:
            trainable = frozenset(name for name, tensor in model.named_parameters() if tensor.requires_grad)
            self._trained = {
                train: trainable & trained_names(model, train) for train in {phase.train for phase in self.phases}
            }
        self._set_phase(model, state)
        if state.num_input_tokens_seen >= self.budget_tokens and state.global_step < state.max_steps:
            raise Refusal(
                f"budget_tokens = {self.budget_tokens:,}: all of them have been seen, so there is nothing to resume. Raise the "
                f"budget."
            )
        if (
            self.export == "best"
            and self._best_loss is None
            and self.export_dir is not None
            and self.export_dir.exists()
        ):
            name = loss_to_compare(args)
            losses = [entry[name] for entry in state.log_history if name in entry and entry["step"]]
            self._best_loss = min(filter(math.isfinite, losses), default=None)  # of the run that is resumed

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._tokens_before_step = state.num_input_tokens_seen
        self._set_phase(model, state)

    def on_pre_optimizer_step(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        if args.fp16:  # its scaler meets infinite gradients as a matter of course, and skips them
            return
        gradients = [tensor.grad for tensor in model.parameters() if tensor.grad is not None]
        if gradients and not math.isfinite(float(torch.nn.utils.get_total_norm(gradients))):
            raise NonFiniteGradient(
                f"step {state.global_step + 1} ({batches_of_step(args, state.global_step, train_dataloader)}, "
                f"{state.num_input_tokens_seen:,} tokens seen): the gradient is not finite. The weights are still those "
                f"of step {state.global_step}; checkpoints in {args.output_dir} are untouched. Start again with a lower "
                f"learning rate, or look at the batch."
            )

    def on_step_end(self, args, state, control, **kwargs):
        seen = state.num_input_tokens_seen
        self._step_tokens = seen - self._tokens_before_step
        if state.global_step == 1 and self.tokens_per_step not in (None, self._step_tokens):
            raise Refusal(
                f"tokens_per_step = {self.tokens_per_step:,}, but the first step had {self._step_tokens:,} (rows x their length x "
                f"accumulation x processes). Give that number, or leave it out where steps differ."
            )
        if seen + self._step_tokens > self.budget_tokens and not self.ends_with_data:
            control.should_training_stop = True
            control.should_log = True
        return control

    def on_evaluate(self, args, state, control, metrics=None, model=None, processing_class=None, **kwargs):
        loss = (metrics or {}).get(loss_to_compare(args))
        if self.export != "best" or self.export_dir is None or loss is None or not state.global_step:
            return
        if math.isfinite(loss) and (self._best_loss is None or loss < self._best_loss):
            self._write(model, processing_class, state, replace=self._best_loss is not None)
            self._best_loss = loss

    def on_train_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        trained = frozenset().union(*self._trained.values())
        for name, tensor in model.named_parameters():
            if name in trained:
                tensor.requires_grad_(True)
        if self._use_cache is not None:  # Trainer turned it off, and would save it so
            model.config.use_cache = self._use_cache
        seen, writes = state.num_input_tokens_seen, self.export_dir is not None
        if not self.ends_with_data and seen + self._step_tokens <= self.budget_tokens:
            logger.warning(
                f"Trained on {seen:,} of {self.budget_tokens:,} tokens: the data, max_steps or another callback ended the "
                f"run, wherever its phases and learning rates were. Raise num_train_epochs, or lower the budget."
            )
        if writes and self.export == "best" and self._best_loss is None:
            logger.warning(f"export = best: no evaluation gave {loss_to_compare(args)}. The last student is written.")
        if writes and (self.export == "last" or self._best_loss is None):
            self._write(model, processing_class, state, replace=False)

    def tokens_seen(self, state) -> int:
        """Padding at the end of data that hold exactly the budget is not counted."""
        seen = state.num_input_tokens_seen
        return min(seen, self.budget_tokens) if self.ends_with_data else seen

    @property
    def steps_are_known(self) -> bool:
        return self.ends_with_data or self.tokens_per_step is not None

    def estimated_steps(self, state, step: int) -> float | None:
        """How many the budget makes if all are as the mean of the first `step`; None where that is known, or nobody can say."""
        seen = state.num_input_tokens_seen
        return None if self.steps_are_known or not (seen and step) else step * self.budget_tokens / seen

    def phase(self, state) -> Phase:
        """By steps where their number is known to fit the budget, else by tokens."""
        by_tokens = self._tokens_before_step / self.budget_tokens
        progress = state.global_step / state.max_steps if self.steps_are_known else by_tokens
        return self.phases[locate(self.phases, progress)]

    def facts(self, model, state) -> dict:
        """What is logged along with every loss."""
        return {
            "tokens_seen": self.tokens_seen(state),
            "budget_fraction_used": self.tokens_seen(state) / self.budget_tokens,
        } | cache_facts(model)

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if state.log_history and logs is not None:
            logs.update(self.facts(model, state))
            state.log_history[-1].update(self.facts(model, state))

    def _check_trainer(self, args) -> None:
        if self._args is not args:
            raise Refusal(
                "UptrainCallback: this Trainer was made without it, so tokens are not counted and max_steps is not set. Give "
                "it to Trainer in callbacks=[...], not to add_callback."
            )
        for number, phase in enumerate(self.phases, start=1):
            of_its_own = (phase.learning_rate, phase.attention_learning_rate) != (1.0, 1.0)
            if not self.follows_objectives and (phase.objective.needs_teacher or of_its_own):
                raise Refusal(
                    f"phase {number}: a callback can neither change a Trainer's loss nor its learning rates, so its "
                    f"{'learning rate' if of_its_own else 'objective'} would be passed over. Use UptrainTrainer, or "
                    f"DistillationMixin before your Trainer class."
                )

    def _set_phase(self, model, state) -> None:
        if not self.phases:
            return
        phase = self.phase(state)
        if phase is not self._phase:
            self._phase = phase
            for module in model.modules():  # FSDP2 leaves some whole after an evaluation, and would forget the change
                if hasattr(module, "reshard"):
                    module.reshard()
            everything, now = frozenset().union(*self._trained.values()), self._trained[phase.train]
            for name, tensor in model.named_parameters():
                if name in everything:
                    tensor.requires_grad_(name in now)

    def _write(self, model, processing_class, state, replace: bool) -> None:
        source = Path(self.source or getattr(model, "name_or_path", "") or "/nowhere")
        export_student(
            model,
            self.export_dir,
            source=source if source.is_dir() else None,
            uptraining={"tokens_seen": self.tokens_seen(state), "steps": state.global_step},
            dtype=self.export_dtype,
            processing_class=processing_class,
            overwrite=self.overwrite or replace,
            writes=state.is_world_process_zero,
        )


def resolve_budget(budget_tokens: int | None, budget_fraction: float | None, pretraining_tokens: int | None) -> int:
    """Raises Refusal unless exactly one way of saying it was used, and it says a positive number of tokens."""
    if (budget_tokens is None) == (budget_fraction is None):
        raise Refusal(
            "budget: say how long to train, by budget_tokens or by budget_fraction of the donor's pre-training."
        )
    if budget_fraction is not None:
        if pretraining_tokens is None:
            raise Refusal(
                f"budget_fraction = {budget_fraction}: of how many tokens? Checkpoints do not say what they were trained "
                f"on: give pretraining_tokens, or the budget as budget_tokens."
            )
        if not 0 < budget_fraction < math.inf or pretraining_tokens < 1:
            raise Refusal(
                f"budget_fraction = {budget_fraction} of pretraining_tokens = {pretraining_tokens} is no budget. "
                f"Use positive numbers; the GQA paper uses 0.05."
            )
        budget_tokens = round(budget_fraction * pretraining_tokens)
    if not isinstance(budget_tokens, int) or isinstance(budget_tokens, bool) or budget_tokens < 1:
        raise Refusal(f"budget_tokens = {budget_tokens!r} is no budget. Use a positive whole number of tokens.")
    return budget_tokens


def refuse_reentrant_checkpointing(args) -> None:
    """Reentrant checkpointing gives wrong gradients, without an error, for anything taken out of a layer by a hook."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        kwargs = getattr(args, f"{name}_kwargs", None)
        if kwargs and kwargs.get("use_reentrant"):
            raise Refusal(
                f"{name}_kwargs = {kwargs}: reentrant checkpointing gives silently wrong gradients where layers share "
                f"states or are matched to the teacher's. Use {{'use_reentrant': False}}."
            )
        if getattr(args, name, False) and not kwargs:
            setattr(args, f"{name}_kwargs", {"use_reentrant": False})


def loss_to_compare(args) -> str:
    """`eval_loss`, or the loss that `metric_for_best_model` names."""
    name = args.metric_for_best_model or "eval_loss"
    name = name if name.startswith("eval_") else f"eval_{name}"
    return name if name.endswith("loss") else "eval_loss"


def batches_of_step(args, step: int, dataloader) -> str:
    """Which batches of one process a step (from 0) consists of, in words; None: of unknown number."""
    accumulated = args.gradient_accumulation_steps
    batches = len(dataloader) if hasattr(dataloader, "__len__") else None
    first = step % max(1, -(-batches // accumulated)) * accumulated if batches else step * accumulated
    last = min(first + accumulated, batches or math.inf)
    which = f"batch {first + 1}" if last == first + 1 else f"batches {first + 1} to {last}"
    return f"{which} of this pass over the data" if batches else which


def cache_facts(model) -> dict:
    config = getattr(model, "config", None)
    heads = cached_heads(config) if config is not None else None
    if heads is None:
        return {}
    return {"kv_cache_bytes_per_token": cache_bytes_per_token_computed(config, heads, model.dtype)}
