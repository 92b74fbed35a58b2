"""Composite models: a language tower beside others, of which the language tower alone is converted."""

from dataclasses import dataclass, replace

from ..refusal import Refusal
from ..runtime.attention_layout import AttentionLayout
from .unsupported import UNSUPPORTED


@dataclass(frozen=True, slots=True, kw_only=True)
class Composite:
    """Where the language tower of one `model_type` is.

    Args:
        tower: path of the tower's base model below the composite's.
        spellings: (beginning of a tensor's name in some checkpoints, the same in the class), the base model's prefix left
            out; what transformers renames when it loads.
    """

    tower: str
    spellings: tuple[tuple[str, str], ...] = ()

    def plain(self, name: str) -> str:
        """A tensor's name as the class has it."""
        for stored, own in self.spellings:
            if name.startswith(stored):
                return own + name.removeprefix(stored)
        return name

    def layout(self, tower_layout: AttentionLayout) -> AttentionLayout:
        return replace(tower_layout, attention=f"{self.tower}.{tower_layout.attention}")

    def stored_paths(self, path: str) -> list[str]:
        """All ways in which checkpoints begin what the class calls `path`."""
        return [path, *(stored + path.removeprefix(own) for stored, own in self.spellings if path.startswith(own))]


LLAVA = Composite(
    tower="language_model",
    spellings=(
        ("language_model.model.", "language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.vision_model.", "vision_tower."),
    ),
)
COMPOSITES = dict.fromkeys(("gemma3", "internvl", "llava", "llava_next", "mistral3", "paligemma", "vipllava"), LLAVA)
TOWERS = ("text_config", "vision_config", "audio_config", "encoder", "decoder")


def composite_of(raw_config: dict, where: str) -> tuple[Composite | None, str]:
    """The composite that a configuration is of, if it is, and the model type of what is converted of it.

    Raises:
        Refusal: it has no text tower, is one that is not known, or ships code of its own.
    """
    model_type = raw_config.get("model_type")
    towers = [field for field in TOWERS if isinstance(raw_config.get(field), dict)]
    if any(model_type in entry.model_types for entry in UNSUPPORTED):
        return None, model_type  # for the families to refuse, with the reason
    if str(model_type) not in COMPOSITES and "text_config" not in towers:
        if towers and "vision_config" in towers:
            raise Refusal(
                f"{where}: model_type = {model_type!r} has {', '.join(towers)} and no text tower ('text_config'), which is "
                f"what would be converted. Nearest that is converted: {', '.join(COMPOSITES)}."
            )
        return None, model_type
    if "text_config" not in towers:
        raise Refusal(
            f"{where}: model_type = {model_type!r} has no text tower ('text_config' is missing), which is what would be "
            f"converted. Download the donor again."
        )
    text_type = raw_config["text_config"].get("model_type")
    if model_type not in COMPOSITES:
        raise Refusal(
            f"{where}: model_type = {model_type!r} is a composite (text tower {text_type!r}) whose towers hf_gqa does not "
            f"know. Nearest that is converted: {', '.join(COMPOSITES)}."
        )
    if "auto_map" in raw_config:
        raise Refusal(f"{where}: a composite with code of its own ('auto_map') is not converted. Use the native class.")
    return COMPOSITES[model_type], text_type
