"""Bundles whose layers have different numbers of KV heads."""

import torch
import transformers
from transformers import PreTrainedModel

from hf_gqa.convert.families import load_family

from .tiny_donors import default_head, tiny_config, tiny_donor


UNEVEN = (2, 1)


def auto_head(model_type: str):
    return getattr(transformers, default_head(model_type))


def bundle_config(model_type: str, heads: tuple[int, ...] | None, **changes):
    family = load_family(model_type)
    donor = tiny_config(model_type, **changes).to_dict()
    for field in ("model_type", "num_key_value_heads", "architectures", "transformers_version"):
        donor.pop(field, None)
    plan = heads and [{"num_key_value_heads": n} for n in heads]
    return family.config_class(**donor, num_key_value_heads=heads and max(heads), layer_plan=plan)


def uneven_student(model_type: str, heads: tuple[int, ...] = UNEVEN) -> PreTrainedModel:
    """A bundle whose layers have different numbers of KV heads, with weights that show in the logits."""
    student = auto_head(model_type).from_config(bundle_config(model_type, heads)).eval()
    donor = tiny_donor(model_type)
    generator = torch.Generator().manual_seed(1)
    like_donor = donor.state_dict()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            same = like_donor.get(name)
            if same is not None and same.shape == parameter.shape:
                parameter.copy_(same)
            else:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return student
