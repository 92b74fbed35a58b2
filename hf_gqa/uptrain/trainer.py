"""A Trainer whose loss is the distance to a teacher."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..convert.donor import Donor, open_donor
from ..convert.student import check_same_tokenizer
from ..refusal import Refusal
from .callback import UptrainCallback
from .checkpoints import CompleteCheckpointsMixin
from .freezing import trained_names
from .layer_matching import LayerOutputs, relative_error
from .lora import keep_gradients
from .objectives import OBJECTIVES
from .phases import Objective, Phase, rate_of_step
from .stored_teacher import StoredTeacher
from .teacher import TeacherLogits, TeacherMemory, check_vocabulary, load_teacher, teacher_memory
from .token_loss import PARTS, TokenWeights, next_token_labels, token_loss
from .top_k_loss import top_k_kl


EVALUATION = Objective(cross_entropy=1.0)
GAP = "gap_nats_per_token"
LAYER_PARTS = ("attention_output", "hidden_state")


class DistillationMixin:
    """Before any Trainer class (`class Distilled(DistillationMixin, SFTTrainer)`): phases, teacher and their losses.

    Logs, beside Trainer's own: the parts of the loss, unweighted; the gap to the teacher's cross-entropy on the same
    tokens; `tokens_seen`; `kv_cache_bytes_per_token`. Evaluation gives the plain cross-entropy as `eval_loss`, and with
    a teacher the KL to it, top-1 agreement and the share of the gap closed since the first evaluation. Causal language
    models only.

    Args:
        uptrain: the callback with budget and phases; it need not be among `callbacks` as well.
        teacher: the donor as a folder, a Hub repository or an opened `Donor` (then it uses the student's frozen tensors,
            see `load_teacher`); a loaded model on any device and of any dtype; or a `StoredTeacher`. None if no phase
            needs one.

    Raises:
        Refusal: a phase that needs a teacher without one, one with another vocabulary, or layers to match with a
            stored one.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args, uptrain: UptrainCallback, teacher=None, **kwargs):
        model = kwargs["model"] if "model" in kwargs else args[0] if args else None
        if not isinstance(model, torch.nn.Module):
            raise Refusal(
                f"model = {model!r} is no model in memory, and what is trained must be known before Trainer is made. Load the "
                f"student, and leave model_init out."
            )
        uptrain.phases = uptrain.phases or OBJECTIVES.get("cross_entropy" if teacher is None else "distill")
        uptrain.follows_objectives, self.uptrain = True, uptrain
        check_teacher(teacher, uptrain.phases)
        freeze_the_rest(model, uptrain.phases)
        keep_gradients(model)
        arguments = args_of(args, kwargs)
        if arguments is not None:
            uptrain.set_arguments(arguments)
        if len({phase.train for phase in uptrain.phases}) > 1 and arguments is not None:
            arguments.ddp_find_unused_parameters = True  # what a phase freezes has no gradient to wait for
        callbacks = [callback for callback in kwargs.pop("callbacks", None) or [] if callback is not uptrain]
        super().__init__(*args, callbacks=[*callbacks, uptrain], **kwargs)
        if self.args.n_gpu > 1:
            raise Refusal(
                f"Trainer would use {self.args.n_gpu} GPUs from one process (DataParallel), which copies the student in every step "
                f"and loses what is recorded of its layers. Start it with `accelerate launch` or `torchrun`."
            )
        self._check_tied_layers()
        self.model_accepts_loss_kwargs = True  # so that Trainer counts the tokens of a whole accumulated batch
        self.accelerator.gradient_accumulation_steps = 1  # older Trainers let accelerate divide what is divided already
        self.teacher = self._prepared_teacher(teacher)
        self.teacher_logits = TeacherLogits(self.teacher) if isinstance(self.teacher, torch.nn.Module) else None
        self._layers = None
        if any(phase.objective.matches_layers for phase in uptrain.phases):
            self._layers = LayerOutputs(self.bare_model), LayerOutputs(self.teacher)
        self._sums: dict[str, torch.Tensor] = {}
        self._first_gap: dict[str, float] = {}
        self._prefix = "eval"

    @property
    def bare_model(self) -> PreTrainedModel:
        """Below peft's wrapper, if there is one."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _check_tied_layers(self) -> None:
        """Some releases of torch refuse layers that hold one weight and are sharded by themselves, others part them silently."""
        tied = getattr(self.bare_model.base_model, "tied_layers", {})
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if tied and self.is_fsdp_enabled and plugin.auto_wrap_policy is not None:
            mine, theirs = next(iter(tied.items()))
            raise Refusal(
                f"FSDP: '{mine}' is '{theirs}', and wrapping layer by layer would part the two. Set fsdp_auto_wrap_policy: "
                f"NO_WRAP, which shards all layers together, or launch with DDP (examples/accelerate/ddp.yaml)."
            )

    def teacher_memory(self) -> TeacherMemory | None:
        """What the teacher takes in memory; None if it takes none."""
        return teacher_memory(self.teacher, self.model) if isinstance(self.teacher, torch.nn.Module) else None

    def _prepared_teacher(self, teacher):
        if teacher is None or isinstance(teacher, StoredTeacher):
            return teacher
        if isinstance(teacher, str | Path):
            teacher = open_donor(teacher)
        if isinstance(teacher, Donor):
            self._check_tokenizer(teacher)
            teacher = load_teacher(teacher, self.model)
            if not self.place_model_on_device:  # Trainer leaves a student that FSDP shards on the CPU
                teacher = teacher.to(self.args.device)
        check_vocabulary(teacher, self.bare_model)
        return teacher.eval().requires_grad_(False)

    def _check_tokenizer(self, teacher: Donor) -> None:
        """Where both have one: a folder with nothing but a model says nothing of its text."""
        tokenizer = getattr(self, "processing_class", None)
        if isinstance(tokenizer, PreTrainedTokenizerBase) and (teacher.folder / "tokenizer_config.json").is_file():
            check_same_tokenizer(teacher, tokenizer, "teacher", "Distil from the donor of this student.")

    def _load_optimizer_and_scheduler(self, checkpoint):
        """A sharded optimizer restores only what is trained just now: go to the phase of the checkpoint first."""
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
            self.uptrain.on_train_begin(self.args, state, TrainerControl(), model=self.model)
        super()._load_optimizer_and_scheduler(checkpoint)

    def create_optimizer(self, model=None):
        """Trainer's, with the attention parameters in groups of their own where phases want another rate for them."""
        made_before = self.optimizer is not None
        optimizer = super().create_optimizer(*(() if model is None else (model,)))
        if not made_before and any(
            phase.attention_learning_rate != phase.learning_rate for phase in self.uptrain.phases
        ):
            names = trained_names(self.model, "attention")
            split_groups(optimizer, {id(tensor) for name, tensor in self.model.named_parameters() if name in names})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The phases' own schedules, one after the other, in place of `lr_scheduler_type` and warm-up."""
        if self.lr_scheduler is None:
            optimizer, phases = optimizer or self.optimizer, self.uptrain.phases

            def rate(of_attention: bool):
                def of_step(step: int) -> float:
                    num_steps = self.uptrain.estimated_steps(self.state, step) or num_training_steps
                    return rate_of_step(phases, min(step, num_steps - 1), num_steps, of_attention)

                return of_step

            rates = [rate(group.get("of_attention", False)) for group in optimizer.param_groups]
            self.lr_scheduler = LambdaLR(optimizer, rates)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The current phase's objective on one micro-batch; in evaluation the plain cross-entropy."""
        objective = self.uptrain.phase(self.state).objective if model.training else EVALUATION
        inputs = dict(inputs)
        if "labels" not in inputs:
            raise Refusal(
                f"batch: has {', '.join(sorted(inputs))} and no labels, so nothing says which tokens count. Let the collator add "
                f"them: input_ids, with -100 where a token is not to be predicted."
            )
        labels = inputs.pop("labels") if model.training else self._without_repeats(inputs.pop("labels"))
        rows = inputs.pop("row", None)
        inputs["use_cache"] = False
        num_items = (next_token_labels(labels) != -100).sum() if num_items_in_batch is None else num_items_in_batch
        teacher = self._teacher_pass(inputs, objective) if objective.needs_teacher or not model.training else None
        outputs = self._student_pass(model, inputs, objective)
        loss = torch.zeros((), device=labels.device)
        if not objective.teacher_forced:
            loss = loss + self._token_loss(outputs.logits, labels, teacher, rows, objective, num_items)
        loss = loss + self._layer_loss(labels, objective, num_items) + self._whole_graph(outputs, objective)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // max(1, self.get_tp_size()))
        return (loss, outputs) if return_outputs else loss

    def _without_repeats(self, labels_BS: torch.Tensor) -> torch.Tensor:
        """Accelerate fills the last batch of an evaluation with rows from its beginning; they count once."""
        state = self.accelerator.gradient_state
        if not (state.in_dataloader and state.end_of_dataloader and state.remainder > 0):
            return labels_BS
        first = self.accelerator.process_index * len(labels_BS)
        rows_B = torch.arange(first, first + len(labels_BS), device=labels_BS.device)
        return labels_BS.masked_fill((rows_B >= state.remainder).unsqueeze(-1), -100)

    def _whole_graph(self, outputs, objective: Objective) -> torch.Tensor | float:
        """Zero; FSDP gathers and reduces parameters when a gradient of what the model returned comes by."""
        if not objective.teacher_forced or self.accelerator.distributed_type != DistributedType.FSDP:
            return 0.0
        return 0.0 * outputs.logits.float().sum()

    def _teacher_pass(self, inputs: dict, objective: Objective):
        """The batch's teacher logits in chunks; with layers to match, what they put out is recorded on the way."""
        if self.teacher_logits is None:
            return None
        on_teacher = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
        if self.teacher.device.type != "meta":  # offloaded: accelerate moves what its hooks are given
            on_teacher = {name: value.to(self.teacher.device) for name, value in on_teacher.items()}
        if not objective.matches_layers:
            return self.teacher_logits(on_teacher)
        with self._layers[1].recorded():
            return self.teacher_logits(on_teacher)

    def _student_pass(self, model, inputs: dict, objective: Objective):
        if not objective.matches_layers:
            if self._layers is not None:
                self._layers[0].forced_inputs = {}
                self._layers[0].set_dropout(model.training)
            return model(**inputs)
        self._layers[0].set_dropout(not objective.teacher_forced)
        forced = self._layers[1].attention_inputs if objective.teacher_forced else None
        if objective.teacher_forced and self._attention_stands_alone():
            return self._layers[0].run_attention(forced)
        with self._layers[0].recorded(forced):
            return model(**inputs, **({"logits_to_keep": 1} if objective.teacher_forced else {}))

    def _attention_stands_alone(self) -> bool:
        """Nothing wraps the student that would have to see a forward pass, and it takes the teacher's arguments."""
        student, teacher = self.bare_model, self.teacher
        places = getattr(teacher, "hf_device_map", {"": None}).values()
        return len(set(places)) == 1 and (
            self.accelerator.distributed_type == DistributedType.NO
            and (student.dtype, student.device) == (teacher.dtype, teacher.device)
            and student.config.model_type.removeprefix("gqa_") == teacher.config.model_type.removeprefix("gqa_")
        )

    def _token_loss(self, logits, labels, teacher, rows, objective: Objective, num_items) -> torch.Tensor:
        stored_kl = torch.zeros((), device=logits.device)
        flat, labels_N = logits.flatten(0, 1), next_token_labels(labels)
        kl = objective.kl
        if isinstance(self.teacher, StoredTeacher) and kl and logits.requires_grad:
            mixed = objective.cross_entropy > 0
            ids_BSk, log_probs_BSk = self.teacher.rows(rows)
            stored_kl = top_k_kl(
                flat,
                ids_BSk.flatten(0, 1).to(flat.device),
                log_probs_BSk.flatten(0, 1).to(flat.device),
                (labels_N != -100) / num_items,
                in_place=True,
            )
            self._add("kl", stored_kl.detach() * num_items, (labels_N != -100).sum())
            if not mixed:
                return kl * stored_kl
            kl, flat = 0.0, flat.clone()  # both losses write their gradient over the logits
        weights = TokenWeights(
            kl=kl if teacher is not None else 0.0,
            cross_entropy=objective.cross_entropy,
            teacher_choice=objective.teacher_choice,
            temperature=objective.temperature,
        )
        loss, parts = token_loss(flat, labels_N, teacher, weights, num_items)
        for name, value in zip(PARTS[:-1], parts[:-1], strict=True):
            if teacher is not None or name == "cross_entropy":
                self._add(name, value, parts[-1])
        return loss + objective.kl * stored_kl

    def _layer_loss(self, labels, objective: Objective, num_items) -> torch.Tensor:
        loss = torch.zeros((), device=labels.device)
        counts = (next_token_labels(labels) != -100).view_as(labels)
        for name, kept in zip(LAYER_PARTS, ("attention", "hidden"), strict=True):
            weight = getattr(objective, name)
            if weight:
                student, teacher = getattr(self._layers[0], kept), getattr(self._layers[1], kept)
                total = relative_error(student, teacher, counts)
                self._add(name, total.detach(), counts.sum())
                loss = loss + weight * total / num_items
        return loss

    def _add(self, name: str, total: torch.Tensor, tokens: torch.Tensor) -> None:
        pair = torch.stack([total.detach().float(), tokens.float()])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        outer, self._sums, self._prefix = (self._sums, self._prefix), {}, metric_key_prefix
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._sums, self._prefix = outer

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the parts of the loss, per token, to what Trainer logs, before any tracker sees it."""
        evaluated = f"{self._prefix}_loss" in logs
        if evaluated or "loss" in logs:
            found = self._means()
            logs.update(self._evaluation_facts(found) if evaluated else training_facts(found))
        logs.update(self.uptrain.facts(self.bare_model, self.state))
        super().log(logs, *args, **kwargs)

    def _means(self) -> dict[str, float]:
        names = sorted(self._sums)
        if not names:
            return {}
        table = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]), reduction="sum")
        self._sums = {}
        return {name: (total / max(1.0, tokens)) for name, (total, tokens) in zip(names, table.tolist(), strict=True)}

    def _evaluation_facts(self, means: dict[str, float]) -> dict[str, float]:
        facts = {"loss": means["cross_entropy"]}
        if "teacher_cross_entropy" in means:
            gap, name = means["cross_entropy"] - means["teacher_cross_entropy"], f"{self._prefix}_{GAP}"
            logged = (entry[name] for entry in self.state.log_history if name in entry)  # of a run that is resumed
            first_gap = self._first_gap.setdefault(name, next(logged, gap))
            facts |= {
                "teacher_loss": means["teacher_cross_entropy"],
                "kl_nats_per_token": means["kl"],
                "top1_agreement_fraction": means["agreement"],
                GAP: gap,
            }
            if first_gap > 0:
                facts["gap_closed_fraction"] = 1 - gap / first_gap
        return {f"{self._prefix}_{fact}": value for fact, value in facts.items()}


class UptrainTrainer(DistillationMixin, CompleteCheckpointsMixin, Trainer):
    """Trainer with phases, a teacher, and checkpoints that say whether they are complete, and of which phases and data."""

    def checkpoint_facts(self) -> dict:
        return {"phases": [phase.to_dict() for phase in self.uptrain.phases], "data": facts_of_data(self.train_dataset)}


def facts_of_data(rows) -> dict:
    """How many rows, and the tokens of a few of them; nothing of a stream, which shows its rows only once."""
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__") and len(rows)):
        return {}
    some = [rows[row] for row in sorted({0, len(rows) // 2, len(rows) - 1})]
    tokens = [torch.as_tensor(row["input_ids"]).tolist() for row in some if "input_ids" in row]
    return {"rows": len(rows), "sha256": hashlib.sha256(json.dumps(tokens).encode()).hexdigest()}


def args_of(args: tuple, kwargs: dict):
    """Trainer's second argument."""
    return kwargs.get("args", args[1] if len(args) > 1 else None)


