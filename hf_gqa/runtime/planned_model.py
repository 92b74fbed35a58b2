"""Mixins that put planned attention into a family's own configuration, base model and head class."""

import sys
from collections import UserDict

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel

from .layer_plan import check_rows, read_rows, uniform_rows
from .native_call import guard_cache, tested_with, warn_if_untested


REENTRANT = (
    "checkpointing: use_reentrant = True computes blocks without gradients first, so that what layers borrow from each "
    "other would get none, silently. Use {'use_reentrant': False}."
)


class SharedStates(UserDict):
    """Name and layer, such as "key.3", -> tensor; opened afresh by every forward of the base model.

    It is passed to the blocks as a keyword, so that it is there without a cache, under checkpointing (whose second
    computation of a block finds what the first one found) and when blocks are wrapped for FSDP, which takes apart every
    dict but leaves a UserDict as it is.
    """

    def __init__(self):
        super().__init__()
        self.grad_enabled = torch.is_grad_enabled()

    def lend(self, name: str, layer_idx: int, tensor: torch.Tensor) -> None:
        if self.grad_enabled != torch.is_grad_enabled():
            raise ValueError(REENTRANT)
        self[f"{name}.{layer_idx}"] = tensor

    def borrow(self, name: str, layer_idx: int) -> torch.Tensor:
        return self[f"{name}.{layer_idx}"]

    def to(self, device, non_blocking: bool = False) -> "SharedStates":
        """In place: what is on the device of the next layers need not move again. Called by accelerate."""
        for name in list(self):
            self[name] = self[name].to(device, non_blocking=non_blocking)
        return self


def check_checkpointing(function) -> None:
    """Raise ValueError for a checkpointing function, as transformers makes it, that is reentrant."""
    if getattr(function, "keywords", {}).get("use_reentrant"):
        raise ValueError(REENTRANT)


