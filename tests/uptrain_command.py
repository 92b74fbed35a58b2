"""Tiny runs of `hf-gqa uptrain`, whole and interrupted."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_gqa import convert_checkpoint
from hf_gqa.uptrain.recipe import UptrainRecipe
from hf_gqa.uptrain.trainer import UptrainTrainer

from .command_line import run_cli
from .tiny_donors import tiny_donor
from .tiny_tokenizer import letters


LENGTH, BUDGET, STEP_TOKENS = 32, 1000, 128
SIZES = {
    **{"budget-tokens": BUDGET, "sequence-length": LENGTH, "per-device-train-batch-size": STEP_TOKENS // LENGTH},
    **{"learning-rate": 5e-3, "save-steps": 3, "eval-steps": 4, "logging-steps": 1, "eval-tokens": 256},
}
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "ran", "to", "see", "that", "big", "dog", "who", "had", "one")


@dataclass(frozen=True)
class Folders:
    """A tiny random donor with a tokenizer, its student of half the KV heads, and text."""

    donor: Path
    student: Path
    text: Path

    @property
    def root(self) -> Path:
        return self.donor.parent


def some_text(number_of_words: int, seed: int = 0) -> str:
    picks = torch.randint(len(WORDS), (number_of_words,), generator=torch.Generator().manual_seed(seed))
    return "\n".join(WORDS[pick] for pick in picks)


def write_folders(root: Path, dtype=torch.float32, export="auto", model_type="llama", **changes) -> Folders:
    folders = Folders(root / "donor", root / "student", root / "text.txt")
    tiny_donor(model_type, **changes).to(dtype).save_pretrained(folders.donor)
    letters().save_pretrained(folders.donor)
    convert_checkpoint(folders.donor, folders.student, num_key_value_heads=2, export=export)
    folders.text.write_text(some_text(1200))
    return folders


def arguments_of(folders: Folders, output: Path, *flags, **options) -> list:
    """Of a run of 8 steps, the last of them smaller; None takes an option away, a list repeats it."""
    options = {name.replace("_", "-"): value for name, value in options.items()}
    given = {"teacher": folders.donor, "train-file": folders.text} | SIZES | options
    given |= {"eval-tokens": None} if "eval-file" in options else {}
    pairs = [(name, one) for name, value in given.items() for one in (value if isinstance(value, list) else [value])]
    made = [part for name, value in pairs if value is not None for part in (f"--{name}", value)]
    return ["uptrain", folders.student, output, *made, *flags]


def run_uptrain(folders: Folders, output: Path, *flags, **options):
    return run_cli(*arguments_of(folders, output, *flags, **options))


def uptrained(folders: Folders, output: Path, *flags, **options) -> dict:
    """What `uptraining.json` says of a run that went well."""
    result = run_uptrain(folders, output, *flags, **options)
    assert result.exit_code == 0 and result.stderr == "", result.stderr or repr(result.exception)
    assert sorted(path.name for path in output.parent.glob(f"*{output.name}*")) == [output.name]
    return json.loads((output / "uptraining.json").read_text())


TEXT = {"train_file": "a.txt", "budget_tokens": 1000}
FRACTION = {"budget_tokens": None, "budget_fraction": 0.05, "pretraining_tokens": 10**12}
NO_TEXT = {"train_file": ()}


def recipe(**changes) -> UptrainRecipe:
    return UptrainRecipe(**TEXT | changes)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))
        yield


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def loss_by_hand(folder: Path, text: Path) -> float:
    """Mean cross-entropy of a text that is one document, in rows of LENGTH that begin anew."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), letters()
    tokens = torch.tensor([*tokenizer(text.read_text(), verbose=False)["input_ids"], tokenizer.eos_token_id])
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    with torch.no_grad():
        logits = model.eval()(rows).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


def interrupted(folders: Folders, output: Path, monkeypatch, **options):
    """A run that ends in its fifth step; the checkpoint of step 3 is there."""
    original, calls = UptrainTrainer.training_step, []

    def step(*args, **kwargs):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(UptrainTrainer, "training_step", step)
        result = run_uptrain(folders, output, **options)
    assert result.exit_code in (1, 130) and "Traceback" not in result.stderr
    assert [path.name for path in output.parent.iterdir()] == [f"{output.name}.unfinished"]
    assert (output.parent / f"{output.name}.unfinished/checkpoint-3").is_dir()
