"""Encoders as they were stored years ago, or by their own toolkits: converted, or refused with what to do."""

import json

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, BertModel

from hf_gqa import Refusal, convert, convert_checkpoint

from .conformance import assert_same_tensors
from .tiny_donors import tiny_donor


def stored_with(folder, donor, rename) -> None:
    donor.save_pretrained(folder)
    tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def old_name(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


@pytest.mark.parametrize("plan", [{"num_key_value_heads": 2}, {"sharing": "albert", "shared_layers": (1,)}])
def test_gamma_and_beta_are_weight_and_bias(plan, tmp_path):
    donor = tiny_donor("bert")
    stored_with(tmp_path / "donor", donor, old_name)
    convert_checkpoint(tmp_path / "donor", tmp_path / "student", **plan)
    assert not any("gamma" in name or "beta" in name for name in load_file(tmp_path / "student/model.safetensors"))
    student, loading = AutoModelForMaskedLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(loading.values())
    assert_same_tensors(student.state_dict(), convert(donor, **plan).state_dict())


def test_both_names_of_one_tensor_are_refused(tmp_path):
    tiny_donor("bert").save_pretrained(tmp_path / "donor")
    tensors = load_file(tmp_path / "donor/model.safetensors")
    norm = "bert.embeddings.LayerNorm.weight"
    save_file(tensors | {old_name(norm): tensors[norm] + 1}, tmp_path / "donor/model.safetensors")
    with pytest.raises(Refusal, match=r"'bert\.embeddings\.LayerNorm\.gamma' is no tensor of BertForMaskedLM"):
        convert_checkpoint(tmp_path / "donor", tmp_path / "student", num_key_value_heads=2)


@pytest.mark.parametrize("in_memory", [True, False])
def test_encoder_without_a_pooler_is_refused(in_memory, tmp_path):
    donor = BertModel(tiny_donor("bert").config, add_pooling_layer=False)
    donor.save_pretrained(tmp_path / "donor")
    with pytest.raises(Refusal) as refused:
        if in_memory:
            convert(donor, num_key_value_heads=2)
        else:
            convert_checkpoint(tmp_path / "donor", tmp_path / "student", num_key_value_heads=2)
    assert str(refused.value) == (
        f"{'BertModel' if in_memory else tmp_path / 'donor'}: has no pooler, which AutoModel would make up anew at every load. "
        "Load it once with AutoModel and save it with the pooler that it gets; what pools otherwise, as sentence encoders do, "
        "does not read it."
    )


def test_tensors_of_a_head_that_is_not_named_are_refused(tmp_path):
    """As in the first BERTs: stored with both heads of pre-training, `architectures` names one."""
    tiny_donor("bert", auto_class="AutoModelForPreTraining").save_pretrained(tmp_path / "donor")
    config = json.loads((tmp_path / "donor/config.json").read_text())
    (tmp_path / "donor/config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    with pytest.raises(
        Refusal, match=r"'cls\.seq_relationship\.bias' is no tensor of BertForMaskedLM .* its own class"
    ):
        convert_checkpoint(tmp_path / "donor", tmp_path / "student", num_key_value_heads=2)
