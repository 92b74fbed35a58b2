"""A donor's attentions: how many KV heads each has, and whether they are all there."""

from transformers import PretrainedConfig, PreTrainedModel

from ..refusal import Refusal
from ..runtime.attention_layout import ENCODER, AttentionLayout, attention_sites
from .families import Family


def key_value_heads(family: Family, layout: AttentionLayout, config: PretrainedConfig) -> list[int]:
    """Of each of the sites."""
    plan = getattr(config, "layer_plan", None)
    if plan is not None:
        return [row["num_key_value_heads"] for row in plan]
    if layout.cross_attention is not None:
        return [site.num_attention_heads for site in attention_sites(layout, config)]
    return [family.native_key_value_heads(config)] * getattr(config, layout.num_layers_field)


def decoder_key_value_heads(family: Family, layout: AttentionLayout, config: PretrainedConfig) -> list[int]:
    """Of each of the sites but those of an encoder below a decoder."""
    pairs = zip(attention_sites(layout, config), key_value_heads(family, layout, config), strict=True)
    return [heads for site, heads in pairs if site.kind != ENCODER]


def check_heads(where: str, config: PretrainedConfig, family: Family, layout: AttentionLayout) -> None:
    """Refuse KV heads that query heads cannot share evenly."""
    counts = key_value_heads(family, layout, config)
    for site, heads in zip(attention_sites(layout, config), counts, strict=True):
        if heads < 1 or site.num_attention_heads % heads:
            raise Refusal(
                f"{where}: {heads} KV heads do not divide num_attention_heads = {site.num_attention_heads}, so no model "
                f"of this configuration can run. Correct config.json."
            )


def check_is_whole(where: str, model: PreTrainedModel, family: Family) -> None:
    """Refuse a part of an encoder-decoder."""
    if family.donor_layout.cross_attention is None:
        return
    below = {name for name, _ in model.base_model.named_modules()}
    missing = [site.path for site in attention_sites(family.donor_layout, model.config) if site.path not in below]
    if missing:
        raise Refusal(
            f"{where}: {type(model).__name__} is a part of a '{family.model_type}' and has no {missing[0]}; hf_gqa converts "
            f"encoder and decoder together. Use a donor of class "
            f"{', '.join(sorted(native.__name__ for native in family.own_classes))}."
        )
