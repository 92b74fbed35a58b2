"""A bundle needs nothing but transformers: it is loaded, and saved again, in processes that cannot import hf_gqa."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

import hf_gqa.runtime
from hf_gqa import convert, convert_checkpoint
from hf_gqa.convert.families import FAMILIES, load_family

from .conformance import assert_same_tensors, every_family
from .sharing_students import sharing_student
from .tiny_donors import MODEL_TYPES, tiny_donor, tokens_and_mask
from .uneven_students import uneven_student


RUNTIME_FOLDER = Path(hf_gqa.runtime.__file__).parent
# How a bundle came about, and with which layers; two families go through all, each other through two.
SOURCES = ("written", "saved", "uneven", "shared")
ALL_SOURCES = ("llama", "gpt2")
BUNDLES = [
    (model_type, source)
    for turn, model_type in enumerate(MODEL_TYPES)
    for source in (SOURCES if model_type in ALL_SOURCES else ("written", SOURCES[1 + turn % 3]))
]
HOPS = 3

# Argument: JSON with `jobs`, a list of [folder, folder to save to, file for outputs], and `report`, the file that takes
# what each folder was loaded as: on the standard output transformers asks whether the code may be run.
WITHOUT_HF_GQA = """
import json, sys
sys.modules["hf_gqa"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

arguments = json.loads(sys.argv[1])
tokens, mask = torch.tensor(arguments["tokens"]), torch.tensor(arguments["mask"])
found = {}
for folder, saved, outputs in arguments["jobs"]:
    report = found[folder] = {"refusals": [], "missing": []}
    if arguments["first_hop"]:
        for auto_class in (AutoConfig, AutoModel, AutoModelForCausalLM):
            for flags in ({}, {"trust_remote_code": False}):
                try:
                    auto_class.from_pretrained(folder, **flags)
                    report["refusals"].append("accepted")
                except ValueError as error:
                    report["refusals"].append(str(error))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    base, head = (
        auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        for auto_class in (AutoModel, AutoModelForCausalLM)
    )
    report["classes"] = [type(x).__name__ for x in (config, base[0], head[0])]
    report["modules"] = [type(x).__module__ for x in (config, base[0], head[0])]
    report["missing"] = [sorted(head[1]["missing_keys"]), sorted(head[1]["unexpected_keys"]), sorted(base[1]["missing_keys"])]
    with torch.no_grad():
        logits = head[0].eval()(tokens, attention_mask=mask).logits
        hidden = base[0].eval()(tokens, attention_mask=mask).last_hidden_state
        generated = head[0].generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    save_file({"logits": logits, "hidden": hidden, "generated": generated}, outputs)
    head[0].save_pretrained(saved)
with open(arguments["report"], "w") as file:
    json.dump(found, file)
"""


def shipped_names(model_type: str) -> set[str]:
    """The family's file and, transitively, the siblings it imports, read from the source itself."""
    names, waiting = set(), [f"modeling_gqa_{model_type}"]
    while waiting:
        name = waiting.pop()
        if f"{name}.py" not in names:
            names.add(f"{name}.py")
            waiting += re.findall(r"^from \.(\w+) import", (RUNTIME_FOLDER / f"{name}.py").read_text(), re.MULTILINE)
    return names


def load_without_hf_gqa(work: Path, hop: int, folders: dict[str, Path]) -> dict:
    """Load every folder in one process, save it again under `work`, and return what was seen by the folder's key."""
    tokens, mask = tokens_and_mask()
    target, outputs = work / f"hop{hop}", work / f"outputs{hop}"
    for folder in (target, outputs):
        folder.mkdir()
    arguments = {
        "tokens": tokens.tolist(),
        "mask": mask.tolist(),
        "first_hop": hop == 1,
        "report": str(outputs / "report.json"),
        "jobs": [[str(f), str(target / key), str(outputs / f"{key}.safetensors")] for key, f in folders.items()],
    }
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_HF_GQA, json.dumps(arguments)],
        env=environment | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / f"modules{hop}")},
        stdin=subprocess.DEVNULL,
        cwd=work,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    reports = json.loads((outputs / "report.json").read_text())
    return {
        key: reports[str(folder)]
        | {"folder": folder, "saved": target / key, "tensors": load_file(outputs / f"{key}.safetensors")}
        for key, folder in folders.items()
    }


def student_of(model_type: str, source: str) -> PreTrainedModel:
    if source == "uneven":
        return uneven_student(model_type)
    if source == "shared":
        passes_keywords = load_family(model_type).donor_layout.passes_keywords
        return sharing_student(model_type, "mixed" if passes_keywords else "albert")
    return convert(tiny_donor(model_type), num_key_value_heads=2, export="bundle")


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> dict:
    """The bundles of every family, by key: converted on disk, saved from memory, and with uneven layers."""
    work = tmp_path_factory.mktemp("bundles")
    found = {}
    for model_type, source in BUNDLES:
        found[f"{model_type}-{source}"] = student = student_of(model_type, source)
        if source == "written":
            tiny_donor(model_type).save_pretrained(work / model_type)
            convert_checkpoint(
                work / model_type, work / f"{model_type}-written", num_key_value_heads=2, export="bundle"
            )
        else:
            student.save_pretrained(work / f"{model_type}-{source}")
    return {"work": work, "models": found}


