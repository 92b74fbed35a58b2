"""The two models of an evaluation, checked against each other and loaded alike."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...convert.decoding import check_decoding
from ...convert.donor import Donor
from ...convert.manifest import comes_from
from ...convert.model_kind import kind_of, why_no_kind
from ...convert.student import Student, check_same_tokens, open_student
from ...refusal import Refusal


ADVICE = "Evaluate against the donor that the student was converted from."


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Both models in one dtype, on one device, with one attention implementation, in evaluation mode.

    Args:
        kind: of both models, as in `convert/model_kind.py`.
        donor, student: ready to be called.
        student_name: what the user called it.
        notes: what could not be checked.
    """

    opened_donor: Donor
    opened_student: Student
    student_name: str
    donor: PreTrainedModel
    student: PreTrainedModel
    notes: tuple[str, ...]
    kind: str

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.opened_student.tokenizer

    @property
    def longest_context_tokens(self) -> int | None:
        """What both models have positions for; None where they name no limit."""
        return min((limit for limit in map(positions, (self.donor, self.student)) if limit), default=None)


def open_pair(
    student: str | Path, donor: Donor, dtype: str, device: str | None, attn_implementation: str | None
) -> Pair:
    """Raises Refusal for a student of another donor, with other tokens, or that predicts none."""
    stored = donor.tensors.dtype(next(name for names in donor.tensors.shards.values() for name in names))
    computed = stored if dtype == "auto" else getattr(torch, dtype)
    kind = kind_of(donor.model_class, donor.config)
    if kind is None:
        raise Refusal(f"donor {donor.name}: {why_no_kind(donor.model_class, donor.config)}. {ADVICE}")
    opened = open_student(student, computed, kind)
    notes = []
    if opened.manifest is None:
        notes.append("The student has no conversion_manifest.json: whether it comes from this donor was not checked.")
    elif not comes_from(opened.manifest, donor):
        raise Refusal(
            f"{student}: was converted from another donor ('{opened.manifest.donor['name']}', with other weights) than "
            f"{donor.name}. {ADVICE}"
        )
    check_same_tokens(donor, opened, "donor", ADVICE)
    if donor.config.hidden_size != opened.model.config.hidden_size:
        raise Refusal(
            f"{student}: has hidden_size = {opened.model.config.hidden_size}, donor {donor.name} has "
            f"{donor.config.hidden_size}, so it does not come from it. {ADVICE}"
        )
    loaded = donor.model_class.from_pretrained(donor.folder, config=donor.model_config, dtype=computed)
    for model in (loaded, opened.model):
        if attn_implementation is not None:
            _set_attention(model, attn_implementation)
        model.eval().requires_grad_(False).to(device_of(device))
    check_decoding(opened.model, str(student))
    return Pair(
        opened_donor=donor,
        opened_student=opened,
        student_name=str(student),
        donor=loaded,
        student=opened.model,
        notes=tuple(notes),
        kind=kind,
    )


def positions(model: PreTrainedModel) -> int | None:
    """Tokens that the model has positions for; RoBERTa and its like begin to count behind their padding token."""
    limit = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("embeddings.position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return min(limit or module.num_embeddings, module.num_embeddings) - module.padding_idx - 1
    return limit


def device_of(name: str | None) -> torch.device:
    """Raises Refusal for a device that torch does not know."""
    if name is None:
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refusal(
            f"device = {name!r} is not to be had ({str(error).splitlines()[0][:120]}). Leave it out, or use cpu."
        ) from None
    return device


def _set_attention(model: PreTrainedModel, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Refusal(
            f"attn_implementation = {name!r} cannot be used ({reason}). Use sdpa or eager, or leave it out."
        ) from None
