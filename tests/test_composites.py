"""A composite's language tower converts, in memory and on disk; everything else of it passes through bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, Gemma3Config, Gemma3ForConditionalGeneration

from hf_gqa import ConversionPlan, Refusal, convert, convert_checkpoint, open_donor, verify
from hf_gqa.convert.target import choose_target
from hf_gqa.export.explanation import explain
from hf_gqa.runtime.native_call import with_cache

from .conformance import assert_close_for_float32, assert_same_tensors
from .oracle import mean_of
from .tiny_donors import fill_with_noise, tiny_config


IMAGE_TOKEN, IMAGE_TOKENS = 98, 4
TEXT = [7, 11, 5, 23, 42, 8]


@pytest.fixture(scope="module")
def donor() -> Gemma3ForConditionalGeneration:
    config = Gemma3Config(
        text_config=tiny_config("gemma3_text").to_dict(),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=IMAGE_TOKENS,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=96,
        eoi_token_index=97,
        tie_word_embeddings=False,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    fill_with_noise(model, scale=0.2)
    return model


def inputs(image: bool) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([[2, *([96] + [IMAGE_TOKEN] * IMAGE_TOKENS + [97] if image else []), *TEXT]])
    found = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if image:
        pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
        found |= {"pixel_values": pixels, "token_type_ids": (tokens == IMAGE_TOKEN).long()}
    return found


@torch.no_grad()
def logits_of(model, image: bool, **kwargs) -> torch.Tensor:
    return model(**inputs(image), **kwargs).logits


def oracle_of(donor, groups: int):
    oracle = type(donor)(donor.config).eval()
    oracle.load_state_dict(donor.state_dict())
    with torch.no_grad():
        for layer in oracle.model.language_model.layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                for group in projection.weight.unflatten(0, (groups, -1, 16)):
                    group.copy_(mean_of(list(group)).expand_as(group))
    return oracle


every_input = pytest.mark.parametrize("image", [False, True], ids=["text", "image"])


@every_input
def test_identity_plan_changes_no_bit(donor, image):
    student = convert(donor, num_key_value_heads=4)
    assert type(student) is type(donor)
    assert_same_tensors(student.state_dict(), donor.state_dict())
    assert torch.equal(logits_of(student, image), logits_of(donor, image))
    wanted = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(student.generate(**inputs(image), **wanted), donor.generate(**inputs(image), **wanted))


@every_input
@pytest.mark.parametrize("groups", [2, 1])
def test_student_equals_oracle_and_caches_fewer_heads(donor, image, groups):
    student = convert(donor, num_key_value_heads=groups)
    assert_close_for_float32(logits_of(student, image), logits_of(oracle_of(donor, groups), image))
    assert not torch.allclose(logits_of(student, image), logits_of(donor, image), atol=1e-3)
    cache = DynamicCache(config=student.config)
    logits_of(student, image, **with_cache(student, cache))
    assert [layer.keys.shape[1] for layer in cache.layers] == [groups, groups]


@every_input
def test_generation_is_the_same_without_a_cache(donor, image):
    student = convert(donor, num_key_value_heads=2)
    wanted = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    cached, uncached = (
        student.generate(**inputs(image), **wanted, use_cache=use_cache, return_dict_in_generate=True)
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_close_for_float32(torch.stack(cached.logits), torch.stack(uncached.logits))


SPELLINGS = {  # of the parts of the names on disk
    "as saved": lambda name: name,
    "of the class": None,
    "as published": lambda name: name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_on_disk_the_towers_pass_through_under_their_names(donor, spelling, tmp_path):
    donor.save_pretrained(tmp_path / "donor")
    file = tmp_path / "donor" / "model.safetensors"
    rename, plan = SPELLINGS[spelling], ConversionPlan(num_key_value_heads=2)
    before = donor.state_dict() if rename is None else {rename(name): t for name, t in load_file(file).items()}
    if spelling == "as published" and any("vision_model.vision_model" in name for name in before):
        before = {name.replace("vision_model.vision_model", "vision_model"): t for name, t in before.items()}
    save_file(before, file, metadata={"format": "pt"})
    explained = explain(opened := open_donor(tmp_path / "donor"), plan, choose_target(opened, plan))
    convert_checkpoint(tmp_path / "donor", tmp_path / "student", plan)
    after = load_file(tmp_path / "student" / "model.safetensors")
    assert after.keys() == before.keys()
    assert explained.before["parameters"] == sum(t.numel() for t in before.values())
    assert explained.after["parameters"] == sum(t.numel() for t in after.values())
    heads = [name for name in before if "language_model" in name and (".k_proj" in name or ".v_proj" in name)]
    assert len(heads) == 4 and all(2 * len(after[name]) == len(before[name]) for name in heads)
    assert_same_tensors(*({n: t for n, t in tensors.items() if n not in heads} for tensors in (after, before)))
    student, loading = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(loading.values())
    assert student.config.text_config.num_key_value_heads == 2
    assert torch.equal(logits_of(student, True), logits_of(convert(donor, num_key_value_heads=2), True))


@pytest.mark.slow
def test_verify_loads_it_in_a_fresh_process_and_compares(donor, tmp_path):
    donor.save_pretrained(tmp_path / "donor")
    convert_checkpoint(tmp_path / "donor", tmp_path / "student", num_key_value_heads=2)
    checks = verify(tmp_path / "student", open_donor(tmp_path / "donor"))
    assert checks and all(check.passed for check in checks), checks


def test_calibrated_methods_see_the_language_tower(donor):
    rows = torch.randint(3, 90, (8, 32), generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="calibration"):
        student = convert(donor, num_key_value_heads=2, method="group,align,mean_pool,refit", calibration=rows[:2])
    assert torch.isfinite(logits_of(student, True)).all()
    assert not torch.equal(logits_of(student, False), logits_of(convert(donor, num_key_value_heads=2), False))


def test_bundle_of_a_composite_is_refused(donor):
    with pytest.raises(Refusal, match=r"Gemma3ForConditionalGeneration cannot become a bundle"):
        convert(donor, num_key_value_heads=2, export="bundle")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "gemma3", "vision_config": {}}, r"'gemma3' has no text tower \('text_config' is missing\)"),
        (
            {"model_type": "siglip_like", "vision_config": {}},
            r"has vision_config and no text tower .* converted: gemma3, internvl, llava, ",
        ),
        (
            {"model_type": "fuyu", "text_config": {"model_type": "persimmon"}, "vision_config": {}},
            r"'fuyu' is a composite \(text tower 'persimmon'\) whose towers .* converted: gemma3, internvl, llava, ",
        ),
        (
            {"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text"}, "vision_config": {}},
            r"'qwen2_vl' rotates sections of each head by time, height and width \(M-RoPE\)",
        ),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3n_text"}},
            r"'gemma3n_text' shares keys and values",
        ),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "auto_map": {"AutoModel": "x.Y"}},
            r"a composite with code of its own \('auto_map'\) is not converted",
        ),
    ],
)
def test_composites_that_cannot_be_converted_say_why(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal, match=message):
        open_donor(tmp_path)
