"""A teacher made of the student's frozen tensors is the donor, bit for bit, for as long as the student is trained."""

import re

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_gqa import Refusal, convert, open_donor
from hf_gqa.uptrain.freezing import trained_names
from hf_gqa.uptrain.lora import lora_config
from hf_gqa.uptrain.objectives import OBJECTIVES
from hf_gqa.uptrain.phases import Objective, Phase
from hf_gqa.uptrain.stored_teacher import StoredTeacher
from hf_gqa.uptrain.teacher import TeacherLogits, check_vocabulary, load_teacher, teacher_memory
from hf_gqa.uptrain.trainer import check_teacher

from .conformance import every_attention, in_bfloat16, logits_of, some_families
from .phases import PEFT_ASKS, PEFT_SAYS, models_of, refused, trainer_of
from .tiny_donors import VOCAB_SIZE, tiny_donor, tokens_and_mask


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WITH_TEACHER = Objective(kl=0.6, cross_entropy=0.3, temperature=2.0)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def donor_on_disk(folder, model_type: str, dtype=torch.float32, **changes):
    """The donor in memory, never touched by what is tested, and its folder."""
    donor = tiny_donor(model_type, **changes)
    donor = in_bfloat16(donor) if dtype == torch.bfloat16 else donor
    donor.save_pretrained(folder)
    return donor


def freeze_all_but(model, train: str) -> None:
    names = trained_names(model, train)
    for name, tensor in model.named_parameters():
        if name not in names:
            tensor.requires_grad_(False)


