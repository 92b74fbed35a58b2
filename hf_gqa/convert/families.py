"""The families we know: one `runtime/modeling_gqa_<model_type>.py` each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import transformers
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..refusal import Refusal
from ..registry import Registry
from ..runtime import planned_model
from ..runtime.attention_layout import AttentionLayout
from .unsupported import reason_against, unknown_flag


FAMILIES = Registry("hf_gqa.runtime", "family", "DONOR_LAYOUT", prefix="modeling_gqa_")
DEFAULT_HEADS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family's donors and our own classes for it.

    Args:
        donor_layout: of native checkpoints.
        bundle_layout: of checkpoints of our own classes.
        config_class, base_class: our own classes.
        head_classes: our own classes with a head, by the name of the Auto class that loads each.
        stored_names: name of a tensor in our own class -> in checkpoints of the native class, where they differ.
        native_key_value_heads: native configuration -> its KV heads.
        native_fields: (configuration, KV heads) -> what a native configuration with as many says, or why none can.
        donor_obstacle: configuration -> why it is no donor, or None.
    """

    donor_layout: AttentionLayout
    bundle_layout: AttentionLayout
    config_class: type[PretrainedConfig]
    base_class: type[PreTrainedModel]
    head_classes: dict[str, type[PreTrainedModel]]
    stored_names: dict[str, str]
    native_key_value_heads: Callable[[PretrainedConfig], int]
    native_fields: Callable[[PretrainedConfig, int], dict | str]
    donor_obstacle: Callable[[PretrainedConfig], str | None]

    @property
    def model_type(self) -> str:
        return self.donor_layout.model_type

    @property
    def native_config_class(self) -> type[PretrainedConfig]:
        return native_config_class(self.model_type)

    def own_name(self, name: str) -> str:
        """What a tensor of a native checkpoint is called in our own class."""
        return next((own for own, stored in self.stored_names.items() if stored == name), name)

    @property
    def default_class(self) -> type[PreTrainedModel]:
        """Of our own classes, that of a donor that does not say which one it is of."""
        return next((self.head_classes[name] for name in DEFAULT_HEADS if name in self.head_classes), self.base_class)

    @property
    def own_classes(self) -> dict[type[PreTrainedModel], type[PreTrainedModel]]:
        """Native class -> our own that takes its place."""
        return {native_class(ours): ours for ours in (self.base_class, *self.head_classes.values())}

    def layout_of(self, model_type: str) -> AttentionLayout:
        return self.donor_layout if model_type == self.model_type else self.bundle_layout


@cache
def load_family(name: str) -> Family:
    """Loads the family's file, and registers its classes with `AutoConfig` and `AutoModel*`."""
    module = FAMILIES.module(name)
    donor_layout = module.DONOR_LAYOUT
    config_class = planned_model.own_class(module, planned_model.PlannedConfig)
    head_classes = planned_model.head_classes(module)
    for auto_class, head_class in head_classes.items():
        if not hasattr(transformers, auto_class):
            raise TypeError(f"{module.__file__}: {head_class.__name__} is named after no Auto class of transformers.")
    family = Family(
        donor_layout=donor_layout,
        bundle_layout=donor_layout.unfused(config_class.model_type),
        config_class=config_class,
        base_class=planned_model.own_class(module, planned_model.PlannedModel),
        head_classes=head_classes,
        stored_names=getattr(module, "STORED_NAMES", {}),
        native_key_value_heads=getattr(module, "native_key_value_heads", partial(_key_value_heads, donor_layout)),
        native_fields=getattr(module, "native_fields", partial(_fields, donor_layout)),
        donor_obstacle=getattr(module, "donor_obstacle", lambda config: None),
    )
    _register(family)
    return family


def _key_value_heads(layout: AttentionLayout, config: PretrainedConfig) -> int:
    return getattr(config, layout.key_value_heads_field or "num_attention_heads")


def _fields(layout: AttentionLayout, config: PretrainedConfig, num_key_value_heads: int) -> dict | str:
    if layout.key_value_heads_field is not None:
        return {layout.key_value_heads_field: num_key_value_heads}
    if num_key_value_heads == config.num_attention_heads:
        return {}
    return f"a native {layout.model_type} has as many KV heads as query heads"


def native_class(ours: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of transformers that one of our own extends."""
    return next(c for c in ours.__mro__ if c.__module__.startswith("transformers."))


def family_of(model_type: str, where: str) -> Family:
    """The family that a configuration's `model_type` belongs to; Refusal, with the known ones, if there is none."""
    name = str(model_type).removeprefix("gqa_")
    known = FAMILIES.names()
    if name not in known:
        raise Refusal(f"{where}: model_type = {model_type!r} {reason_against(name, known)}")
    return load_family(name)


def check_flags(raw_config: dict, config_class: type[PretrainedConfig], where: str) -> None:
    """Raises Refusal for a variant of a family whose attention the native class does not compute."""
    flag = unknown_flag(raw_config, config_class)
    if flag is not None:
        having = [name for name in FAMILIES.names() if unknown_flag({flag: True}, native_config_class(name)) is None]
        nearest = f" Families that have it: {', '.join(having)}." if having else ""
        raise Refusal(
            f"{where}: {flag} = {raw_config[flag]!r} changes attention, and transformers' '{config_class.model_type}' has no "
            f"such field: it would ignore it. Use the class that the donor was trained with.{nearest}"
        )


def native_config_class(model_type: str) -> type[PretrainedConfig]:
    return CONFIG_MAPPING[model_type]


def is_encoder(model_type: str) -> bool:
    """Whether models of this type, native or ours, keep no cache, because every token looks at all others at once."""
    name = str(model_type).removeprefix("gqa_")
    return name in FAMILIES.names() and FAMILIES.get(name).bidirectional


class OwnConfigurations(dict):
    """Model type -> configuration class; a family of ours is loaded, and then registered, when it is asked for.

    Importing the modelling code of every family would take longer than torch and transformers take themselves.
    """

    def __contains__(self, model_type: object) -> bool:
        return super().__contains__(model_type) or _own_family(model_type) is not None

    def __missing__(self, model_type: str) -> type[PretrainedConfig]:
        name = _own_family(model_type)
        if name is None:
            raise KeyError(model_type)
        return load_family(name).config_class


def _own_family(model_type: object) -> str | None:
    name = str(model_type).removeprefix("gqa_")
    return name if str(model_type).startswith("gqa_") and name in FAMILIES.names() else None


def register_families() -> None:
    """Make `AutoConfig` and `AutoModel*` know our own classes, under model types of their own, once one is asked for."""
    CONFIG_MAPPING._extra_content = OwnConfigurations(CONFIG_MAPPING._extra_content)


def _register(family: Family) -> None:
    AutoConfig.register(family.config_class.model_type, family.config_class, exist_ok=True)
    AutoModel.register(family.config_class, family.base_class, exist_ok=True)
    family.config_class.register_for_auto_class()
    family.base_class.register_for_auto_class("AutoModel")
    for auto_class, head_class in family.head_classes.items():
        getattr(transformers, auto_class).register(family.config_class, head_class, exist_ok=True)
        head_class.register_for_auto_class(auto_class)
