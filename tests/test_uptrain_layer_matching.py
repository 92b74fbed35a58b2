"""What layers put out is compared without disturbing the model, and teacher-forced attention alone equals the whole pass."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import OPTConfig, OPTForCausalLM

from hf_gqa import Refusal, convert
from hf_gqa.uptrain.layer_matching import LayerOutputs, relative_error
from hf_gqa.uptrain.lora import lora_config

from .conformance import DROPOUTS, every_attention, every_export, in_bfloat16, some_families
from .phases import PEFT_ASKS, PEFT_SAYS, every_objective, losses_of, models_of, phase_of, uptrained
from .tiny_donors import NUM_LAYERS, tiny_donor, tokens_and_mask


PARTS = ("attention", "hidden")
every_part = pytest.mark.parametrize("part", PARTS)


def inputs_of(padded: bool = True) -> dict:
    tokens, mask = tokens_and_mask()
    return {"input_ids": tokens, "use_cache": False} | ({"attention_mask": mask} if padded else {})


def counted() -> torch.Tensor:
    """Tokens that count: neither pad nor a few others."""
    counts = tokens_and_mask()[1].bool()
    counts[0, 5:8] = False
    return counts


def pair(model_type: str, export: str = "bundle", num_key_value_heads: int = 2, attention: str = "sdpa"):
    """Student and teacher, ready to be compared."""
    teacher = tiny_donor(model_type, **dict.fromkeys(DROPOUTS, 0.0)).requires_grad_(False)
    teacher.set_attn_implementation(attention)
    student = convert(teacher, num_key_value_heads=num_key_value_heads, export=export).requires_grad_(True)
    return student, teacher


def gradients_of(model) -> dict[str, torch.Tensor]:
    found = {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}
    model.zero_grad()
    return found


def assert_close(found: dict, expected: dict, relative: float = 1e-5) -> None:
    assert found.keys() == expected.keys() and expected
    of_all = max(tensor.abs().max().item() for tensor in expected.values())  # without rotation, a key's bias has none
    for name, tensor in expected.items():
        largest = max(tensor.abs().max().item(), of_all / 100)
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=relative * largest, msg=str(name))


def record_teacher(layers: LayerOutputs, teacher, inputs: dict) -> None:
    with torch.no_grad(), layers.recorded():
        teacher(**inputs)


def assert_alone_equals_whole(student, teacher, inputs: dict) -> None:
    """Attention modules run one by one, and within a forced pass: the same outputs and gradients."""
    ours, theirs = LayerOutputs(student), LayerOutputs(teacher)
    record_teacher(theirs, teacher, inputs)
    outputs, gradients = [], []
    for run in ("alone", "whole"):
        if run == "alone":
            ours.run_attention(theirs.attention_inputs)
        else:
            with ours.recorded(theirs.attention_inputs):
                student(**inputs)
        outputs.append({layer_idx: output.detach().clone() for layer_idx, output in ours.attention.items()})
        relative_error(ours.attention, theirs.attention, counted()).backward()
        gradients.append(gradients_of(student))
    assert_close(*outputs)
    assert_close(*gradients)
    assert len(outputs[0]) == NUM_LAYERS and all(".attn." in name or ".self_attn." in name for name in gradients[0])


@some_families
@every_export
@every_attention
@pytest.mark.parametrize("padded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_attention_alone_equals_the_whole_forced_pass(model_type, export, attention, padded):
    student, teacher = pair(model_type, export, attention=attention)
    assert_alone_equals_whole(student, teacher, inputs_of(padded))


@pytest.mark.parametrize("sharing", ["echo", "cross_layer_kv"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_attention_alone_borrows_too(model_type, sharing):
    teacher = tiny_donor(model_type, **dict.fromkeys(DROPOUTS, 0.0)).requires_grad_(False)
    student = convert(teacher, sharing=sharing, shared_layers=[1]).requires_grad_(True)
    assert_alone_equals_whole(student, teacher, inputs_of(True))


def by_hand(model, inputs: dict) -> tuple[dict, dict, dict]:
    """What goes into and out of each attention module, and out of each layer, by other hooks."""
    taken, put_out, hidden, handles = {}, {}, {}, []
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for layer_idx, layer in enumerate(layers):
        attention = layer.attn if hasattr(layer, "attn") else layer.self_attn

        def before(module, args, kwargs, layer_idx=layer_idx):
            taken[layer_idx] = args[0] if args else kwargs["hidden_states"]

        def after(module, args, output, layer_idx=layer_idx):
            put_out[layer_idx] = output[0]

        def after_layer(module, args, output, layer_idx=layer_idx):
            hidden[layer_idx] = output if torch.is_tensor(output) else output[0]

        handles += [attention.register_forward_pre_hook(before, with_kwargs=True)]
        handles += [attention.register_forward_hook(after), layer.register_forward_hook(after_layer)]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return taken, put_out, hidden


@some_families
@every_export
def test_what_is_recorded_is_what_the_layers_take_in_and_put_out(model_type, export):
    student, teacher = pair(model_type, export)
    for model in (student, teacher):
        taken, put_out, hidden = by_hand(model, inputs_of())
        layers = LayerOutputs(model)
        record_teacher(layers, model, inputs_of())
        assert layers.attention.keys() == layers.hidden.keys() == layers.attention_inputs.keys() == taken.keys()
        for layer_idx in range(NUM_LAYERS):
            args, kwargs = layers.attention_inputs[layer_idx]
            assert torch.equal(args[0] if args else kwargs["hidden_states"], taken[layer_idx])
            assert layers.attention[layer_idx].shape == layers.hidden[layer_idx].shape == (2, 20, 32)
            assert torch.equal(layers.attention[layer_idx], put_out[layer_idx])
            assert torch.equal(layers.hidden[layer_idx], hidden[layer_idx])


@some_families
@every_export
def test_forced_layers_take_the_teachers_inputs(model_type, export):
    """And those above get what the layers below made of them: only attention's input is replaced."""
    student, teacher = pair(model_type, export)
    ours, theirs = LayerOutputs(student), LayerOutputs(teacher)
    record_teacher(theirs, teacher, inputs_of())
    inputs = theirs.attention_inputs
    with torch.no_grad(), ours.recorded(inputs):
        student(**inputs_of())
    expected = {}
    for layer_idx, (args, kwargs) in inputs.items():
        with torch.no_grad():
            expected[layer_idx] = ours.attention_modules[layer_idx](*args, **kwargs)[0]
    assert_close(ours.attention, expected, 1e-6)
    with torch.no_grad(), ours.recorded():
        student(**inputs_of())
    assert torch.allclose(ours.attention[0], expected[0]) and not torch.allclose(ours.attention[1], expected[1])


