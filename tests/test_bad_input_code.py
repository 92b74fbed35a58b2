"""Donors that ship code of their own: never run unasked, run once and compared when asked."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, dynamic_module_utils
from transformers.models.auto import modeling_auto

from .command_line import assert_one_message, assert_refused, run_cli
from .donor_folders import edit_json, files_of, write_donor


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

with open({marker!r}, "a") as file:
    file.write("executed\\n")
{at_import}


class OwnConfig(LlamaConfig):
    pass


class OwnModel(LlamaModel):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * {scale}
        return output


class OwnForCausalLM(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * {scale}
        return output
"""
OWN = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture(autouse=True)
def own_modules_cache(tmp_path_factory, monkeypatch):
    """Code from a donor is copied into a folder of this test, and what its loading registered is forgotten."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    for name in ("MODEL_MAPPING", "MODEL_FOR_CAUSAL_LM_MAPPING"):
        mapping = getattr(modeling_auto, name)
        monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))


def donor_with_code(tmp_path: Path, scale: float = 1.0, at_import: str = "", auto_map=OWN) -> tuple[Path, Path]:
    """The donor, and the file that its code appends a line to each time it is executed."""
    donor, marker = write_donor(tmp_path / "donor"), tmp_path / "marker"
    code = CODE.format(marker=str(marker), scale=scale, at_import=at_import)
    (donor / "modeling_own.py").write_text(code)
    edit_json(donor / "config.json", auto_map=auto_map, architectures=["OwnForCausalLM"])
    return donor, marker


def convert_cli(donor: Path, output: Path, *options):
    return run_cli("convert", donor, output, "--num-key-value-heads", 2, *options)


@pytest.mark.parametrize("auto_map", [OWN, {"AutoModel": "modeling_own.OwnModel"}, "modeling_own.OwnForCausalLM", {}])
def test_code_is_refused_unless_asked_for(tmp_path, auto_map):
    donor, marker = donor_with_code(tmp_path, auto_map=auto_map)
    words = ["config.json: 'auto_map' names code of the donor's own", "--weights-only", "--trust-remote-code"]
    assert_refused(donor, tmp_path, *words)
    assert_one_message(run_cli("inspect", donor), 2, *words[:2])
    assert not marker.exists()


@pytest.mark.parametrize("export", ["native", "bundle"])
def test_weights_only_never_executes_the_code(tmp_path, export):
    donor, marker = donor_with_code(tmp_path, scale=2.0)
    before = files_of(donor)
    result = convert_cli(donor, tmp_path / "student", "--weights-only", "--export", export)
    assert result.exit_code == 0, result.stderr
    assert run_cli("inspect", donor, "--weights-only").exit_code == 0
    assert not marker.exists() and files_of(donor) == before
    assert not (tmp_path / "student/modeling_own.py").exists()
    written = json.loads((tmp_path / "student/config.json").read_text())
    assert "modeling_own" not in json.dumps(written) and "Own" not in json.dumps(written)
    assert ("auto_map" in written) == (export == "bundle")


@pytest.mark.parametrize("export", ["native", "bundle"])
def test_trusted_code_that_computes_the_same_is_run_once_and_accepted(tmp_path, export):
    donor, marker = donor_with_code(tmp_path)
    result = convert_cli(donor, tmp_path / "student", "--trust-remote-code", "--export", export)
    assert result.exit_code == 0, result.stderr
    assert marker.read_text() == "executed\n"
    plain = tmp_path / "plain"
    assert convert_cli(donor, plain, "--weights-only", "--export", export).exit_code == 0
    tensors = load_file(plain / "model.safetensors")
    written = load_file(tmp_path / "student/model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "student/config.json").read_text() == (plain / "config.json").read_text()


@pytest.mark.parametrize("scale", [1.01, float("nan")])
def test_trusted_code_that_computes_something_else_is_refused(tmp_path, scale):
    donor, marker = donor_with_code(tmp_path, scale=1)
    code = (donor / "modeling_own.py").read_text()
    (donor / "modeling_own.py").write_text(code.replace("* 1", f"* float('{scale}')"))
    before = files_of(donor)
    result = convert_cli(donor, tmp_path / "student", "--trust-remote-code")
    words = ["its own code computes other logits than the native LlamaForCausalLM", "cannot be converted as 'llama'"]
    assert_one_message(result, 2, *words)
    assert marker.exists() and files_of(donor) == before and not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    "auto_map",
    [
        {"AutoModel": "modeling_own.OwnModel"},
        {"AutoConfig": "modeling_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"},
    ],
)
def test_comparison_runs_the_class_that_the_donor_names(tmp_path, auto_map):
    """A donor whose language model is native but whose base model is its own has not been compared by loading the first."""
    donor, marker = donor_with_code(tmp_path, scale=2.0, auto_map=auto_map)
    result = convert_cli(donor, tmp_path / "student", "--trust-remote-code")
    assert_one_message(result, 2, str(donor))
    assert marker.exists() and not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("at_import", "auto_map", "word"),
    [
        ("raise RuntimeError('no such GPU')", OWN, "no such GPU"),
        ("import no_such_package", OWN, "no_such_package"),
        ("this is no Python", OWN, "invalid syntax"),
        ("", {"AutoModelForCausalLM": "modeling_own.NoSuchClass"}, "NoSuchClass"),
        ("", {"AutoModelForCausalLM": "modeling_missing.OwnForCausalLM"}, "modeling_missing"),
    ],
)
def test_trusted_code_that_cannot_be_run_is_one_message(tmp_path, at_import, auto_map, word):
    donor, _ = donor_with_code(tmp_path, at_import=at_import, auto_map=auto_map)
    result = convert_cli(donor, tmp_path / "student", "--trust-remote-code")
    assert_one_message(result, 2, str(donor), word, "--weights-only")
    assert not (tmp_path / "student").exists()


def test_trusted_code_whose_output_has_another_shape_is_refused(tmp_path):
    donor, marker = donor_with_code(tmp_path)
    code = (donor / "modeling_own.py").read_text()
    (donor / "modeling_own.py").write_text(code.replace("output.logits * 1.0", "output.logits[..., :7]"))
    result = convert_cli(donor, tmp_path / "student", "--trust-remote-code")
    assert_one_message(result, 2, str(donor))
    assert marker.exists() and not (tmp_path / "student").exists()


def test_trusted_code_does_not_take_the_place_of_the_native_class(tmp_path):
    """Loading code through AutoModel registers its class for the native configuration, for all that load later."""
    donor, _ = donor_with_code(tmp_path)
    assert convert_cli(donor, tmp_path / "student", "--trust-remote-code").exit_code == 0
    assert AutoModelForCausalLM._model_mapping[LlamaConfig] is LlamaForCausalLM
