"""Plans and configurations that must be refused: one message, exit code 2, nothing written, the donor untouched."""

import json

import pytest

from hf_gqa import ConversionPlan, Refusal
from hf_gqa.convert.families import FAMILIES
from hf_gqa.convert.plan import check_plan

from .command_line import assert_one_message, assert_refused, run_cli
from .donor_folders import edit_json, write_donor


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        (3, ["num_key_value_heads = 3 does not divide num_attention_heads = 4 (donor 'donor')", "Use one of 1, 2, 4."]),
        (0, ["num_key_value_heads = 0 is not a positive whole number", "Use 1 or more"]),
        (-2, ["num_key_value_heads = -2 is not a positive whole number", "Use 1 or more"]),
        (8, ["num_key_value_heads = 8 is more than the 4 KV heads of donor 'donor'", "Use one of 1, 2, 4."]),
    ],
)
def test_head_count_is_refused(tmp_path, heads, words):
    assert_refused(write_donor(tmp_path / "donor"), tmp_path, *words, heads=heads)


@pytest.mark.parametrize(
    ("heads", "options", "words"),
    [
        (4, [], ["num_key_value_heads = 4 is more than the 2 KV heads", "Use one of 1, 2", "--method expand with 4"]),
        (3, ["--method", "expand"], ["num_key_value_heads = 3", "'expand' repeats the 2 KV heads", "Use one of 4"]),
        (8, ["--method", "expand"], ["num_key_value_heads = 8", "(4 query heads)", "Use one of 4"]),
        (1, ["--method", "expand"], ["num_key_value_heads = 1", "'expand' repeats the 2 KV heads", "Use one of 4"]),
    ],
)
def test_head_count_of_a_grouped_donor_is_refused(tmp_path, heads, options, words):
    donor = write_donor(tmp_path / "donor", num_key_value_heads=2)
    assert_refused(donor, tmp_path, *words, heads=heads, options=options)


def test_head_count_that_does_not_divide_a_grouped_donors_names_its_kv_heads():
    plan = ConversionPlan(num_key_value_heads=3)
    with pytest.raises(Refusal, match=r"3 does not divide the donor's num_key_value_heads = 4 .* Use one of 1, 2, 4\."):
        check_plan(plan, num_attention_heads=8, num_key_value_heads=4, where="x/y")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "meanpool"], ["conversion method 'meanpool' is unknown", "Did you mean 'mean_pool'?", "first"]),
        (["--method", "mean_pool,first"], ["method = mean_pool,first: 2 of these change", "exactly one of"]),
        (["--method", ""], ["conversion method '' is unknown", "Known: "]),
        (["--export", "gguf"], ["export = 'gguf' is unknown", "auto, native, bundle"]),
        (["--seed", "-1"], ["seed = -1 is not a whole number from 0", "Use 0 or more"]),
    ],
)
def test_plan_is_refused(tmp_path, options, words):
    assert_refused(write_donor(tmp_path / "donor"), tmp_path, *words, options=options)


def test_native_export_that_cannot_be_had_is_refused(tmp_path):
    donor = write_donor(tmp_path / "donor", "gpt2")
    words = ["export = native: a native gpt2 has as many KV heads as query heads", "Use --export auto or bundle."]
    assert_refused(donor, tmp_path, *words, options=("--export", "native"))


@pytest.mark.parametrize("seed", [2**43, 2**62, 2**70])
def test_large_seed_is_taken_or_refused(tmp_path, seed):
    options = ["--num-key-value-heads", 2, "--method", "random_init", "--seed", seed]
    result = run_cli("convert", write_donor(tmp_path / "donor"), tmp_path / "student", *options)
    if result.exit_code != 0:
        assert_one_message(result, 2, f"seed = {seed}")


@pytest.mark.parametrize("heads", [True, 2.0, "2", None])
def test_head_count_of_another_type_is_refused(heads):
    with pytest.raises(Refusal, match="is not a positive whole number"):
        ConversionPlan(num_key_value_heads=heads)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": 5}, "method = 5"),
        ({"method": None}, "method = None"),
        ({"method": ["mean_pool", 5]}, r"method = \['mean_pool', 5\]"),
        ({"sharing": None}, "sharing pattern 'None' is unknown"),
        ({"export": None}, "export = None is unknown"),
        ({"seed": 1.5}, "seed = 1.5 is not a whole number"),
    ],
)
def test_plan_field_of_another_type_is_refused(wrong, message):
    with pytest.raises(Refusal, match=message):
        ConversionPlan(num_key_value_heads=2, **wrong)


def test_plan_from_json_refuses_unknown_and_missing_keys():
    with pytest.raises(Refusal, match=r"plan: unknown key 'heads'\. Known: num_key_value_heads, method, "):
        ConversionPlan.from_dict({"num_key_value_heads": 2, "heads": 2})
    with pytest.raises(Refusal, match="num_key_value_heads"):
        ConversionPlan.from_dict({"method": ["first"]})