@some_families
@every_export
def test_hooks_leave_the_plain_logits_alone(model_type, export):
    student, teacher = pair(model_type, export)
    with torch.no_grad():
        before = student(**inputs_of()).logits
        ours, theirs = LayerOutputs(student), LayerOutputs(teacher)
        assert torch.equal(student(**inputs_of()).logits, before)
        with ours.recorded():
            assert torch.equal(student(**inputs_of()).logits, before)
        record_teacher(theirs, teacher, inputs_of())
        ours.run_attention(theirs.attention_inputs)
        assert torch.equal(student(**inputs_of()).logits, before)
        with ours.recorded(theirs.attention_inputs):
            assert not torch.equal(student(**inputs_of()).logits, before)
        with ours.recorded():
            assert torch.equal(student(**inputs_of()).logits, before)
    assert not ours.forced_inputs


@some_families
@every_part
def test_identical_student_has_no_error(model_type, part):
    student, teacher = pair(model_type, num_key_value_heads=4)
    ours, theirs = LayerOutputs(student), LayerOutputs(teacher)
    record_teacher(theirs, teacher, inputs_of())
    for forced in (None, theirs.attention_inputs):
        with ours.recorded(forced):
            student(**inputs_of())
        error = relative_error(getattr(ours, part), getattr(theirs, part), counted())
        error.backward()
        assert error == 0 and all((gradient == 0).all() for gradient in gradients_of(student).values())
    ours.run_attention(theirs.attention_inputs)
    assert relative_error(ours.attention, theirs.attention, counted()) == 0


def plain_error(student: dict, teacher: dict, counts) -> float:
    total = 0.0
    for layer_idx, target in teacher.items():
        for row, token in counts.nonzero().tolist():
            difference = student[layer_idx][row, token].double() - target[row, token].double()
            total += (difference.square().mean() / target[row, token].double().square().mean()).item() / len(teacher)
    return total


