"""Which parameters a phase trains."""

import re

from torch import nn

from ..convert.layouts import layout_of
from ..refusal import Refusal


def trained_names(model: nn.Module, train: str) -> frozenset[str]:
    """Names, as in `model.named_parameters()`, of what `train` means for this model.

    Args:
        model: of a known family, bare or wrapped by peft, whose own choice of what requires gradients still counts.
        train: "all", "attention" or "key_value".

    Raises:
        Refusal: nothing would be trained.
    """
    layout = layout_of(model.config.model_type, "phase") if train != "all" else None
    pattern = ""
    if train == "attention":
        pattern = _attention(layout)
    elif train == "key_value":
        names = [layout.key, layout.value] if layout.fused is None else [layout.fused]
        pattern = f"{_attention(layout)}({'|'.join(map(re.escape, names))})\\."
    names = (name for name, _ in model.named_parameters())
    found = frozenset(name for name in names if re.search(pattern, name.replace("_checkpoint_wrapped_module.", "")))
    if not any(tensor.requires_grad for name, tensor in model.named_parameters() if name in found):
        raise Refusal(
            f"train = {train}: no such parameter of this model requires a gradient. Unfreeze them, or train something else."
        )
    return found


def _attention(layout) -> str:
    return re.escape(layout.attention).replace(re.escape("{layer_idx}"), r"\d+") + r"\."
