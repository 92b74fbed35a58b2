"""Adapters of peft: what is trained, what the teacher keeps, and what is merged and written."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_gqa import Refusal, convert, convert_checkpoint
from hf_gqa.convert.student import open_student
from hf_gqa.uptrain import run as uptrain_run
from hf_gqa.uptrain.callback import UptrainCallback
from hf_gqa.uptrain.export_student import export_student
from hf_gqa.uptrain.lora import add_lora, in_four_bits, keep_gradients, lora_config
from hf_gqa.uptrain.phases import Objective, Phase
from hf_gqa.uptrain.trainer import UptrainTrainer

from .command_line import assert_one_message, run_cli
from .phases import PEFT_ASKS, PEFT_SAYS, arguments, refused, rows_of
from .tiny_donors import tiny_donor, tokens_and_mask
from .tiny_tokenizer import letter_tokenizer
from .uptrain_command import Folders, arguments_of, loss_by_hand, own_cache, some_text, uptrained, write_folders


__all__ = ["own_cache"]
KL = Phase(objective=Objective(kl=1.0), train="attention")
pytestmark = [pytest.mark.filterwarnings(PEFT_ASKS), pytest.mark.filterwarnings(PEFT_SAYS)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    folders = write_folders(tmp_path_factory.mktemp("folders"))
    (folders.root / "eval.txt").write_text(some_text(200, seed=1))
    return folders


def shared_student(folders: Folders, tmp_path, **options) -> Folders:
    convert_checkpoint(folders.donor, tmp_path / "shared", **options)
    return replace(folders, student=tmp_path / "shared")


@pytest.mark.parametrize("objective", ["distill", "kl"])
@pytest.mark.parametrize("sharing", [None, "echo", "cross_layer_kv"])
def test_merging_leaves_the_teacher_what_it_was(sharing, objective, folders, tmp_path):
    """It computes with the very weights that the adapters are merged into."""
    text = folders.root / "eval.txt"
    some = shared_student(folders, tmp_path, sharing=sharing, shared_layers=[1]) if sharing else folders
    report = uptrained(some, tmp_path / "out", lora_rank=4, objective=objective, learning_rate=0.03, eval_file=text)
    evaluated = [entry for entry in report["log"] if "eval_teacher_loss" in entry]
    assert {entry["eval_teacher_loss"] for entry in evaluated} == {report["before"]["eval_teacher_loss"]}
    assert loss_by_hand(folders.donor, text) == pytest.approx(report["after"]["eval_teacher_loss"], abs=1e-4)
    assert loss_by_hand(tmp_path / "out", text) == pytest.approx(report["after"]["eval_loss"], abs=1e-4)
    assert report["after"]["eval_loss"] == pytest.approx(evaluated[-2]["eval_loss"], abs=1e-4)
    assert report["teacher_shared_bytes"] > 0


def adapted_names(model) -> set[str]:
    return {name for name, tensor in model.named_parameters() if tensor.requires_grad}


def test_adapters_are_on_attention_alone():
    """GPT-2 calls the output projection of its feed-forward layers as that of its attention."""
    student = convert(tiny_donor("gpt2"), num_key_value_heads=2, export="bundle")
    names = adapted_names(add_lora(student, 2))
    assert names and all(".attn." in name for name in names)
    ways = {name.rpartition(".attn.")[2].split(".")[0] for name in names}
    assert ways == {"q_proj", "k_proj", "v_proj", "c_proj"}


@pytest.mark.parametrize("sharing", ["albert", "albert_attention"])
def test_layers_that_are_one_take_no_adapters(sharing, folders, tmp_path):
    some = shared_student(folders, tmp_path, sharing=sharing, share_every=2)
    result = run_cli(*arguments_of(some, tmp_path / "out", lora_rank=4))
    assert_one_message(result, 2, "each would get an adapter of its own, which cannot be merged into one weight.")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.unfinished").exists()


def test_words_for_people_say_what_is_trained(folders, tmp_path):
    said = run_cli(*arguments_of(folders, tmp_path / "out", "--dry-run", lora_rank=4, objective="kl")).stdout
    assert "train adapters of rank 4, key and value projections in full; learn" in " ".join(said.split())


def test_fused_projections_take_no_adapters():
    student = convert(tiny_donor("falcon"), num_key_value_heads=1, export="native")
    assert refused(lora_config, student).startswith("lora: 'falcon' keeps queries, keys and values in one projection")


def test_sharded_student_takes_no_adapters(folders, tmp_path, monkeypatch):
    class Sharded(uptrain_run._RunTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.is_fsdp_enabled = True

    monkeypatch.setattr(uptrain_run, "_RunTrainer", Sharded)
    result = run_cli(*arguments_of(folders, tmp_path / "out", lora_rank=4))
    assert_one_message(result, 2, "--lora-rank: adapters of a student in shards cannot be merged.")


@pytest.mark.parametrize(("model_type", "export"), [("llama", "auto"), ("gpt2", "bundle"), ("gemma3_text", "auto")])
def test_export_is_the_model_with_its_adapters_and_leaves_it_alone(model_type, export, tmp_path):
    donor = tiny_donor(model_type)
    convert_checkpoint_of(donor, tmp_path, export)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", trust_remote_code=True)
    model = get_peft_model(student, lora_config(student, 4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.requires_grad:
                tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        expected = model.eval()(tokens_and_mask()[0]).logits
        export_student(model, tmp_path / "out", source=tmp_path / "student", uptraining={"steps": 1})
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
        torch.testing.assert_close(found(tokens_and_mask()[0]).logits, expected, rtol=1e-5, atol=1e-5)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def convert_checkpoint_of(donor, folder, export: str) -> None:
    donor.save_pretrained(folder / "donor")
    letter_tokenizer().save_pretrained(folder / "donor")
    convert_checkpoint(folder / "donor", folder / "student", num_key_value_heads=2, export=export)


def test_script_with_adapters_exports_what_it_evaluated(tmp_path):
    donor = tiny_donor("llama")
    convert_checkpoint_of(donor, tmp_path, "auto")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    args = arguments(tmp_path, remove_unused_columns=False, eval_strategy="steps", eval_steps=4, learning_rate=0.03)
    trainer = UptrainTrainer(
        add_lora(student, 4),
        args,
        teacher=tmp_path / "donor",
        train_dataset=rows_of(),
        eval_dataset=rows_of(3, seed=5),
        uptrain=UptrainCallback(budget_tokens=4 * 24, tokens_per_step=24, phases=(KL,), export_dir=tmp_path / "out"),
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    alone = UptrainTrainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        args,
        teacher=donor,
        eval_dataset=rows_of(3, seed=5),
        uptrain=UptrainCallback(budget_tokens=24, phases=(KL,)),
    )
    found = alone.evaluate()
    for name in ("eval_loss", "eval_teacher_loss", "eval_kl_nats_per_token"):
        assert found[name] == pytest.approx(logged[name], rel=1e-5)
    assert json.loads((tmp_path / "out/conversion_manifest.json").read_text())["uptraining"]["tokens_seen"] == 96


def four_bits(folder):
    """The student in four bits, and one of the same numbers in 32, both with the same adapters."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantized = open_student(folder, torch.float32, **in_four_bits(folder, torch.float32)).model
    whole = open_student(folder, torch.float32).model
    twins = dict(whole.named_modules())
    layers = {n: m for n, m in quantized.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    for name, layer in layers.items():
        values = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        twins[name].weight.data = values.float().reshape(twins[name].weight.shape)
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    both = [add_lora(model, 4) for model in (quantized, whole)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one, other in zip(*(model.parameters() for model in both), strict=True):
            if one.requires_grad:
                other.copy_(one.add_(0.02 * torch.randn(one.shape, generator=generator)))
    return both


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes on CPUs
@pytest.mark.parametrize(("evaluated_before", "relative"), [(False, 1e-4), (True, 0.02)])  # packing rounds scales
def test_gradients_pass_four_bit_weights_after_an_evaluation_too(evaluated_before, relative, tmp_path):
    wide = tiny_donor(
        "llama", hidden_size=128, head_dim=32, intermediate_size=256
    )  # bitsandbytes packs no narrower ones
    convert_checkpoint_of(wide, tmp_path, "auto")
    found = four_bits(tmp_path / "student")
    tokens = torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    for model in found:
        with torch.no_grad():
            if evaluated_before:
                model.eval()(tokens)
            keep_gradients(model)
            model.eval()(tokens)
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
    one, other = ({n: t.grad for n, t in model.named_parameters() if t.requires_grad} for model in found)
    assert one.keys() == other.keys() and any("layers.0" in name and "lora" in name for name in one)
    for name, gradient in other.items():
        atol = relative * gradient.abs().max().item()
        torch.testing.assert_close(one[name], gradient, rtol=0, atol=atol, msg=str(name))


@pytest.mark.filterwarnings("ignore")
def test_student_in_four_bits_is_written_whole(folders, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    text = folders.root / "eval.txt"
    options = {"lora_rank": 4, "objective": "kl", "learning_rate": 0.01, "eval_file": text}
    reports = {
        flags: uptrained(folders, tmp_path / str(len(flags)), *flags, **options) for flags in ((), ("--load-in-4bit",))
    }
    plain, quantized = reports.values()
    assert quantized["before"]["eval_loss"] != plain["before"]["eval_loss"]
    assert quantized["after"]["eval_kl_nats_per_token"] < plain["before"]["eval_kl_nats_per_token"]
    assert loss_by_hand(tmp_path / "1", text) == pytest.approx(quantized["after"]["eval_loss"], abs=1e-4)
    tensors = [load_file(folder / "model.safetensors") for folder in (tmp_path / "1", folders.student)]
    assert {n: (t.dtype, t.shape) for n, t in tensors[0].items()} == {
        n: (t.dtype, t.shape) for n, t in tensors[1].items()
    }
    changed = {name for name, tensor in tensors[1].items() if not torch.equal(tensor, tensors[0][name])}
    assert changed == {f"model.layers.{n}.self_attn.{p}_proj.weight" for n in range(2) for p in "qkvo"}
    config = json.loads((tmp_path / "1/config.json").read_text())
    assert "quantization_config" not in config


@pytest.mark.filterwarnings("ignore")
def test_script_in_four_bits_exports_whole_weights(folders, tmp_path):
    model, twin = four_bits(folders.student)
    export_student(model, tmp_path / "out", source=folders.student, uptraining={"steps": 1})
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", folders.student))
    merged = twin.merge_and_unload().state_dict()
    for name, tensor in wanted.items():
        kept = all(part not in name for part in ("q_proj", "k_proj", "v_proj", "o_proj"))
        assert torch.equal(found[name], tensor) == kept
        if "k_proj" in name or "v_proj" in name:
            torch.testing.assert_close(found[name], merged[name])
    message = refused(export_student, model, tmp_path / "no", source=None, uptraining={})
    assert message.startswith("export: the model is quantized and no folder of the student is known")


def test_four_bits_without_bitsandbytes_are_refused(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run_cli(*arguments_of(folders, tmp_path / "out", "--load-in-4bit", lora_rank=4))
    assert_one_message(result, 2, "--load-in-4bit: needs bitsandbytes. Install it: pip install 'hf_gqa[qlora]'.")


TARGETS = {
    "lm_head": (
        r"adapter on 'base_model.model.lm_head' cannot be merged: its weight is 'base_model.model.model.embed_tokens.weight'"
    ),
    "embed_tokens": r"its weight is 'base_model.model.lm_head.weight' too, .* Leave 'embed_tokens' out",
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # peft only warns
@pytest.mark.parametrize("target", TARGETS)
def test_adapter_on_a_weight_that_is_another_s_too_is_refused_before_training(target, tmp_path):
    """Also where somebody else made the adapter: merged, both would change."""
    student = convert(tiny_donor("llama", tie_word_embeddings=True), num_key_value_heads=2)
    for how in ({"target_modules": [target]}, {"target_modules": ["q_proj"], "modules_to_save": [target]}):
        adapted = get_peft_model(copy.deepcopy(student), LoraConfig(r=2, **how))
        trainer = UptrainTrainer(
            model=adapted,
            uptrain=UptrainCallback(budget_tokens=48, export_dir=tmp_path / "out"),
            args=arguments(tmp_path),
            train_dataset=rows_of(4),
        )
        with pytest.raises(Refusal, match=TARGETS[target]):
            trainer.train()
        with pytest.raises(Refusal, match=TARGETS[target]):
            export_student(adapted, tmp_path / "out", source=None, uptraining={})
        assert not (tmp_path / "out").exists()


def test_adapter_of_the_user_s_own_on_tied_layers_is_refused(tmp_path):
    student = convert(tiny_donor("llama"), sharing="albert", shared_layers=[1])
    adapted = get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(
        Refusal, match=r"layers.0.self_attn.q_proj' cannot be merged: its weight is '.*layers.1.self_attn"
    ):
        export_student(adapted, tmp_path / "out", source=None, uptraining={})


def test_prefixes_are_no_weights(tmp_path):
    adapted = get_peft_model(
        convert(tiny_donor("llama"), num_key_value_heads=2),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )
    with pytest.raises(Refusal, match=r"^export: prompts and prefixes are tokens .* Train a LoRA"):
        export_student(adapted, tmp_path / "out", source=None, uptraining={})


def test_what_is_written_is_compared_with_what_was_trained(tmp_path, monkeypatch):
    student = convert(tiny_donor("llama"), num_key_value_heads=2)
    adapted = get_peft_model(student, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    export_student(adapted, tmp_path / "right", source=None, uptraining={})
    monkeypatch.setattr("peft.tuners.lora.layer.Linear.merge", lambda self, *args, **kwargs: None)
    with pytest.raises(Refusal, match=r"^export: with its adapters merged the model computes something else"):
        export_student(adapted, tmp_path / "wrong", source=None, uptraining={})
    assert not (tmp_path / "wrong").exists()


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # peft's, on transformers 5.24
def test_a_prefix_over_layers_with_different_heads_is_refused_with_the_reason():
    uneven = convert(tiny_donor("llama"), layer_plan=[{"num_key_value_heads": n} for n in (2, 1)])
    adapted = get_peft_model(uneven, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(
        ValueError, match=r"the cache holds 2 KV heads for layer 1, which has 1\. A prefix .* train a LoRA"
    ):
        adapted(tokens_and_mask()[0])