def random_outputs(seed: int, dtype=torch.float32, num_layers: int = 3) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outputs = {index: 10.0**index * torch.randn(2, 20, 8, generator=generator) for index in range(num_layers)}
    return {index: output.to(dtype) for index, output in outputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_relative_error_equals_a_plain_loop(dtype):
    student, teacher, counts = random_outputs(0, dtype), random_outputs(1, dtype), counted()
    found = relative_error(student, teacher, counts)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(plain_error(student, teacher, counts), rel=1e-5)


def test_relative_error_of_a_teacher_that_puts_out_nothing_is_finite_where_it_counts_not():
    """A row of zeros, as attention of a padded token may be, has no scale."""
    student, teacher, counts = random_outputs(0), random_outputs(1), counted()
    expected = relative_error(student, teacher, counts)
    for output in teacher.values():
        output[~counts] = 0
    leaf = {index: output.clone().requires_grad_() for index, output in student.items()}
    found = relative_error(leaf, teacher, counts)
    found.backward()
    assert torch.equal(found, expected)
    assert all(output.grad.isfinite().all() and (output.grad[~counts] == 0).all() for output in leaf.values())


def test_relative_error_does_not_depend_on_how_a_batch_is_split():
    student, teacher, counts = random_outputs(0), random_outputs(1), counted()
    rows = [
        relative_error(
            {index: output[row : row + 1] for index, output in student.items()},
            {index: output[row : row + 1] for index, output in teacher.items()},
            counts[row : row + 1],
        )
        for row in range(2)
    ]
    torch.testing.assert_close(sum(rows), relative_error(student, teacher, counts), rtol=1e-6, atol=0)


def matched(student, teacher, part: str, forced: bool, rows=slice(None)) -> tuple[float, dict]:
    """Loss and gradients of one part; new hooks each time, as a new trainer makes them."""
    ours, theirs = LayerOutputs(student), LayerOutputs(teacher)
    inputs = {name: value[rows] if torch.is_tensor(value) else value for name, value in inputs_of().items()}
    record_teacher(theirs, teacher, inputs)
    with ours.recorded(theirs.attention_inputs if forced else None):
        student(**inputs)
    loss = relative_error(getattr(ours, part), getattr(theirs, part), counted()[rows])
    loss.backward()
    return loss.item(), gradients_of(student)


@some_families
@every_part
def test_gradients_add_up_over_rows(model_type, part):
    student, teacher = pair(model_type)
    whole_loss, whole = matched(student, teacher, part, forced=False)
    first_loss, first = matched(student, teacher, part, forced=False, rows=slice(0, 1))
    second_loss, second = matched(student, teacher, part, forced=False, rows=slice(1, 2))
    assert first_loss + second_loss == pytest.approx(whole_loss, rel=1e-5)
    assert_close({name: first[name] + second[name] for name in whole}, whole, 1e-4)


@some_families
@every_export
@pytest.mark.parametrize(("part", "forced"), [("attention", False), ("attention", True), ("hidden", False)])
def test_checkpointed_layers_have_the_same_gradients(model_type, export, part, forced):
    student, teacher = pair(model_type, export)
    student.train()
    expected_loss, expected = matched(student, teacher, part, forced)
    enable = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    found_loss, found = matched(student, teacher, part, forced)
    assert found_loss == pytest.approx(expected_loss, rel=1e-6)
    assert_close(found, expected)


@some_families
def test_inputs_of_a_teacher_in_bfloat16_are_taken_in_the_students_dtype(model_type):
    student, teacher = pair(model_type)
    teacher = in_bfloat16(teacher)
    ours, theirs = LayerOutputs(student), LayerOutputs(teacher)
    record_teacher(theirs, teacher, inputs_of())
    args, kwargs = theirs.attention_inputs[1]
    forced = (args[0] if args else kwargs["hidden_states"]).float()
    seen = []
    ours.attention_modules[1].q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad(), ours.recorded(theirs.attention_inputs):
        student(**inputs_of())
    assert torch.equal(seen[0], forced) and ours.attention[1].dtype == torch.float32


@pytest.mark.filterwarnings(PEFT_ASKS, PEFT_SAYS)
@some_families
def test_student_below_peft(model_type):
    student, teacher = pair(model_type)
    wrapped = get_peft_model(student, lora_config(student, rank=2))
    ours, theirs = LayerOutputs(wrapped.get_base_model()), LayerOutputs(teacher)
    record_teacher(theirs, teacher, inputs_of())
    ours.run_attention(theirs.attention_inputs)
    alone = relative_error(ours.attention, theirs.attention, counted())
    alone.backward()
    gradients = gradients_of(wrapped)
    with ours.recorded(theirs.attention_inputs):
        wrapped(**inputs_of())
    whole = relative_error(ours.attention, theirs.attention, counted())
    whole.backward()
    assert_close(gradients, gradients_of(wrapped))
    assert alone.item() == pytest.approx(whole.item(), rel=1e-5) and alone > 0


def test_layers_of_a_native_relative_are_found():
    student = convert(tiny_donor("gpt2"), num_key_value_heads=1)
    outputs = LayerOutputs(student)
    with outputs.recorded():
        student(torch.arange(6).unsqueeze(0))
    assert student.config.model_type == "gpt_bigcode"
    assert sorted(outputs.attention) == sorted(outputs.hidden) == list(range(student.config.num_hidden_layers))


def test_family_whose_blocks_differ_is_refused():
    sizes = {
        "hidden_size": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    with pytest.raises(
        Refusal, match=r"^layer matching: the blocks of a opt call their attention in a way of their own"
    ):
        LayerOutputs(OPTForCausalLM(OPTConfig(vocab_size=32, **sizes)))


@every_objective
def test_model_in_bfloat16_learns_the_same_roughly(objective, tmp_path):
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        student, donor = models_of()
        student = student if dtype == torch.float32 else in_bfloat16(student)
        phases = (phase_of(objective),)
        teacher = donor if dtype == torch.float32 else in_bfloat16(donor)
        losses.append(losses_of(uptrained(tmp_path, student, teacher, phases, args={"optim": "sgd"})))
        assert {tensor.dtype for tensor in student.parameters()} == {dtype}
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@every_objective
def test_teacher_of_another_dtype(objective, tmp_path):
    student, donor = models_of()
    phases = (phase_of(objective),)
    expected = losses_of(uptrained(tmp_path, copy.deepcopy(student), donor, phases))
    found = losses_of(uptrained(tmp_path, student, in_bfloat16(donor), phases))
    assert found == pytest.approx(expected, rel=0.05)