def train(student, num_steps: int = 3) -> set[str]:
    """Real steps on next-token prediction; the names of the parameters that they changed."""
    before = {name: tensor.detach().clone() for name, tensor in student.named_parameters()}
    trained = [tensor for tensor in student.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
    tokens, _ = tokens_and_mask()
    for _ in range(num_steps):
        student(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name for name, tensor in student.named_parameters() if not torch.equal(tensor, before[name])}


def assert_is_the_donor(teacher, donor) -> None:
    for padded in (False, True):
        assert torch.equal(logits_of(teacher, padded), logits_of(donor, padded))


def storages(model) -> dict[int, int]:
    """Bytes by address, of parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def expected_own_bytes(teacher, student) -> int:
    """Of the donor's tensors that the student lacks, has with other values, or trains; by name, not by address."""
    ours = dict(student.named_parameters())
    own = sum(buffer.nbytes for buffer in teacher.buffers())
    for name, tensor in teacher.named_parameters():
        twin = ours.get(name)
        if twin is None or twin.requires_grad or twin.shape != tensor.shape or not torch.equal(twin, tensor):
            own += tensor.nbytes
    return own


@some_families
@pytest.mark.parametrize("export", ["bundle", pytest.param("auto", marks=pytest.mark.slow)])
@every_attention
@every_dtype
def test_shared_teacher_is_the_donor_before_and_after_steps(model_type, export, attention, dtype, tmp_path):
    donor = donor_on_disk(tmp_path, model_type, dtype)
    donor.set_attn_implementation(attention)
    student = convert(donor, num_key_value_heads=2, export=export)
    freeze_all_but(student, "attention")
    opened = open_donor(tmp_path)
    teacher = load_teacher(opened, student)
    assert type(teacher) is type(donor) and teacher.dtype == dtype and not teacher.training
    assert not any(tensor.requires_grad for tensor in teacher.parameters())
    assert teacher.config.use_cache is False and opened.config.use_cache is True
    assert student.config.use_cache is True
    assert_is_the_donor(teacher, donor)
    memory = teacher_memory(teacher, student)
    assert memory.own_bytes == expected_own_bytes(teacher, student)
    assert memory.shared_bytes == sum(storages(teacher).values()) - memory.own_bytes > 0
    assert len(train(student)) == sum(tensor.requires_grad for tensor in student.parameters()) > 0
    assert_is_the_donor(teacher, donor)
    assert teacher_memory(teacher, student) == memory


def test_student_of_a_native_class_with_other_names(tmp_path):
    """gpt2 as multi-query gpt_bigcode stores linear layers the other way round: embeddings and norms are shared."""
    donor = donor_on_disk(tmp_path, "gpt2")
    student = convert(donor, num_key_value_heads=1)
    assert student.config.model_type == "gpt_bigcode"
    student.transformer.wte.requires_grad_(False), student.transformer.wpe.requires_grad_(False)
    teacher = load_teacher(open_donor(tmp_path), student)
    assert_is_the_donor(teacher, donor)
    assert teacher_memory(teacher, student).own_bytes == expected_own_bytes(teacher, student)
    assert teacher.transformer.wte.weight.data_ptr() == student.transformer.wte.weight.data_ptr()
    train(student)
    assert_is_the_donor(teacher, donor)


@some_families
def test_what_is_frozen_is_shared_tensor_by_tensor(model_type, tmp_path):
    donor = donor_on_disk(tmp_path, model_type)
    student = convert(donor, num_key_value_heads=2, export="bundle")
    freeze_all_but(student, "key_value")
    teacher = load_teacher(open_donor(tmp_path), student)
    ours = {name: tensor.data_ptr() for name, tensor in student.named_parameters()}
    theirs = {name: tensor.data_ptr() for name, tensor in teacher.named_parameters()}
    own = {name for name in theirs if theirs[name] != ours.get(name)}
    parts = ("c_attn",) if model_type == "gpt2" else ("k_proj", "v_proj")
    assert own == {name for name in theirs if name.split(".")[-2] in parts} != set()


@some_families
@every_dtype
def test_nothing_is_shared_where_everything_is_trained(model_type, dtype, tmp_path):
    donor = donor_on_disk(tmp_path, model_type, dtype)
    student = convert(donor, num_key_value_heads=2, export="bundle")
    teacher = load_teacher(open_donor(tmp_path), student)
    assert not storages(teacher).keys() & storages(student).keys()
    memory = teacher_memory(teacher, student)
    assert (memory.own_bytes, memory.shared_bytes) == (sum(storages(teacher).values()), 0)
    assert len(train(student)) == len(list(student.parameters()))
    assert_is_the_donor(teacher, donor)


def test_frozen_tensor_with_other_values_is_not_shared(tmp_path):
    donor = donor_on_disk(tmp_path, "llama")
    student = convert(donor, num_key_value_heads=2).requires_grad_(False)
    with torch.no_grad():
        student.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    teacher = load_teacher(open_donor(tmp_path), student)
    assert_is_the_donor(teacher, donor)
    assert teacher_memory(teacher, student).own_bytes == expected_own_bytes(teacher, student)


@pytest.mark.parametrize("max_shard_size", ["12KB", pytest.param("1GB", marks=pytest.mark.slow)])
@pytest.mark.parametrize("prefixed", [True, False])
@some_families
def test_donor_sharded_or_without_prefix(model_type, prefixed, max_shard_size, tmp_path):
    donor = tiny_donor(model_type)
    tied = donor.config.tie_word_embeddings
    if not prefixed and not tied:
        pytest.skip("the head of a base model's checkpoint is the embedding, or missing")
    (donor if prefixed else donor.base_model).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    student = convert(donor, num_key_value_heads=2, export="bundle").requires_grad_(False)
    opened = open_donor(tmp_path)
    teacher = load_teacher(opened, student)
    tokens, _ = tokens_and_mask()
    with torch.no_grad():
        found = teacher.base_model(tokens).last_hidden_state
        assert torch.equal(found, donor.base_model(tokens).last_hidden_state)
    assert teacher_memory(teacher, student).shared_bytes > 0


@pytest.mark.parametrize("tie", [True, False])
@some_families
def test_tied_and_untied_heads(model_type, tie, tmp_path):
    donor = donor_on_disk(tmp_path, model_type, tie_word_embeddings=tie)
    student = convert(donor, num_key_value_heads=2, export="bundle")
    freeze_all_but(student, "attention")
    teacher = load_teacher(open_donor(tmp_path), student)
    head, embeddings = teacher.get_output_embeddings().weight, teacher.get_input_embeddings().weight
    assert (head.data_ptr() == embeddings.data_ptr()) == tie
    assert head.data_ptr() == student.get_output_embeddings().weight.data_ptr()
    train(student)
    assert_is_the_donor(teacher, donor)


@some_families
@every_dtype
@pytest.mark.filterwarnings(PEFT_ASKS, PEFT_SAYS)
def test_peft_student_shares_its_frozen_base(model_type, dtype, tmp_path):
    donor = donor_on_disk(tmp_path, model_type, dtype)
    bare = convert(donor, num_key_value_heads=2, export="bundle")
    student = get_peft_model(bare, lora_config(bare, rank=2))
    teacher = load_teacher(open_donor(tmp_path), student)
    assert_is_the_donor(teacher, donor)
    ours = storages(student)
    attention = re.compile(r"\.(c_attn|k_proj|v_proj)\.")
    for name, tensor in teacher.named_parameters():
        assert (tensor.data_ptr() in ours) == (attention.search(name) is None), name
    memory = teacher_memory(teacher, student)
    replaced = sum(tensor.nbytes for name, tensor in teacher.named_parameters() if attention.search(name))
    assert memory.own_bytes == replaced + sum(buffer.nbytes for buffer in teacher.buffers())
    changed = train(student)
    assert any(".lora_B." in name for name in changed) and any(".modules_to_save." in name for name in changed)
    assert_is_the_donor(teacher, donor)
    assert teacher_memory(teacher, student) == memory


def test_student_in_another_dtype(tmp_path):
    """The teacher is the donor as loaded in the student's dtype."""
    donor_on_disk(tmp_path, "llama")
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    student = convert(narrow, num_key_value_heads=2)
    freeze_all_but(student, "attention")
    teacher = load_teacher(open_donor(tmp_path), student)
    assert_is_the_donor(teacher, narrow)
    assert teacher_memory(teacher, student).own_bytes == expected_own_bytes(teacher, student)


def test_sharded_student_is_refused(tmp_path, monkeypatch):
    donor = donor_on_disk(tmp_path, "llama")
    student = convert(donor, num_key_value_heads=2)

    class DTensor(torch.Tensor):
        pass

    name, parameter = next(iter(student.named_parameters()))
    monkeypatch.setattr(
        student, "named_parameters", lambda: iter([(name, torch.nn.Parameter(parameter.data.as_subclass(DTensor)))])
    )
    with pytest.raises(Refusal) as refusal:
        load_teacher(open_donor(tmp_path), student)
    assert str(refusal.value) == (
        "teacher: the student is already sharded over processes, so the teacher cannot use its tensors. Make the "
        "teacher before the model is wrapped."
    )


def test_other_vocabulary_is_refused():
    donor = tiny_donor("llama")
    check_vocabulary(donor, convert(donor, num_key_value_heads=2))
    with pytest.raises(Refusal) as refusal:
        check_vocabulary(tiny_donor("llama", vocab_size=1100), donor)
    assert str(refusal.value) == (
        f"teacher: its vocabulary has 1,100 tokens, the student's {VOCAB_SIZE}; their predictions cannot be compared. "
        "Distil from the donor that the student was converted from."
    )


def chunked(logits: TeacherLogits, inputs: dict, chunk_tokens: int) -> torch.Tensor:
    chunk, num_tokens = logits(inputs), inputs["input_ids"].numel()
    starts = range(0, num_tokens, chunk_tokens)
    return torch.cat([chunk(start, min(start + chunk_tokens, num_tokens)) for start in starts])


@some_families
@every_dtype
@pytest.mark.parametrize("chunk_tokens", [1, 7, 40])
def test_chunked_logits_equal_whole_ones(model_type, dtype, chunk_tokens):
    teacher = tiny_donor(model_type)
    teacher = in_bfloat16(teacher) if dtype == torch.bfloat16 else teacher
    tokens, mask = tokens_and_mask()
    logits = TeacherLogits(teacher)
    assert logits.chunked
    found = chunked(logits, {"input_ids": tokens, "attention_mask": mask}, chunk_tokens)
    expected = logits_of(teacher, padded=True).flatten(0, 1)
    assert found.dtype == dtype and not found.requires_grad
    relative = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found, expected, rtol=0, atol=relative * expected.abs().max().item())


