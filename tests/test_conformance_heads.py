"""Every head class of the encoders, and of one decoder for each way of storing heads, but the one that the other conformance
tests use; of the other decoders' heads, that they go through conversion and back. What is below a head is the same code.

The oracle is that of test_conformance_oracle.
"""

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import GPT2DoubleHeadsModel, PreTrainedModel

from hf_gqa import Refusal, convert
from hf_gqa.convert.families import load_family, native_class

from .conformance import ATTENTIONS, assert_close_for_float32, assert_same_tensors, has_native_gqa
from .oracle import overwrite_groups
from .tiny_donors import (
    ENCODERS,
    MODEL_TYPES,
    VOCAB_SIZE,
    head_classes,
    of_each_storage,
    tiny_config,
    tiny_donor,
    tokens_and_mask,
    use_attention,
)


HEADS = head_classes(ENCODERS + of_each_storage(MODEL_TYPES))
every_head = pytest.mark.parametrize("model_type, auto_class", HEADS, ids=lambda name: name.rpartition("For")[2])
other_heads = pytest.mark.parametrize(
    "model_type, auto_class",
    [head for head in head_classes(MODEL_TYPES) if head not in HEADS],
    ids=lambda name: name.rpartition("For")[2],
)


@torch.no_grad()
def outputs_of(model: PreTrainedModel, padded: bool = False) -> list[torch.Tensor]:
    """All that the head says, but of tokens that are padding, about which nothing is defined."""
    tokens, mask = tokens_and_mask()
    mask = mask if padded else torch.ones_like(mask)
    if type(model).__name__.endswith("ForMultipleChoice"):
        output = model(tokens[None], attention_mask=mask[None])
    else:
        output = model(tokens, attention_mask=mask)
    found = [tensor for tensor in output.to_tuple() if isinstance(tensor, torch.Tensor)]
    return [tensor[mask.bool()] if tensor.shape[:2] == mask.shape else tensor for tensor in found]


def assert_same_outputs(found: PreTrainedModel, expected: PreTrainedModel, compare) -> None:
    for attention in ATTENTIONS:
        for model in (found, expected):
            use_attention(model, attention, or_skip=False)
        only_eager = not (
            expected._can_set_attn_implementation() or expected._supports_sdpa
        )  # then ours rounds otherwise
        compare = assert_close_for_float32 if only_eager and attention != "eager" else compare
        for padded in (False, True):
            pairs = list(zip(outputs_of(found, padded), outputs_of(expected, padded), strict=True))
            assert pairs
            for ours, theirs in pairs:
                compare(ours, theirs)


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found, expected)


@every_head
def test_bundle_that_changes_nothing_changes_no_bit(model_type, auto_class):
    donor = tiny_donor(model_type, auto_class=auto_class)
    bundle = convert(donor, num_key_value_heads=4, export="bundle")
    assert type(bundle) is load_family(model_type).head_classes[auto_class]
    assert type(bundle.base_model) is load_family(model_type).base_class
    rounds_otherwise = model_type == "modernbert" and transformers.__version__.startswith("5.4.")
    assert_same_outputs(bundle, donor, assert_close_for_float32 if rounds_otherwise else assert_equal)
    native = convert(bundle, num_key_value_heads=4)
    assert type(native) is type(donor) is native_class(type(bundle))
    assert_same_tensors(native.state_dict(), donor.state_dict())


@other_heads
def test_head_of_another_decoder_becomes_a_bundle_and_native_again(model_type, auto_class):
    donor = tiny_donor(model_type, auto_class=auto_class)
    use_attention(donor, "sdpa", or_skip=False)
    bundle = convert(donor, num_key_value_heads=4, export="bundle")
    assert type(bundle) is load_family(model_type).head_classes[auto_class]
    for found, expected in zip(outputs_of(bundle), outputs_of(donor), strict=True):
        assert_equal(found, expected)
    native = convert(bundle, num_key_value_heads=4)
    assert type(native) is type(donor)
    assert_same_tensors(native.state_dict(), donor.state_dict())