def training_facts(means: dict[str, float]) -> dict[str, float]:
    facts = {{"agreement": "top1_agreement_fraction"}.get(name, f"loss_{name}"): value for name, value in means.items()}
    if "teacher_cross_entropy" in means:
        facts["gap_to_teacher"] = means["cross_entropy"] - means["teacher_cross_entropy"]
    return facts


def split_groups(optimizer: torch.optim.Optimizer, attention: set[int]) -> None:
    """Give the parameters whose ids are in `attention` groups of their own, with the settings of those they leave."""
    for group in list(optimizer.param_groups):
        leaving = [tensor for tensor in group["params"] if id(tensor) in attention]
        group["params"] = [tensor for tensor in group["params"] if id(tensor) not in attention]
        group["of_attention"] = False
        if leaving:
            optimizer.add_param_group(group | {"params": leaving, "of_attention": True})


def check_teacher(teacher, phases: Sequence[Phase]) -> None:
    """Raises Refusal unless every phase has the teacher it needs."""
    for number, phase in enumerate(phases, start=1):
        if phase.objective.needs_teacher and teacher is None:
            raise Refusal(
                f"phase {number}: its objective compares with a teacher, and there is none. Give the donor as teacher, or "
                f"use the objective cross_entropy."
            )
        if isinstance(teacher, StoredTeacher) and (phase.objective.matches_layers or phase.objective.teacher_choice):
            raise Refusal(
                f"phase {number}: stored teacher logits hold no layer outputs. Use an objective of kl and cross_entropy, or "
                f"the donor itself as teacher."
            )
        if isinstance(teacher, StoredTeacher) and phase.objective.temperature != 1.0:
            raise Refusal(
                f"phase {number}: temperature = {phase.objective.temperature}, but stored teacher logits are of "
                f"temperature 1. Use 1, or the donor itself as teacher."
            )


def freeze_the_rest(model: torch.nn.Module, phases: Sequence[Phase]) -> None:
    """Freeze what no phase trains; the teacher can then share it."""
    wanted = frozenset().union(*(trained_names(model, train) for train in {phase.train for phase in phases}))
    for name, tensor in model.named_parameters():
        if name not in wanted:
            tensor.requires_grad_(False)