def test_head_is_run_on_no_more_than_a_chunk():
    teacher, (tokens, _) = tiny_donor("llama"), tokens_and_mask()
    logits, seen = TeacherLogits(teacher), []
    teacher.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    chunked(logits, {"input_ids": tokens}, 15)
    assert seen == [(15, VOCAB_SIZE), (15, VOCAB_SIZE), (10, VOCAB_SIZE)]


def test_chunks_are_computed_under_the_autocast_of_the_batch():
    """Also where a chunk is asked for inside an autograd function, which turns autocast off."""
    teacher, (tokens, _) = tiny_donor("llama"), tokens_and_mask()
    logits = TeacherLogits(teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = teacher(tokens).logits.flatten(0, 1)
        chunk = logits({"input_ids": tokens})
    assert expected.dtype == chunk(0, 40).dtype == torch.bfloat16
    torch.testing.assert_close(chunk(0, 40), expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item())


def test_soft_capped_head_is_noticed_and_not_chunked():
    teacher = tiny_donor("gemma3_text", final_logit_softcapping=5.0)
    tokens, _ = tokens_and_mask()
    logits = TeacherLogits(teacher)
    assert not logits.chunked
    found, expected = chunked(logits, {"input_ids": tokens}, 7), logits_of(teacher).flatten(0, 1)
    assert torch.equal(found, expected) and expected.abs().max() <= 5
    teacher.config.final_logit_softcapping = None
    assert not torch.allclose(logits_of(teacher).flatten(0, 1), expected, atol=0.1)


def test_wrapped_teacher_is_not_chunked():
    """A wrapper such as FSDP must see the whole forward pass."""

    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, **inputs):
            return self.model(**inputs)

    teacher, (tokens, _) = tiny_donor("llama"), tokens_and_mask()
    logits = TeacherLogits(Wrapper(teacher))
    assert not logits.chunked
    assert torch.equal(chunked(logits, {"input_ids": tokens}, 7), logits_of(teacher).flatten(0, 1))


