"""The attention layout of any checkpoint that hf_gqa reads or writes."""

from ..runtime.attention_layout import AttentionLayout
from .families import family_of


def layout_of(model_type: str, where: str) -> AttentionLayout:
    """Of a family's native or own class; Refusal, with the known ones, if there is none."""
    return family_of(model_type, where).layout_of(model_type)
