"""A donor on disk that is run on text one layer at a time: the same student as of one loaded whole, in less memory."""

import gc
import json
import re
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_gqa import convert_checkpoint, open_donor
from hf_gqa.convert import calibration, heads_on_disk
from hf_gqa.convert.calibration import calibrate
from hf_gqa.convert.stored_model import StoredModel, why_loaded_whole

from .alike_donors import rows
from .command_line import run_cli
from .tiny_donors import ENCODERS, MODEL_TYPES, of_each_storage, tiny_donor


DONOR = Path(__file__).parent.parent / "examples" / "donor"
OBSERVING, CLOSED_FORM = "align,mean_pool,refit", "align,mean_pool"


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def stored(model_type: str, folder, **changes):
    tiny_donor(model_type, **changes).to(torch.bfloat16).save_pretrained(folder, max_shard_size="10KB")
    return open_donor(folder)


def loaded_whole(donor):
    return donor.model_class.from_pretrained(donor.folder, config=donor.model_config, dtype="auto").eval()


@pytest.mark.parametrize(
    ("model_type", "method"), [(name, OBSERVING) for name in of_each_storage(MODEL_TYPES)] + [("llama", CLOSED_FORM)]
)
def test_student_is_that_of_the_donor_loaded_whole(model_type, method, tmp_path, monkeypatch):
    donor = stored(model_type, tmp_path / "donor")
    plan = {"num_key_value_heads": 2, "method": method, "calibration": rows()}
    if why_loaded_whole(donor) is None:
        with monkeypatch.context() as patch:
            patch.setattr(donor.model_class, "from_pretrained", None)  # would load it whole
            convert_checkpoint(donor, tmp_path / "one", **plan)
    else:
        assert donor.as_published
        convert_checkpoint(donor, tmp_path / "one", **plan)
    monkeypatch.setattr(calibration, "model_to_run", loaded_whole)
    convert_checkpoint(donor, tmp_path / "other", **plan)
    one, other = (tensors_of(tmp_path / name) for name in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "other").iterdir()) and ".converted-layers" not in names


def test_fit_of_queries_sees_angles_that_are_stored_nowhere(tmp_path, monkeypatch):
    """GPT-J keeps them in a buffer of its attention."""
    donor = stored("gptj", tmp_path / "donor")
    plan = {"num_key_value_heads": 2, "method": "fold,refit_queries", "calibration": rows()}
    convert_checkpoint(donor, tmp_path / "one", **plan)
    monkeypatch.setattr(calibration, "model_to_run", loaded_whole)
    convert_checkpoint(donor, tmp_path / "other", **plan)
    one, other = (tensors_of(tmp_path / name) for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("model_type", ["gpt_neo", "gptj", "opt", "falcon", *ENCODERS[-1:]])
def test_what_is_stored_nowhere_is_computed(model_type, tmp_path):
    """Buffers that the class makes, and embeddings, come out as when the donor is loaded."""
    donor = stored(model_type, tmp_path / "donor")
    assert why_loaded_whole(donor) is None
    one, other = (calibrate(donor, model, rows()) for model in (None, loaded_whole(donor)))
    for seen, expected in zip(one.statistics, other.statistics, strict=True):
        assert torch.equal(seen.moment_FF, expected.moment_FF)


def test_weights_are_rounded_as_loading_would(tmp_path):
    """config.json says bfloat16, the files hold float32."""
    tiny_donor("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    donor = open_donor(tmp_path)
    assert why_loaded_whole(donor) is None
    whole = loaded_whole(donor)
    assert whole.dtype == torch.bfloat16
    one, other = (calibrate(donor, model, rows()).statistics[1] for model in (None, whole))
    assert torch.equal(one.moment_FF, other.moment_FF)


@pytest.mark.parametrize("method", [OBSERVING, CLOSED_FORM])
def test_one_part_has_values_at_a_time(method, tmp_path, monkeypatch):
    """What had values before is gone when the next part gets them, and not only after a collection of garbage."""
    donor = stored("llama", tmp_path / "donor", num_hidden_layers=4)
    filled, paths, fill = [], [], StoredModel.fill

    def watched(self, part, path):
        assert not any(ref() for ref in filled)
        assert all(parameter.is_meta for parameter in self.model.parameters())
        fill(self, part, path)
        filled.extend(weakref.ref(parameter) for parameter in part.parameters())
        paths.append(path)

    monkeypatch.setattr(StoredModel, "fill", watched)
    monkeypatch.setattr(donor.model_class, "from_pretrained", None)
    gc.disable()
    try:
        convert_checkpoint(donor, tmp_path / "student", num_key_value_heads=2, method=method, calibration=rows())
    finally:
        gc.enable()
    assert paths == ["", "layers.0", "layers.1", "layers.2", "layers.3"]
    assert len(filled) == 2 + 4 * 9  # embedding and norm; of each layer seven matrices and two norms


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mixtral"}, "its files are in a layout that transformers converts when it loads"),
        ({"model_type": "llama"}, None),
    ],
)
def test_donor_that_is_loaded_whole_says_so(changes, reason, tmp_path):
    assert why_loaded_whole(stored(folder=tmp_path / "donor", **changes)) == reason


def test_buffers_that_the_class_does_not_compute_are_not_guessed(tmp_path, monkeypatch):
    donor = stored("gptj", tmp_path / "donor")
    monkeypatch.setattr(StoredModel(donor).base_model.__class__, "_init_weights", lambda self, module: None)
    reason = why_loaded_whole(
        donor
    )  # the buffers are in each attention, or since transformers 5.24 in a module for all
    assert re.fullmatch(r"'(h\.1\.attn|rotary_emb)' has a buffer that its class does not compute when it loads", reason)


def test_explanation_says_what_is_loaded(tmp_path):
    asked = ["--num-key-value-heads", 2, "--method", "group,fold,refit", "--dry-run", "--json"]
    (tmp_path / "text.txt").write_text("The cat sat on the mat. " * 99)
    for given, whole in ((["--calibration", tmp_path / "text.txt"], False), (["--calibration-tokens", 512], True)):
        result = run_cli("convert", DONOR, tmp_path / "out", *asked, *given)
        assert result.exit_code == 0, result.output
        said = [note for note in json.loads(result.stdout)["notes"] if "loaded whole" in note]
        assert (
            said
            == ["The donor is loaded whole, to write its own text. Text files take the memory of one layer."] * whole
        )


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    donor = stored("llama", tmp_path / "donor")
    before = sorted(tmp_path.rglob("*"))

    def fill(tensors, file):
        Path(file).write_bytes(b"some")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(heads_on_disk, "save_file", fill)
    with pytest.raises(OSError, match=r"writing failed \(No space left on device\)"):
        convert_checkpoint(donor, tmp_path / "new" / "one", num_key_value_heads=2, method="fold", calibration=rows())
    assert sorted(tmp_path.rglob("*")) == before