class PlannedConfig:
    """Mixin before a family's native configuration; the subclass adds the field `layer_plan`.

    Without `layer_plan` every layer owns `num_key_value_heads` KV heads. `num_key_value_heads` is the largest count of
    any row, for the engines that read one number for all layers.
    """

    rows_field = "num_hidden_layers"  # which says how many attentions there are

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.hf_gqa = tested_with()  # of the code that runs, which is what saving the model ships
        warn_if_untested()
        self.fill_plan()
        if getattr(self, "auto_map", None) is None:
            module = sys.modules[type(self).__module__]
            classes = {"AutoConfig": type(self), "AutoModel": own_class(module, PlannedModel), **head_classes(module)}
            file = module.__name__.rpartition(".")[2]
            self.auto_map = {auto_class: f"{file}.{ours.__name__}" for auto_class, ours in classes.items()}

    def fill_plan(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.layer_plan is None:
            rows = uniform_rows(getattr(self, self.rows_field), self.num_key_value_heads)
            self.layer_plan = [row.to_dict() for row in rows]

    def validate_layer_plan(self):
        rows = read_rows(self)
        types = getattr(self, "layer_types", None)
        check_rows(rows, getattr(self, self.rows_field), self.num_attention_heads, types, self.rows_field)
        most = max(row.num_key_value_heads for row in rows)
        if self.num_key_value_heads != most:
            raise ValueError(
                f"num_key_value_heads = {self.num_key_value_heads} is not the largest count in layer_plan, {most}. "
                f"The rows decide: set num_key_value_heads to {most}, or convert the donor again."
            )

    @property
    def kv_sharing_modes(self) -> list[str | None] | None:
        """What transformers' caches ask: "reuse" for a layer that caches nothing."""
        if self.layer_plan is None:
            return None
        rows = read_rows(self)
        modes = ["reuse" if row.key_from is not None and row.value_from is not None else None for row in rows]
        return modes if any(modes) else None


class GroupedByDefault:
    """Mixin for our own model classes: attention that keeps few KV heads few, unless another is asked for."""

    default_attention: str

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # not what transformers found, and keeps on the class, for a native class that we extend

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """As the native class: transformers looks into the file of a class, and ours does not repeat its experts."""
        native = next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))
        return native._can_set_experts_implementation()

    def get_correct_attn_implementation(self, requested_attention, is_init_check: bool = False) -> str:
        if requested_attention in (None, self.default_attention):  # also where the native class has no sdpa
            return self.default_attention
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    def _get_static_cache_init_shape(self) -> None:
        """Layers of a static cache take their shapes from the first keys they get: one number need not fit them all."""
        return None

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs):
        if enable and any(row.borrows_states for row in read_rows(self.config)):
            check_checkpointing(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def _adjust_bias(self, output_embeddings, input_embeddings):
        """Of the head only: in tied layers it would take a Conv1D's weight for an embedding, and pad the bias to it."""
        if output_embeddings is self.get_output_embeddings():
            super()._adjust_bias(output_embeddings, input_embeddings)


class PlannedModel(GroupedByDefault):
    """Mixin before a family's native base model: keeps its blocks, replaces the attention inside each."""

    attention_class: type

    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.lends, self.tied_layers = False, {}
        self.plan_attention(config)
        self.post_init()

    def plan_attention(self, config) -> None:
        planned, layout, rows = [], self.attention_class.donor_layout, read_rows(config)
        for layer_idx, row in enumerate(rows):
            block, _, name = layout.mixing_module(layer_idx).rpartition(".")
            planned.append(self.attention_class(config, layer_idx))
            if row.query_from is not None:  # GPT-2 may scale scores by the depth of the layer that computes them
                planned[layer_idx].scaling = planned[row.query_from].scaling
            setattr(self.get_submodule(block), name, planned[layer_idx])
        self.lends = any(attention.lends for attention in planned)
        if self.lends:  # a hook, so that the native forward keeps its signature, which others read
            self.register_forward_pre_hook(_open_shared_states, with_kwargs=True)
        self.tied_layers = self._tied_layers(rows)
        self._tied_weights_keys = (self._tied_weights_keys or {}) | self.tied_layers  # what saving leaves out
        if not layout.bidirectional:
            caching = [i for i, row in enumerate(rows) if row.key_from is None or row.value_from is None]
            heads = {layer_idx: rows[layer_idx].num_key_value_heads for layer_idx in caching}
            guard_cache(self.get_submodule(layout.stack), heads)

    def _tied_layers(self, rows) -> dict[str, str]:
        """Name of each parameter that is another layer's -> name of that."""
        layout, tied = self.attention_class.donor_layout, {}
        before, _, attention = layout.attention.partition("{layer_idx}.")
        attention += f".{layout.inner}" if layout.inner else ""
        for layer_idx, row in enumerate(rows):
            if row.parameters_from is not None:
                lender = f"{before}{row.parameters_from}"
                lent = dict(self.get_submodule(lender).named_parameters())  # ModernBERT's first layer lacks a norm
                names = tied_names(self.get_submodule(f"{before}{layer_idx}"), attention, row.tied)
                tied |= {f"{before}{layer_idx}.{name}": f"{lender}.{name}" for name in names if name in lent}
        return tied

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Tied layers are tied whatever `tie_word_embeddings` says."""
        return super().get_expanded_tied_weights_keys(all_submodels) | getattr(self, "tied_layers", {})


class PlannedHead(GroupedByDefault):
    """Mixin before a family's native head class: puts the planned base model below the native head.

    A family has as many of these as it likes. What follows `For` in the name of a class says which Auto class loads it:
    `AutoModelForMaskedLM` loads `GQABertForMaskedLM`.
    """

    model_class: type

    def __init__(self, config):
        AutoModel.register(type(config), self.model_class, exist_ok=True)  # which the heads of most decoders ask
        asked = config._attn_implementation
        config._attn_implementation = "eager"  # a native model, which is replaced at once, may refuse what ours takes
        super().__init__(config)
        config._attn_implementation = asked
        native = getattr(self, self.base_model_prefix)
        left_out = {"add_pooling_layer": False} if getattr(native, "pooler", native) is None else {}
        setattr(self, self.base_model_prefix, self.model_class(config, **left_out))
        self.post_init()


class BuiltEagerly:
    """Mixin before `PlannedModel` and `PlannedHead` where the native class knows few attention implementations by name."""

    def __init__(self, config):
        wanted = config._attn_implementation
        config._attn_implementation = "eager"
        super().__init__(config)
        config._attn_implementation = self.get_correct_attn_implementation(wanted)


def _open_shared_states(model: PlannedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, kwargs | {"shared_states": SharedStates()}


def own_class(module, mixin: type) -> type:
    """The one class of a family's file that has this mixin; TypeError if there is none, or are several."""
    own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    found = [c for c in own if issubclass(c, mixin)]
    if len(found) != 1:
        raise TypeError(f"{module.__file__}: a family defines one subclass of {mixin.__name__}, got {len(found)}.")
    return found[0]


def head_classes(module) -> dict[str, type]:
    """The head classes of a family's file by the name of the Auto class that loads each."""
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, PlannedHead)]
    heads = [c for c in classes if issubclass(c, PreTrainedModel)]
    return {f"AutoModelFor{c.__name__.rpartition('For')[2]}": c for c in heads}


def tied_names(block: nn.Module, attention: str, tied: str) -> list[str]:
    """Names of a block's parameters that belong to what is tied.

    Args:
        attention: path of the attention module below the block.
        tied: "attention" (its norms over head_dim included), "feed_forward" (all else but norms) or "all".
    """
    found = []
    for path, module in block.named_modules():
        inside = path == attention or path.startswith(f"{attention}.")
        is_norm = "Norm" in type(module).__name__ and not inside
        in_attention = path.split(".")[0] == attention.split(".")[0]
        part = "norm" if is_norm else "attention" if in_attention else "feed_forward"
        if tied in ("all", part):
            found += [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
    return found
