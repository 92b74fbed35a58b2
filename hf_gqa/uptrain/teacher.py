"""The donor as teacher: beside the student in memory, or built from the student's own frozen tensors."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..convert.donor import Donor
from ..refusal import Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherMemory:
    """Bytes of a teacher's parameters and buffers, each storage counted once.

    Args:
        own_bytes: what the teacher adds to the student's memory.
        shared_bytes: what it uses of the student's.
    """

    own_bytes: int
    shared_bytes: int


def load_teacher(donor: Donor, student: nn.Module) -> PreTrainedModel:
    """The donor in its own class, using the student's tensors wherever those are the donor's and stay so.

    A tensor is shared if the student has it under the donor's name, with the donor's values, and it requires no
    gradient: freeze first what shall never be trained, and do not unfreeze it while the teacher lives. All others are the teacher's own, so its logits equal those of the donor loaded in the student's dtype bit for
    bit, now and after any number of steps. Where everything is trained, that is a second model.

    Args:
        donor: what the student was converted from.
        student: bare, or wrapped by peft; on one device.

    Raises:
        Refusal: the student's parameters are sharded over processes, so that there is nothing whole to share.
    """
    student_tensors = dict(_plain_names(student))
    some = next(iter(student_tensors.values()))
    if type(some.data).__name__ == "DTensor":
        raise Refusal(
            "teacher: the student is already sharded over processes, so the teacher cannot use its tensors. Make the "
            "teacher before the model is wrapped."
        )
    prefix = f"{donor.model_class.base_model_prefix}."
    by_body_name = {name.removeprefix(prefix): name for name in student_tensors}
    state = {}
    for stored_name in (name for names in donor.tensors.shards.values() for name in names):
        if stored_name in donor.dropped:
            continue
        tensor = donor.tensors.get(stored_name).to(some.dtype)
        twin = student_tensors.get(by_body_name.get(stored_name.removeprefix(prefix)))
        shared = twin is not None and not twin.requires_grad and _same(tensor, twin)
        state[stored_name] = twin.data if shared else tensor.to(some.device)
    teacher = donor.model_class.from_pretrained(
        None,
        config=donor.model_config,
        state_dict=state,
        dtype=some.dtype,
        attn_implementation=_attention_for(donor, getattr(student.config, "_attn_implementation", None)),
    )
    teacher.config.use_cache = False
    return teacher.to(some.device).eval().requires_grad_(False)


def _attention_for(donor: Donor, asked: str | None) -> str | None:
    """The student's, where the donor's class has it: some native classes compute their attention eagerly only."""
    is_native = donor.config.model_type == donor.family.model_type
    return "eager" if is_native and "sdpa" in str(asked) and not donor.model_class._supports_sdpa else asked


def teacher_memory(teacher: nn.Module, student: nn.Module) -> TeacherMemory:
    """What the teacher adds to the student, counted from the storages they really use."""
    of_student = {tensor.untyped_storage().data_ptr() for tensor in _tensors(student)}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(teacher)}
    shared = sum(size for pointer, size in storages.items() if pointer in of_student)
    return TeacherMemory(own_bytes=sum(storages.values()) - shared, shared_bytes=shared)


def check_vocabulary(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Raises Refusal unless both models predict the same tokens."""
    theirs, ours = teacher.config.get_text_config().vocab_size, student.config.get_text_config().vocab_size
    if theirs != ours:
        raise Refusal(
            f"teacher: its vocabulary has {theirs:,} tokens, the student's {ours:,}; their predictions cannot be compared. "
            f"Distil from the donor that the student was converted from."
        )


class TeacherLogits:
    """A teacher's logits, a chunk of tokens at a time, from hidden states where the head is all that follows them.

    Some families do more than that (soft-capping, scaling). Whether this one does is found by trying: then, and under
    wrappers that must see the whole forward pass, its logits are kept for the batch.
    """

    def __init__(self, teacher: nn.Module):
        self.teacher = teacher
        offloaded = getattr(teacher, "device", torch.device("cpu")).type == "meta"
        self.chunked = isinstance(teacher, PreTrainedModel) and not offloaded and _head_is_all(teacher)

    @torch.no_grad()
    def __call__(self, inputs: dict):
        """(start, stop) -> `[stop - start, V]` over the flattened tokens of this batch."""
        if not self.chunked:
            logits = self.teacher(**inputs, use_cache=False).logits.flatten(0, 1)
            return lambda start, stop: logits[start:stop]
        hidden = self.teacher.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        head = self.teacher.get_output_embeddings()
        autocast = torch.is_autocast_enabled(hidden.device.type)

        @torch.no_grad()
        def chunk(start: int, stop: int) -> torch.Tensor:
            with torch.autocast(hidden.device.type, enabled=autocast):
                return head(hidden[start:stop])

        return chunk


@torch.no_grad()
def _head_is_all(teacher: PreTrainedModel) -> bool:
    head = teacher.get_output_embeddings()
    if head is None or teacher.base_model is teacher:
        return False
    tokens = torch.arange(8, device=teacher.device).remainder(teacher.config.get_text_config().vocab_size).unsqueeze(0)
    whole = teacher(tokens, use_cache=False).logits
    return torch.allclose(
        head(teacher.base_model(tokens, use_cache=False).last_hidden_state), whole, rtol=1e-4, atol=1e-5
    )


def _plain_names(model: nn.Module):
    """(name, parameter) as without peft: adapters left out, wrapped layers under the names they had."""
    for name, parameter in model.named_parameters():
        if ".original_module." not in name and ".lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            yield plain.replace(".modules_to_save.default.", "."), parameter


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.detach().to(one.device))


def _tensors(model: nn.Module):
    yield from model.parameters()
    yield from model.buffers()