@pytest.mark.parametrize(
    "plan",
    [
        ConversionPlan(num_key_value_heads=2),
        ConversionPlan(num_key_value_heads=1, method="random-init", export="bundle", seed=2**31),
        ConversionPlan(num_key_value_heads=8, method=("expand",), export="native", seed=3),
    ],
)
def test_plan_survives_json(plan):
    written = json.dumps(plan.to_dict())
    again = ConversionPlan.from_dict(json.loads(written))
    assert again == plan and json.dumps(again.to_dict()) == written


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, ["no such folder", "Give a folder with config.json and safetensors weights"]),
        (lambda path: path.mkdir(), ["the folder is empty", "Give a folder with config.json"]),
        (lambda path: path.write_text("x"), ["is a file", "Give the folder that holds config.json"]),
    ],
)
def test_donor_folder_is_refused(tmp_path, make, words):
    make(tmp_path / "donor")
    assert_refused(tmp_path / "donor", tmp_path, str(tmp_path / "donor"), *words)


@pytest.mark.parametrize("name", ["~no-such-user/donor", "d" * 300])
def test_donor_name_that_no_file_system_knows_is_one_message(tmp_path, name):
    result = run_cli("inspect", name)
    assert_one_message(result, result.exit_code)
    assert result.exit_code in (2, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["config.json: missing", "save_pretrained"]),
        ("{'model_type': 'llama'}", ["config.json: not readable JSON (", "Download the donor again"]),
        ("[1, 2]", ["config.json: holds list, expected an object", "Download the donor again"]),
    ],
)
def test_config_file_is_refused(tmp_path, text, words):
    donor = write_donor(tmp_path / "donor")
    (donor / "config.json").unlink()
    if text is not None:
        (donor / "config.json").write_text(text)
    assert_refused(donor, tmp_path, *words)


def test_config_file_that_is_not_text_is_refused(tmp_path):
    donor = write_donor(tmp_path / "donor")
    (donor / "config.json").write_bytes(b"\xff\xfe\x00")
    assert_refused(donor, tmp_path, "config.json: not readable JSON (")


@pytest.mark.parametrize("model_type", ["xglm", "lama", None, 7, ["llama"]])
def test_family_is_refused_with_the_known_ones(tmp_path, model_type):
    donor = write_donor(tmp_path / "donor")
    edit_json(donor / "config.json", model_type=model_type)
    known = f"Known: {', '.join(FAMILIES.names())}."
    assert_refused(donor, tmp_path, f"config.json: model_type = {model_type!r} is not a family", known)


def test_missing_family_is_refused_with_the_known_ones(tmp_path):
    donor = write_donor(tmp_path / "donor")
    edit_json(donor / "config.json", remove=("model_type",))
    assert_refused(donor, tmp_path, "config.json: model_type = None", ", ".join(FAMILIES.names()))


@pytest.mark.parametrize("architectures", [["MistralForCausalLM"], ["LlamaForPoetry"], ["GenerationMixin"]])
def test_architecture_of_another_class_is_refused(tmp_path, architectures):
    donor = write_donor(tmp_path / "donor")
    edit_json(donor / "config.json", architectures=architectures)
    words = [f"architectures = {architectures} is not a class of transformers for 'llama'", "like LlamaForCausalLM"]
    assert_refused(donor, tmp_path, *words)


@pytest.mark.parametrize("architectures", [[5], 5, [None], "LlamaForCausalLM", {"a": 1}])
def test_architectures_that_are_no_list_of_names_are_refused(tmp_path, architectures):
    donor = write_donor(tmp_path / "donor")
    edit_json(donor / "config.json", architectures=architectures)
    assert_refused(donor, tmp_path, str(donor / "config.json"), "architectures")


@pytest.mark.parametrize("architectures", [None, []])
def test_missing_architecture_is_the_language_model(tmp_path, architectures):
    donor = write_donor(tmp_path / "donor")
    edit_json(donor / "config.json", architectures=architectures)
    result = run_cli("convert", donor, tmp_path / "student", "--num-key-value-heads", 2)
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "student/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": "big"}, "config.json: transformers does not accept it ("),
        ({"num_attention_heads": 0}, "config.json: transformers does not accept it ("),
        ({"num_attention_heads": 5}, "config.json: transformers does not accept it ("),
        ({"dtype": "nonsense"}, "config.json: transformers does not accept it ("),
        ({"initializer_range": "small"}, "config.json: transformers does not accept it ("),
        ({"hidden_size": -32}, "LlamaForCausalLM cannot be built from its configuration ("),
        ({"vocab_size": -1}, "LlamaForCausalLM cannot be built from its configuration ("),
        ({"hidden_act": "nonsense"}, "LlamaForCausalLM cannot be built from its configuration ("),
        ({"pad_token_id": 5000}, "LlamaForCausalLM cannot be built from its configuration ("),
        ({"rope_parameters": {"rope_type": "nonsense"}}, "LlamaForCausalLM cannot be built from its configuration ("),
        ({"num_key_value_heads": 0}, "0 KV heads do not divide num_attention_heads = 4"),
        ({"num_key_value_heads": -1}, "-1 KV heads do not divide num_attention_heads = 4"),
        ({"num_key_value_heads": 3}, "3 KV heads do not divide num_attention_heads = 4"),
    ],
    ids=str,
)
def test_values_that_no_model_can_have_are_refused(tmp_path, values, words):
    donor = write_donor(tmp_path / "donor")
    edit_json(donor / "config.json", **values)
    assert_refused(donor, tmp_path, str(donor), words, "Correct ")


def test_quantized_configuration_is_refused(tmp_path):
    donor = write_donor(tmp_path / "donor")
    edit_json(donor / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    words = ["config.json: the donor is quantized", "'quantization_config' is set", "Convert the original weights"]
    assert_refused(donor, tmp_path, *words)
