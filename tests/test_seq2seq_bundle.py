"""Encoder-decoders on disk: what is written is what is converted in memory, and it lives without hf_gqa."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_gqa import convert, convert_checkpoint, open_donor
from hf_gqa.cli import app
from hf_gqa.cli.printing import all_heads_in_words
from hf_gqa.export.verify import verify

from . import warm_process
from .conformance import assert_same_tensors
from .seq2seq_conformance import every_family
from .seq2seq_donors import (
    NUM_ATTENTION_HEADS,
    decoder_tokens,
    encoder_inputs,
    language_model_class,
    logits_of,
    seq2seq_donor,
)


# Not run where a release has none for a family (T5 before 5.15).
DECODES_SDPA = "decoding from the cache equals one forward, attention sdpa"


HOP = """
import json, sys
sys.modules["hf_gqa"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
folder, onward, auto_class = sys.argv[1:]
model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
inputs = load_file("inputs.safetensors")
with torch.no_grad():
    logits = model(**inputs, use_cache=False).logits
save_file({"logits": logits.contiguous()}, onward + ".safetensors")
model.save_pretrained(onward)
"""


@pytest.fixture(params=[False, True], ids=["decoder", "both"])
def convert_encoder(request):
    return request.param


@every_family
def test_checkpoint_on_disk_is_the_model_in_memory(model_type, convert_encoder, tmp_path):
    donor = seq2seq_donor(model_type)
    donor.save_pretrained(tmp_path / "donor", max_shard_size="20KB")
    plan = {"num_key_value_heads": 2, "convert_encoder": convert_encoder}
    manifest = convert_checkpoint(tmp_path / "donor", tmp_path / "student", **plan)
    student = convert(donor, **plan)
    assert manifest.layer_plan == student.config.layer_plan
    assert manifest.plan.get("convert_encoder", False) == convert_encoder
    reloaded = type(student).from_pretrained(tmp_path / "student")
    reloaded.set_attn_implementation(student.config._attn_implementation)
    assert_same_tensors(reloaded.state_dict(), student.state_dict())
    assert torch.equal(logits_of(reloaded.eval()), logits_of(student))


@every_family
@pytest.mark.usefixtures("warm_verification")
def test_student_is_verified_in_a_clean_process(model_type, tmp_path):
    seq2seq_donor(model_type).save_pretrained(tmp_path / "donor")
    convert_checkpoint(tmp_path / "donor", tmp_path / "student", num_key_value_heads=2)
    checks = verify(tmp_path / "student", open_donor(tmp_path / "donor"))
    assert {check.name for check in checks if not check.passed} <= {DECODES_SDPA} and not failed(checks)
    assert {"loads without hf_gqa", "generates", "equals the donor's merged heads"} <= {c.name for c in checks}


def failed(checks) -> list[str]:
    return [check.name for check in checks if check.passed is False]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["t5", "whisper"])
def test_three_hops_without_hf_gqa_keep_every_file_and_every_bit(model_type, tmp_path):
    donor = seq2seq_donor(model_type)
    donor.save_pretrained(tmp_path / "donor")
    convert_checkpoint(tmp_path / "donor", tmp_path / "hop0", num_key_value_heads=2, convert_encoder=True)
    (tmp_path / "work").mkdir()
    save_file(encoder_inputs(donor) | {"decoder_input_ids": decoder_tokens()}, tmp_path / "work" / "inputs.safetensors")
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    code = sorted(path.name for path in (tmp_path / "hop0").glob("*.py"))
    for hop in range(3):
        arguments = [str(tmp_path / f"hop{hop}"), str(tmp_path / f"hop{hop + 1}"), language_model_class(model_type)]
        warm_process.run(["-c", HOP, *arguments], tmp_path / "work", **environment).check_returncode()
        for name in code:
            assert (tmp_path / f"hop{hop + 1}" / name).read_bytes() == (tmp_path / "hop0" / name).read_bytes()
        shutil.rmtree(tmp_path / "modules")
    logits = [load_file(tmp_path / f"hop{hop}.safetensors")["logits"] for hop in (1, 2, 3)]
    assert all(torch.equal(found, logits[0]) for found in logits)
    student = convert(donor, num_key_value_heads=2, convert_encoder=True)
    student.set_attn_implementation(student.default_attention)
    torch.testing.assert_close(logits[0], logits_of(student))
    config = json.loads((tmp_path / "hop3" / "config.json").read_text())
    assert [row["num_key_value_heads"] for row in config["layer_plan"]] == [2] * 6


def test_command_line_explains_and_converts_the_encoder_if_asked(tmp_path):
    seq2seq_donor("t5").save_pretrained(tmp_path / "donor")
    arguments = ["convert", str(tmp_path / "donor"), str(tmp_path / "student"), "--num-key-value-heads", "1"]
    told = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert told.exit_code == 0, told.output
    assert "cross-attention" in told.output and "for each token" in told.output
    side = {"num_key_value_heads": [1], "num_key_value_heads_cross": [1], "num_key_value_heads_encoder": [4]}
    words = "1 in each of 1 layers of the decoder, cross-attention 1 in each of 1 layers, encoder 4 in each of 1 layers"
    assert all_heads_in_words(side) == words
    as_json = CliRunner().invoke(app, [*arguments, "--convert-encoder", "--json"])
    after = json.loads(as_json.stdout)["after"]
    assert after["num_key_value_heads_encoder"] == after["num_key_value_heads_cross"] == [1, 1]
    assert after["cache_bytes_per_token"] == after["cache_bytes_per_encoder_token"] == 2 * 2 * 8 * 4
    stored = list(load_file(tmp_path / "student" / "model.safetensors").values())
    assert after["weight_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in stored)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "student")])
    assert shown.exit_code == 0 and "for each token that is read" in shown.output
    assert open_donor(tmp_path / "student").num_attention_heads == NUM_ATTENTION_HEADS