@every_head
@pytest.mark.parametrize("after", [2, 1])
def test_student_equals_oracle(model_type, auto_class, after):
    donor = tiny_donor(model_type, auto_class=auto_class)
    exports = ("native", "bundle") if has_native_gqa(model_type) else ("bundle",)
    students = [convert(donor, num_key_value_heads=after, export=export) for export in exports]
    overwrite_groups(donor, after)
    for student in students:
        assert_same_outputs(student, donor, assert_close_for_float32)


# Argument: a list of [Auto class, folder, hops, file for outputs]; each is loaded and saved again, hops times.
WITHOUT_HF_GQA = """
import json, sys
sys.modules["hf_gqa"] = None
import torch, transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel

VOCAB_SIZE = {VOCAB_SIZE}
{functions}
for auto_class, folder, hops, outputs in json.loads(sys.argv[1]):
    for hop in range(hops):
        loader = getattr(transformers, auto_class)
        model, loading = loader.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not any(loading.values()), (folder, loading)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        folder = f"{{folder}}-again"
        model.save_pretrained(folder)
    save_file({{str(number): tensor for number, tensor in enumerate(outputs_of(model.eval(), True))}}, outputs)
"""


@pytest.fixture(scope="module")
def hopped(tmp_path_factory) -> dict:
    """Bundles by family and head: the student, its folder after the journey, and what the clean process computed."""
    work, jobs, found = tmp_path_factory.mktemp("heads"), [], {}
    for model_type, auto_class in HEADS:
        student = convert(tiny_donor(model_type, auto_class=auto_class), num_key_value_heads=2, export="bundle")
        folder, outputs = work / f"{model_type}-{auto_class}", work / f"{model_type}-{auto_class}.safetensors"
        student.save_pretrained(folder)
        hops = 1 if any(job[0] == auto_class for job in jobs) else 3  # code that is hopped is the same for every family
        jobs.append([auto_class, str(folder), hops, str(outputs)])
        found[model_type, auto_class] = student, work / (folder.name + hops * "-again"), outputs
    functions = "\n".join(map(inspect.getsource, (tokens_and_mask, outputs_of)))
    code = WITHOUT_HF_GQA.format(VOCAB_SIZE=VOCAB_SIZE, functions=functions)
    run = subprocess.run(
        [sys.executable, "-I", "-c", code, json.dumps(jobs)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules")},
        stdin=subprocess.DEVNULL,
        cwd=work,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return {key: (student, folder, load_file(outputs)) for key, (student, folder, outputs) in found.items()}


@pytest.mark.slow
@every_head
def test_bundle_survives_its_hops_without_hf_gqa(model_type, auto_class, hopped):
    student, folder, outputs = hopped[model_type, auto_class]
    student.set_attn_implementation("grouped_sdpa")
    expected = outputs_of(student, padded=True)
    assert len(outputs) == len(expected)
    for number, tensor in enumerate(expected):
        assert_close_for_float32(outputs[str(number)], tensor)  # the other process may use other threads
    auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
    family = load_family(model_type)
    ours = {"AutoConfig": family.config_class, "AutoModel": family.base_class, **family.head_classes}
    assert auto_map == {key: f"modeling_gqa_{model_type}.{own.__name__}" for key, own in ours.items()}
    again = getattr(transformers, auto_class).from_pretrained(folder)  # hf_gqa is here: no trust is needed
    assert type(again) is type(student)
    assert_same_tensors(again.state_dict(), student.state_dict())


def test_head_without_a_class_of_ours_is_refused():
    donor = GPT2DoubleHeadsModel(tiny_config("gpt2"))
    with pytest.raises(Refusal) as refused:
        convert(donor, num_key_value_heads=2)
    assert str(refused.value) == (
        "export: GPT2DoubleHeadsModel cannot become a bundle, and not a native student either (a native gpt2 has as many "
        "KV heads as query heads; gpt_bigcode, its native relative, has one KV head only). Use a donor of class "
        "GPT2ForQuestionAnswering, GPT2ForSequenceClassification, GPT2ForTokenClassification, GPT2LMHeadModel, GPT2Model."
    )