def stored_teacher() -> StoredTeacher:
    return StoredTeacher.__new__(StoredTeacher)


@pytest.mark.parametrize(
    ("teacher", "objective", "message"),
    [
        (
            None,
            WITH_TEACHER,
            "phase 2: its objective compares with a teacher, and there is none. Give the donor as teacher, or use the "
            "objective cross_entropy.",
        ),
        *(
            (
                stored_teacher(),
                objective,
                "phase 2: stored teacher logits hold no layer outputs. Use an objective of kl and cross_entropy, or the "
                "donor itself as teacher.",
            )
            for objective in (
                Objective(hidden_state=1.0),
                Objective(attention_output=1.0),
                Objective(teacher_choice=1.0),
            )
        ),
        (
            stored_teacher(),
            Objective(kl=1.0, temperature=2.0),
            "phase 2: temperature = 2.0, but stored teacher logits are of temperature 1. Use 1, or the donor itself as "
            "teacher.",
        ),
    ],
)
def test_teacher_that_a_phase_cannot_use_is_refused(teacher, objective, message, tmp_path):
    phases = Phase(objective=Objective(cross_entropy=1.0)), Phase(objective=objective)
    assert refused(check_teacher, teacher, phases) == message
    student, _ = models_of()
    assert refused(trainer_of, tmp_path, student, teacher, phases) == message


def test_teacher_with_another_vocabulary_is_refused(tmp_path):
    student, _ = models_of()
    message = refused(
        trainer_of, tmp_path, student, tiny_donor("llama", vocab_size=50), (Phase(objective=WITH_TEACHER),)
    )
    assert message.startswith("teacher: its vocabulary has 50 tokens, the student's 99; ")


def test_phases_without_being_told(tmp_path):
    for teacher, name in ((None, "cross_entropy"), (tiny_donor("llama"), "distill")):
        student, _ = models_of()
        trainer = trainer_of(tmp_path, student, teacher, ())
        assert trainer.uptrain.phases == OBJECTIVES.get(name)
        assert trainer.callback_handler.callbacks.count(trainer.uptrain) == 1


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    student, donor = models_of()
    message = refused(trainer_of, tmp_path, student, donor, (Phase(objective=WITH_TEACHER),))
    assert message.startswith("Trainer would use 2 GPUs from one process (DataParallel), ")


def test_batches_without_labels_are_refused(tmp_path):
    student, donor = models_of()
    trainer = trainer_of(tmp_path, student, donor, (Phase(objective=WITH_TEACHER),))
    message = refused(trainer.compute_loss, student, {"input_ids": torch.ones(1, 4, dtype=torch.long)})
    assert message.startswith("batch: has input_ids and no labels, ")
