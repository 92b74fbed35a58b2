"""Donors that are not a plain language model in a plain folder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    GPTBigCodeForSequenceClassification,
)

from hf_gqa import ConversionPlan, Refusal, convert, convert_checkpoint, open_donor, verify

from .command_line import assert_one_message, run_cli
from .donor_folders import edit_json
from .tiny_donors import tiny_config, tiny_donor, tokens_and_mask


def with_head(auto_class, model_type: str, folder, labels: dict | None = None, **changes) -> None:
    config = tiny_config(model_type, **changes)
    for name, value in (labels or {}).items():
        setattr(config, name, value)
    auto_class.from_config(config).save_pretrained(folder)


@pytest.mark.usefixtures("warm_verification")
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_question_answering_is_converted_too(tmp_path, model_type):
    """These classes keep their base model under another name."""
    with_head(AutoModelForQuestionAnswering, model_type, tmp_path / "donor")
    convert_checkpoint(tmp_path / "donor", tmp_path / "student", num_key_value_heads=2)
    checks = verify(tmp_path / "student", open_donor(tmp_path / "donor"))
    assert all(check.passed for check in checks), checks
    key = next(
        t for name, t in load_file(tmp_path / "student/model.safetensors").items() if "0.self_attn.k_proj.w" in name
    )
    assert len(key) == 2 * open_donor(tmp_path / "donor").head_dim


@pytest.mark.usefixtures("warm_verification")
@pytest.mark.parametrize("pad_token_id", [0, None])
def test_classification_is_verified(tmp_path, pad_token_id):
    with_head(AutoModelForSequenceClassification, "llama", tmp_path / "donor", pad_token_id=pad_token_id)
    convert_checkpoint(tmp_path / "donor", tmp_path / "student", num_key_value_heads=2)
    checks = verify(tmp_path / "student", open_donor(tmp_path / "donor"))
    assert all(check.passed for check in checks), checks


def test_classification_on_gpt2_with_one_head_is_native(tmp_path):
    donor = tmp_path / "donor"
    labels = {"problem_type": "multi_label_classification", "num_labels": 1}
    with_head(AutoModelForSequenceClassification, "gpt2", donor, labels)
    found = json.loads(run_cli("inspect", donor, "--json").stdout)
    assert [target["export"] for target in found["targets"]] == ["native", "bundle", "native"]
    assert not found["impossible"]
    convert_checkpoint(donor, tmp_path / "student", num_key_value_heads=1)
    student = GPTBigCodeForSequenceClassification.from_pretrained(tmp_path / "student")
    assert student.config.problem_type == labels["problem_type"] and student.config.num_labels == 1


def test_scores_in_float32_where_gpt2_asks_for_them():
    """Queries and keys so large that float16 scores overflow."""
    donor = tiny_donor("gpt2", reorder_and_upcast_attn=True).half()
    with torch.no_grad():
        for block in donor.transformer.h:
            block.attn.c_attn.weight[:, :64] *= 120
    student = convert(donor, num_key_value_heads=4, export="bundle")
    tokens, _ = tokens_and_mask()
    for model in (donor, student):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = donor(tokens).logits
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(student(tokens).logits, expected, atol=2e-2, rtol=2e-2)


@pytest.fixture
def bundle(tmp_path):
    tiny_donor("gpt2").save_pretrained(tmp_path / "donor")
    convert_checkpoint(tmp_path / "donor", tmp_path / "bundle", num_key_value_heads=2)
    return tmp_path / "bundle"


def test_bundle_with_other_code_is_no_donor_of_ours(tmp_path, bundle):
    file = bundle / "planned_attention.py"
    file.write_text(file.read_text().replace("* scaling", "* scaling * 3"))
    result = run_cli("convert", bundle, tmp_path / "student", "--num-key-value-heads", 1)
    assert_one_message(result, 2, "its code is not that of this hf_gqa", "planned_attention.py", "--weights-only")
    result = run_cli("convert", bundle, tmp_path / "student", "--num-key-value-heads", 1, "--weights-only")
    assert result.exit_code == 0, result.stderr


def test_code_for_generation_is_compared_and_not_executed(tmp_path, bundle):
    (bundle / "custom_generate").mkdir()
    (bundle / "custom_generate/generate.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    result = run_cli("verify", bundle)
    assert result.exit_code == 1 and "custom_generate/generate.py" in result.stdout
    assert not (tmp_path / "marker").exists()


def test_names_with_brackets_are_printed_as_they_are(tmp_path, bundle):
    donor = shutil.copytree(tmp_path / "donor", tmp_path / "m[v2]")
    result = run_cli("convert", donor, tmp_path / "s[/x]", "--num-key-value-heads", 2)
    assert result.exit_code == 0 and "s[/x] --donor" in result.stdout and "m[v2] ->" in result.stdout
    assert "m[v2]: GPT2LMHeadModel" in run_cli("inspect", donor).stdout


def test_contradicting_arguments_are_refused(tmp_path, bundle):
    plan = ConversionPlan(num_key_value_heads=2)
    with pytest.raises(Refusal, match=r"got a plan and also num_key_value_heads"):
        convert(tiny_donor("llama"), plan, num_key_value_heads=1)
    with pytest.raises(Refusal, match="unknown key 'num_key_value_head'"):
        convert_checkpoint(tmp_path / "donor", tmp_path / "student", num_key_value_head=1)
    with pytest.raises(Refusal, match="has no revision 'main'"):
        open_donor(tmp_path / "donor", revision="main")


@pytest.mark.parametrize(("name", "refused"), [("tokenizer.safetensors", False), ("conversion_manifest.json", True)])
def test_shard_with_the_name_of_another_file(tmp_path, name, refused):
    donor, student = tmp_path / "donor", tmp_path / "student"
    tiny_donor("llama").save_pretrained(donor)
    weight_map = dict.fromkeys(load_file(donor / "model.safetensors"), name)
    (donor / "model.safetensors").rename(donor / name)
    (donor / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    if refused:
        with pytest.raises(Refusal, match="is no safetensors file"):
            convert_checkpoint(donor, student, num_key_value_heads=2)
    else:
        convert_checkpoint(donor, student, num_key_value_heads=2)
        assert load_file(student / name)["model.layers.0.self_attn.k_proj.weight"].shape == (16, 32)


def test_edit_of_the_number_of_heads_is_noticed(tmp_path):
    tiny_donor("llama").save_pretrained(tmp_path / "donor")
    edit_json(tmp_path / "donor/config.json", num_key_value_heads=2)
    with pytest.raises(Refusal, match="are not of the same model"):
        open_donor(tmp_path / "donor")
