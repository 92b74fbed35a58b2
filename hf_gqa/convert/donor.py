"""Open a donor: a folder, a repository on the Hub, or a model in memory; refuse what we would have to guess about."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..reading import read_json
from ..refusal import Refusal
from ..runtime.attention_layout import AttentionLayout, AttentionSite, attention_sites
from ..weights.checkpoint import Checkpoint, StateDict
from ..weights.rotation import rotation_of
from .bundle_code import foreign_code
from .composites import Composite, composite_of
from .donor_folder import check_no_adapter, locate
from .donor_sites import check_heads, check_is_whole, key_value_heads
from .families import Family, check_flags, family_of, native_class
from .stored_tensors import check_tensors


MOST_LABELS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Donor:
    """A donor whose configuration and tensors have been checked against each other.

    Args:
        name: what the user called it: the repository, the folder's name, or the model's own name.
        folder: where its files are; None for a model in memory.
        revision: the commit on the Hub, if it came from there.
        config: of the language model, which in a composite is one tower.
        model_config: of the whole.
        composite: what surrounds the language tower, or None.
        raw_config: `config.json` as it is on disk; None for a model in memory.
        model_class: the native or own class that its tensors belong to.
        tensors: where its tensors come from.
        dropped: names of tensors that the class rebuilds itself and that are not carried along.
        as_published: whether they are in a layout that transformers converts when it loads, such as experts by themselves.
    """

    name: str
    folder: Path | None
    revision: str | None
    config: PretrainedConfig
    model_config: PretrainedConfig
    composite: Composite | None
    raw_config: dict | None
    family: Family
    layout: AttentionLayout
    model_class: type[PreTrainedModel]
    tensors: Checkpoint | StateDict
    dropped: frozenset[str]
    as_published: bool

    @property
    def sites(self) -> tuple[AttentionSite, ...]:
        """Every attention, in the order of the rows."""
        return attention_sites(self.layout, self.config)

    @property
    def num_attention_heads(self) -> int:
        """Of the decoder."""
        return self.sites[0].num_attention_heads

    @property
    def num_key_value_heads(self) -> list[int]:
        """Of each attention: without an encoder, of each layer."""
        return key_value_heads(self.family, self.layout, self.config)

    @property
    def has_head_norms(self) -> bool:
        """Whether queries and keys are normed between projection and score."""
        switch = self.layout.norm_switch
        return self.layout.query_norm is not None and (switch is None or bool(getattr(self.config, switch)))

    @property
    def has_head_positions(self) -> bool:
        """Whether positions differ between query heads."""
        said = self.layout.head_positions
        return said == "always" or (said is not None and bool(getattr(self.config, said)))

    @property
    def longest_tokens(self) -> int | None:
        """Of a row; None where positions have no end."""
        config = self.config
        return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)

    @property
    def head_dim(self) -> int:
        """Of the decoder."""
        return self.sites[0].head_dim


def open_donor(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    weights_only: bool = False,
    trust_remote_code: bool = False,
) -> Donor:
    """Open a folder or a Hub repository; nothing in it is executed unless `trust_remote_code`.

    Args:
        weights_only: convert a donor that ships its own code as the native class of its `model_type`, unexecuted.
        trust_remote_code: the same, after the donor's code has run once and computed what the native class computes.

    Raises:
        Refusal: anything missing, unreadable, contradictory, quantized, pickled, or of an unknown family.
    """
    folder, commit = locate(str(name_or_path), revision)
    check_no_adapter(folder)
    name = folder.resolve().name if commit is None else str(name_or_path)
    raw = _read_config(folder / "config.json")
    composite, model_type = composite_of(raw, str(folder / "config.json"))
    family = family_of(model_type, str(folder / "config.json"))
    if ships_code(raw, family) and not (weights_only or trust_remote_code):
        raise Refusal(
            f"{folder / 'config.json'}: 'auto_map' names code of the donor's own ({_first_value(raw['auto_map'])}), which "
            f"may compute something else than the native '{family.model_type}'. Use --weights-only to convert its "
            f"tensors as native without running that code, or --trust-remote-code to run it once and compare first."
        )
    if model_type != family.model_type and not weights_only:
        different = foreign_code(folder, raw)
        if different:
            raise Refusal(
                f"{folder}: its code is not that of this hf_gqa (differs: {', '.join(different)}), so it may compute "
                f"something else. If an older hf_gqa wrote it, renew a copy with hf-gqa refresh; or use --weights-only to "
                f"convert its tensors as this hf_gqa understands them."
            )
    config = _parse_config({key: value for key, value in raw.items() if key != "auto_map"}, folder / "config.json")
    if composite is None:
        check_flags(raw, type(config), str(folder / "config.json"))
    model_class = _model_class(raw, config, family, folder / "config.json")
    donor = _checked_donor(name, folder, commit, config, raw, family, model_class, Checkpoint(folder), composite)
    if ships_code(raw, family) and trust_remote_code:
        _compare_with_own_code(donor)
    return donor


def ships_code(raw_config: dict, family: Family) -> bool:
    """Whether a native `model_type` comes with code of its own; that of our bundles is compared with ours."""
    return "auto_map" in raw_config and raw_config["model_type"] == family.model_type


def donor_from_model(model: PreTrainedModel) -> Donor:
    """Take a model in memory as donor; it is read, never changed.

    Raises:
        Refusal: not a plain transformers model, quantized, without values, or of an unknown family.
    """
    if not isinstance(model, PreTrainedModel):
        raise Refusal(
            f"convert: got {type(model).__module__}.{type(model).__name__}, which is not a transformers model. "
            f"Unwrap it first (model.module for DDP, model.merge_and_unload() for PEFT)."
        )
    where = getattr(model.config, "_name_or_path", None) or type(model).__name__
    composite, model_type = composite_of(model.config.to_dict(), where)
    family = family_of(model_type, where)
    if getattr(model.config, "quantization_config", None) is not None:
        raise Refusal(_quantized(where))
    state = model.state_dict()
    empty = [name for name, tensor in state.items() if tensor.is_meta]
    if empty:
        raise Refusal(f"{where}: '{empty[0]}' is on the meta device and has no values. Load the model first.")
    native = getattr(transformers, type(model).__name__, None)
    if type(model) not in (native, *family.own_classes.values()):
        raise Refusal(
            f"{where}: {type(model).__name__} is not a class of transformers or of hf_gqa; its code may compute something "
            f"else. Load the checkpoint with the native class of '{family.model_type}'."
        )
    return _checked_donor(where, None, None, model.config, None, family, type(model), StateDict(state), composite)


def _read_config(path: Path) -> dict:
    if not path.is_file():
        raise Refusal(f"{path}: missing. Give a folder written by save_pretrained, or a repository of such files.")
    raw = read_json(path, "Download the donor again.")
    if not isinstance(raw, dict):
        raise Refusal(f"{path}: holds {type(raw).__name__}, expected an object. Download the donor again.")
    if raw.get("quantization_config"):
        raise Refusal(_quantized(str(path)))
    if isinstance(raw.get("num_labels"), int) and raw["num_labels"] > MOST_LABELS:  # each gets a name when it is parsed
        raise Refusal(f"{path}: num_labels = {raw['num_labels']:,}, allowed are {MOST_LABELS:,}. Correct it.")
    return raw


def _quantized(where: str) -> str:
    return (
        f"{where}: the donor is quantized ('quantization_config' is set), and quantized heads cannot be merged. "
        f"Convert the original weights, then quantize the student."
    )


def _parse_config(raw: dict, path: Path) -> PretrainedConfig:
    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(raw))  # it changes what is nested in place
    except Exception as error:  # whatever the native class raises on values it cannot take
        reason = " ".join(str(error).split())
        raise Refusal(f"{path}: transformers does not accept it ({reason}). Correct the configuration.") from None


def _model_class(raw: dict, config: PretrainedConfig, family: Family, path: Path) -> type[PreTrainedModel]:
    """The class that `architectures` names, native or ours; a donor that ships code may name what it likes."""
    own = {model_class.__name__: model_class for model_class in family.own_classes.values()}
    is_native = config.model_type == family.model_type
    default = native_class(family.default_class) if is_native else family.default_class
    named = raw.get("architectures") or [default.__name__]
    name = named[0] if isinstance(named, list) and isinstance(named[0], str) else ""
    found = own.get(name) or getattr(transformers, name, None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is type(config):
        return found
    if ships_code(raw, family):
        return default
    raise Refusal(
        f"{path}: architectures = {raw.get('architectures')} is not a class of transformers for '{config.model_type}'. "
        f"Expected one like {default.__name__}."
    )


def _checked_donor(name, folder, revision, model_config, raw, family, model_class, tensors, composite) -> Donor:
    where = str(folder or name)
    config = model_config if composite is None else model_config.get_text_config()
    layout, obstacle = family.layout_of(config.model_type), family.donor_obstacle(config)
    if obstacle is not None:
        raise Refusal(f"{where}: {obstacle}. Such donors cannot be converted.")
    _check_is_encoder(where, config, layout)
    check_heads(where, config, family, layout)
    try:
        plain = copy.deepcopy(model_config)
        plain._attn_implementation = "eager"  # a loaded model may have been given one its class does not start with
        with torch.device("meta"):
            model = model_class(plain)
    except Exception as error:  # whatever the native class raises on values it cannot take
        raise Refusal(
            f"{where}: {model_class.__name__} cannot be built from its configuration ({error!r}). Correct it."
        ) from None
    check_is_whole(where, model, family)
    _check_rotation(where, config, layout)
    dropped, as_published = check_tensors(where, model, family, composite, tensors)
    return Donor(
        name=name,
        folder=folder,
        revision=revision,
        config=config,
        model_config=model_config,
        composite=composite,
        raw_config=raw,
        family=family,
        layout=layout if composite is None else composite.layout(layout),
        model_class=model_class,
        tensors=tensors,
        dropped=dropped,
        as_published=as_published,
    )


def _check_rotation(where: str, config: PretrainedConfig, layout: AttentionLayout) -> None:
    """Refuse fields that the native class does not look at, and a conversion would stumble over."""
    for site in attention_sites(layout, config):
        try:
            rotation_of(layout, config, site.head_dim, site.layer_idx)
        except (TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            raise Refusal(
                f"{where}: what its configuration says of rotary positions cannot be read ({error}). Correct the fields "
                f"rope_parameters, partial_rotary_factor, rotary_dim and layer_types, or leave them out."
            ) from None


def _check_is_encoder(where: str, config: PretrainedConfig, layout: AttentionLayout) -> None:
    """Refuse BERT and the like as decoders."""
    if layout.bidirectional and (getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False)):
        raise Refusal(
            f"{where}: is_decoder or add_cross_attention is set, and hf_gqa converts '{config.model_type}' as the encoder "
            f"that it is by default, without a cache and without attention to another model. Use a family of decoders."
        )


def _first_value(mapping) -> str:
    return next(iter(mapping.values()), "nothing") if isinstance(mapping, dict) else repr(mapping)


def _compare_with_own_code(donor: Donor) -> None:
    """Run each model class that the donor ships on a few tokens; refuse unless it computes what the native one does."""
    auto_map = donor.raw_config["auto_map"]
    shipped = [key for key in auto_map if key.startswith("AutoModel")] if isinstance(auto_map, dict) else []
    if not shipped:
        raise Refusal(
            f"{donor.folder}: 'auto_map' names no model class of the donor's own ({_first_value(auto_map)}), so there is "
            f"nothing to compare with. Use --weights-only to convert its tensors as native '{donor.family.model_type}'."
        )
    for auto_name in shipped:
        try:
            difference = _relative_difference(donor, getattr(transformers, auto_name))
        except Exception as error:  # it is anybody's code
            raise Refusal(
                f"{donor.folder}: its own code could not be run and compared ({auto_name}: {error!r}). Repair it, or use "
                f"--weights-only."
            ) from None
        if not difference <= 1e-4:
            raise Refusal(
                f"{donor.folder}: its own code computes other logits than the native {donor.model_class.__name__} "
                f"({auto_name}: largest difference {difference:.3g} of the largest value). It cannot be converted as "
                f"'{donor.family.model_type}'."
            )


@torch.no_grad()
def _relative_difference(donor: Donor, auto_class) -> float:
    """Between the donor's own class and the native one of the same purpose, on sixteen tokens."""
    tokens = torch.arange(16).remainder(donor.config.vocab_size).unsqueeze(0)
    native_class = auto_class._model_mapping[type(donor.config)]
    own = auto_class.from_pretrained(donor.folder, trust_remote_code=True, dtype=torch.float32)
    own_output = own.eval()(tokens)[0]
    native = native_class.from_pretrained(donor.folder, config=donor.model_config, dtype=torch.float32)
    native_output = native.eval()(tokens)[0]
    if own_output.shape != native_output.shape:
        raise ValueError(f"its output has shape {list(own_output.shape)}, the native one {list(native_output.shape)}")
    return ((own_output - native_output).abs().max() / native_output.abs().max()).item()