@pytest.fixture(scope="module")
def first_hop(students) -> dict:
    folders = {key: students["work"] / key for key in students["models"]}
    return load_without_hf_gqa(students["work"], 1, folders)


@pytest.fixture(scope="module")
def hops(students, first_hop) -> list[dict]:
    reports = [first_hop]
    for hop in range(2, HOPS + 1):
        folders = {key: report["saved"] for key, report in reports[-1].items()}
        reports.append(load_without_hf_gqa(students["work"], hop, folders))
    return reports


every_bundle = pytest.mark.parametrize(("model_type", "source"), BUNDLES)


@torch.no_grad()
def assert_same_outputs(report: dict, student) -> None:
    tokens, mask = tokens_and_mask()
    student.set_attn_implementation("grouped_sdpa")  # the default of our own classes, whatever the donor had
    assert torch.equal(report["tensors"]["logits"], student(tokens, attention_mask=mask).logits)
    hidden = student.base_model(tokens, attention_mask=mask).last_hidden_state
    assert torch.equal(report["tensors"]["hidden"], hidden)
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(report["tensors"]["generated"], student.generate(tokens, attention_mask=mask, **greedy))


def assert_is_bundle(folder: Path, model_type: str, student) -> None:
    """The code is ours byte for byte, and the configuration says where it is."""
    shipped = {path.name: path.read_bytes() for path in folder.glob("*.py")}
    assert shipped == {name: (RUNTIME_FOLDER / name).read_bytes() for name in shipped_names(model_type)}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    file, stem = f"modeling_gqa_{model_type}", type(student).__name__.removesuffix("ForCausalLM")
    heads = {key: f"{file}.{stem}{key.removeprefix('AutoModel')}" for key in load_family(model_type).head_classes}
    assert config["auto_map"] == {"AutoConfig": f"{file}.{stem}Config", "AutoModel": f"{file}.{stem}Model", **heads}
    assert config["model_type"] == f"gqa_{model_type}"
    assert config["architectures"] == [f"{stem}ForCausalLM"]
    assert config["layer_plan"] == student.config.layer_plan


@every_bundle
def test_bundle_is_complete(model_type, source, students):
    key = f"{model_type}-{source}"
    assert_is_bundle(students["work"] / key, model_type, students["models"][key])


@every_bundle
def test_loads_without_hf_gqa_and_computes_the_same(model_type, source, students, first_hop):
    key = f"{model_type}-{source}"
    report, student = first_hop[key], students["models"][key]
    stem = type(student).__name__.removesuffix("ForCausalLM")
    assert report["classes"] == [f"{stem}Config", f"{stem}Model", f"{stem}ForCausalLM"]
    assert all(module.startswith("transformers_modules.") for module in report["modules"])
    assert not any(report["missing"])
    assert_same_outputs(report, student)


@every_bundle
def test_without_trust_it_is_refused(model_type, source, first_hop):
    refusals = first_hop[f"{model_type}-{source}"]["refusals"]
    assert len(refusals) == 6
    assert all("trust_remote_code=True" in refusal for refusal in refusals)


@pytest.mark.slow
@every_bundle
def test_survives_three_hops(model_type, source, students, hops):
    key = f"{model_type}-{source}"
    student = students["models"][key]
    assert len(hops) == HOPS
    for report in hops:
        assert not any(report[key]["missing"])
        assert_same_outputs(report[key], student)
        assert_is_bundle(report[key]["saved"], model_type, student)


@pytest.mark.slow
@every_family
def test_returns_from_its_journey_as_a_donor(model_type, students, hops, tmp_path):
    """What others saved again can be loaded, and converted further, where hf_gqa is installed."""
    folder = hops[-1][f"{model_type}-written"]["saved"]
    student = students["models"][f"{model_type}-written"]
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is type(student)
    assert_same_tensors(again.state_dict(), student.state_dict())
    convert_checkpoint(folder, tmp_path / "further", num_key_value_heads=1, export="bundle")
    expected = convert(student, num_key_value_heads=1, export="bundle")
    assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "further").state_dict(), expected.state_dict())


@every_bundle
def test_loads_without_trust_where_hf_gqa_is_imported(model_type, source, students):
    key = f"{model_type}-{source}"
    folder, student = students["work"] / key, students["models"][key]
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is type(student.config)
    head, base = AutoModelForCausalLM.from_pretrained(folder), AutoModel.from_pretrained(folder)
    assert type(head) is type(student)
    assert type(base) is type(student.base_model)
    assert_same_tensors(head.state_dict(), student.state_dict())
    assert_same_tensors(base.state_dict(), student.base_model.state_dict())


@pytest.mark.parametrize("model_type", FAMILIES.names())
def test_first_file_names_every_other(model_type):
    """transformers before 5.10 fetches only the files that the first one imports directly."""
    first = RUNTIME_FOLDER / f"modeling_gqa_{model_type}.py"
    named = set(re.findall(r"^from \.(\w+) import", first.read_text(), re.MULTILINE))
    assert shipped_names(model_type) == {first.name, *(f"{name}.py" for name in named)}
