"""The attention layout of any checkpoint that hf_gqa reads or writes."""

from ..runtime.attention_layout import AttentionLayout
from .families import family_of
from .relatives import RELATIVES


def layout_of(model_type: str, where: str) -> AttentionLayout:
    """Of a family's native or own class, or of a relative's; Refusal, with the known ones, if there is none."""
    if model_type in RELATIVES.names():
        return RELATIVES.get(model_type).layout
    return family_of(model_type, where).layout_of(model_type)
