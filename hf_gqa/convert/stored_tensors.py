"""What a checkpoint stores against what its class has: nothing missing, unknown, of another shape, or quantized."""

import re
from collections.abc import Callable

from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..refusal import Refusal
from ..weights.checkpoint import FLOAT_DTYPES, Checkpoint, StateDict
from .composites import Composite
from .families import Family


REBUILT_BUFFERS = (
    r"embeddings\.position_ids$|rotary_emb\.inv_freq$|\.attn(\.attention)?\.(masked_bias|bias|causal_mask)$"
)


def class_names(model: PreTrainedModel, family: Family, composite: Composite | None) -> Callable[[str], str]:
    """Name of a tensor in a checkpoint -> below the base model of its class, for comparison with others so made."""

    def plain(name: str) -> str:
        name = family.own_name(name.removeprefix(f"{model.base_model_prefix}."))
        return name if composite is None else composite.plain(name)

    return plain


def check_tensors(
    where: str, model: PreTrainedModel, family: Family, composite: Composite | None, tensors: Checkpoint | StateDict
) -> tuple[frozenset[str], bool]:
    """Compare what is stored with what `model` (without values) has.

    Returns the stored tensors that it rebuilds itself, and whether the others are as published and not as in the class.

    A checkpoint may be of the base model or of a head class, with or without the base model's prefix, and in the layout of
    the class or in that of published checkpoints, from which transformers converts when it loads (experts by themselves).
    """
    plain = class_names(model, family, composite)
    states = [model.state_dict(), revert_weight_conversion(model, model.state_dict())]
    layouts = [{plain(name): tuple(t.shape) for name, t in state.items()} for state in states]
    stored = {}
    for name in (name for names in tensors.shards.values() for name in names):
        twin = stored.setdefault(plain(name), name)
        if twin != name:
            raise Refusal(
                f"{where}: '{name}' and '{twin}' are the same tensor of the model. Remove the one that is not meant."
            )
    expected = max(layouts, key=lambda shapes: len(shapes.keys() & stored.keys()))
    rebuilt = re.compile("|".join([REBUILT_BUFFERS, *(model._keys_to_ignore_on_load_unexpected or ())]))
    extra = sorted(stored.keys() - expected.keys())
    unknown = [stored[name] for name in extra if not rebuilt.search(name)]
    if unknown:
        raise Refusal(
            f"{where}: '{unknown[0]}' is no tensor of {type(model).__name__} ({len(unknown)} such tensors). "
            f"Load the donor with its own class and save it again, so that only its tensors remain."
        )
    pairs = {plain(a): plain(b) for a, b in (getattr(model, "all_tied_weights_keys", None) or {}).items()}
    tied = pairs.keys() | {
        other for name, other in pairs.items() if name in stored
    }  # one of two that are one is enough
    computed = re.compile("|".join(map(plain, model._keys_to_ignore_on_load_missing or ())) or r"(?!)")
    missing = [name for name in sorted(expected.keys() - stored.keys() - tied) if not computed.search(name)]
    _check_missing(where, model, missing)
    for name, shape in expected.items():
        if name in stored:
            _check_tensor(where, stored[name], shape, tensors)
    return frozenset(stored[name] for name in extra), expected.keys() != layouts[0].keys()


def _check_missing(where: str, model: PreTrainedModel, missing: list[str]) -> None:
    if missing and all(name.startswith("pooler.") for name in missing):
        raise Refusal(
            f"{where}: has no pooler, which AutoModel would make up anew at every load. Load it once with AutoModel and save it "
            f"with the pooler that it gets; what pools otherwise, as sentence encoders do, does not read it."
        )
    if missing:
        raise Refusal(
            f"{where}: '{missing[0]}' of {type(model).__name__} is missing ({len(missing)} such tensors). "
            f"Download the donor again."
        )


def _check_tensor(where: str, name: str, shape: tuple[int, ...], tensors: Checkpoint | StateDict) -> None:
    if tensors.shape(name) != shape:
        raise Refusal(
            f"{where}: '{name}' has shape {list(tensors.shape(name))}, but its configuration says {list(shape)}. "
            f"Weights and config.json are not of the same model: download both again."
        )
    if tensors.dtype(name) not in FLOAT_DTYPES.values():
        raise Refusal(
            f"{where}: '{name}' is stored as {tensors.dtype(name)}, which looks quantized. "
            f"Convert the original weights (F64, F32, F16 or BF16)."
        )
