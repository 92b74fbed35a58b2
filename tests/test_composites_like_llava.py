"""Composites that differ from gemma3 in nothing but their towers: any text tower that converts natively, towers untouched."""

from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, DynamicCache, LlavaConfig

from hf_gqa import Refusal, convert, convert_checkpoint
from hf_gqa.convert.composites import COMPOSITES
from hf_gqa.runtime.native_call import with_cache

from .conformance import assert_close_for_float32, assert_same_tensors
from .oracle import mean_of
from .tiny_donors import fill_with_noise, tiny_config


IMAGE_TOKEN = 98
TEXT = [7, 11, 5, 23, 42, 8]
CLIP = {"model_type": "clip_vision_model", "projection_dim": 16}


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A composite of this text tower; an image of so many `pixels` becomes `image_tokens`."""

    text: str
    image_tokens: int
    vision: dict
    fields: dict = field(default_factory=dict)
    inputs: dict = field(default_factory=dict)
    pixels: tuple = (1, 3, 28, 28)


TINY = {
    "llava": Tiny(text="llama", image_tokens=4, vision=CLIP),
    "llava_next": Tiny(
        text="mistral",
        image_tokens=10,
        vision=CLIP,
        fields={"image_grid_pinpoints": [[28, 28]]},
        inputs={"image_sizes": torch.tensor([[28, 28]])},
        pixels=(1, 2, 3, 28, 28),
    ),
    "vipllava": Tiny(text="llama", image_tokens=4, vision=CLIP, fields={"vision_feature_layers": [-2, -1]}),
    "internvl": Tiny(text="qwen2", image_tokens=1, vision={"image_size": [28, 28], "patch_size": [14, 14]}),
    "mistral3": Tiny(
        text="mistral",
        image_tokens=4,
        vision={"model_type": "pixtral", "head_dim": 8, "image_size": 56},
        inputs={"image_sizes": torch.tensor([[56, 56]])},
        pixels=(1, 3, 56, 56),
    ),
    "paligemma": Tiny(text="gemma2", image_tokens=4, vision={"model_type": "siglip_vision_model"}),
}
every_composite = pytest.mark.parametrize("model_type", TINY)


def tiny_composite(model_type: str, text: str | None = None):
    tiny = TINY[model_type]
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config_class = CONFIG_MAPPING[model_type]
    fields = {"hidden_size": 32, "projection_dim": 32, "vocab_size": 99} if model_type == "paligemma" else {}
    token = "image_token_index" if "image_token_index" in config_class.__dataclass_fields__ else "image_token_id"
    config = config_class(
        text_config=tiny_config(text or tiny.text).to_dict(),
        vision_config=vision | tiny.vision,
        tie_word_embeddings=False,
        **{token: IMAGE_TOKEN},
        **fields,
        **tiny.fields,
    )
    attention = "eager" if model_type == "paligemma" else None  # Gemma 2 has no other
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention).eval()
    fill_with_noise(model, scale=0.2)
    return model


@torch.no_grad()
def logits_of(model, image: bool, **kwargs) -> torch.Tensor:
    tiny = TINY[model.config.model_type]
    tokens = torch.tensor([[2, *([IMAGE_TOKEN] * tiny.image_tokens if image else []), *TEXT]])
    seen = {"pixel_values": torch.randn(tiny.pixels, generator=torch.Generator().manual_seed(1)), **tiny.inputs}
    return model(tokens, attention_mask=torch.ones_like(tokens), **(seen if image else {}), **kwargs).logits


@torch.no_grad()
def overwrite_groups(donor, groups: int) -> None:
    for layer in donor.model.language_model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            for parameter in projection.parameters():
                for group in parameter.unflatten(0, (groups, -1, 8)):
                    group.copy_(mean_of(list(group)).expand_as(group))


def test_all_but_gemma3_are_looked_at():
    assert TINY.keys() | {"gemma3"} == COMPOSITES.keys()


@every_composite
def test_identity_plan_changes_no_bit(model_type):
    donor = tiny_composite(model_type)
    student = convert(donor, num_key_value_heads=4)
    assert type(student) is type(donor)
    assert_same_tensors(student.state_dict(), donor.state_dict())
    for image in (False, True):
        assert torch.equal(logits_of(student, image), logits_of(donor, image))
    assert not torch.equal(logits_of(donor, True)[:, -1], logits_of(donor, False)[:, -1]), "the image is not looked at"


@every_composite
def test_student_equals_oracle_and_caches_fewer_heads(model_type):
    donor = tiny_composite(model_type)
    student = convert(donor, num_key_value_heads=2)
    overwrite_groups(donor, 2)
    for image in (False, True):
        assert_close_for_float32(logits_of(student, image), logits_of(donor, image))
    cache = DynamicCache(config=student.config.get_text_config())
    logits_of(student, True, **with_cache(student, cache))
    assert [layer.keys.shape[1] for layer in cache.layers] == [2, 2]


def as_published(name: str) -> str:
    """A name of the class as the first releases of these models stored it, and most of the Hub still does."""
    name = name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.")
    name = name.replace("vision_model.vision_model.", "vision_model.")
    return name.replace("language_model.", "language_model.model.").replace("lm_head.", "language_model.lm_head.")


@pytest.mark.parametrize("model_type", ["llava", "llava_next"])
def test_towers_on_disk_pass_through_under_their_published_names(model_type, tmp_path):
    donor = tiny_composite(model_type)
    donor.save_pretrained(tmp_path / "donor")
    before = {as_published(name): tensor for name, tensor in donor.state_dict().items()}
    save_file(before, tmp_path / "donor" / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(tmp_path / "donor", tmp_path / "student", num_key_value_heads=2)
    after = load_file(tmp_path / "student" / "model.safetensors")
    heads = [name for name in before if "language_model" in name and (".k_proj" in name or ".v_proj" in name)]
    assert len(heads) == 4 and all(2 * len(after[name]) == len(before[name]) for name in heads)
    assert_same_tensors(*({n: t for n, t in tensors.items() if n not in heads} for tensors in (after, before)))
    student, loading = type(donor).from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(loading.values())
    assert torch.equal(logits_of(student, True), logits_of(convert(donor, num_key_value_heads=2), True))


def test_text_tower_without_native_grouped_heads_is_refused():
    donor = tiny_composite("llava", text="gpt_neox")
    with pytest.raises(
        Refusal, match=r"LlavaForConditionalGeneration cannot become a bundle, and not a native student .*"
    ):
        convert(donor, num_key_value_heads=2)


def test_text_tower_of_an_unknown_family_is_refused(tmp_path):
    LlavaConfig(text_config={"model_type": "persimmon"}).save_pretrained(tmp_path)
    with pytest.raises(Refusal, match=r"'persimmon' is not a family that hf_gqa converts"):
        convert_checkpoint(tmp_path, tmp_path / "student", num_key_value_heads=2)
