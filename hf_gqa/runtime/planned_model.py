"""Mixins that put planned attention into a family's own configuration, base model and head class."""

from .layer_plan import LayerPlan, check_rows, uniform_rows


class PlannedConfig:
    """Mixin before a family's native configuration; the subclass adds the field `layer_plan`.

    Without `layer_plan` every layer owns `num_key_value_heads` KV heads. `num_key_value_heads` is the largest count of
    any row, for the engines that read one number for all layers.
    """

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.layer_plan is None:
            rows = uniform_rows(self.num_hidden_layers, self.num_key_value_heads)
            self.layer_plan = [row.to_dict() for row in rows]
        if getattr(self, "auto_map", None) is None:
            file = type(self).__module__.rpartition(".")[2]
            stem = type(self).__name__.removesuffix("Config")
            self.auto_map = {
                "AutoConfig": f"{file}.{stem}Config",
                "AutoModel": f"{file}.{stem}Model",
                "AutoModelForCausalLM": f"{file}.{stem}ForCausalLM",
            }

    def validate_layer_plan(self):
        rows = tuple(LayerPlan.from_dict(row) for row in self.layer_plan)
        check_rows(rows, self.num_hidden_layers, self.num_attention_heads)
        most = max(row.num_key_value_heads for row in rows)
        if self.num_key_value_heads != most:
            raise ValueError(
                f"num_key_value_heads = {self.num_key_value_heads} is not the largest count in layer_plan, {most}. "
                f"The rows decide: set num_key_value_heads to {most}, or convert the donor again."
            )


class GroupedByDefault:
    """Mixin for our own model classes: attention that keeps few KV heads few, unless another is asked for."""

    default_attention: str

    def get_correct_attn_implementation(self, requested_attention, is_init_check: bool = False) -> str:
        return super().get_correct_attn_implementation(requested_attention or self.default_attention, is_init_check)


class PlannedModel(GroupedByDefault):
    """Mixin before a family's native base model: keeps its blocks, replaces the attention inside each."""

    attention_class: type

    def __init__(self, config):
        super().__init__(config)
        for layer_idx in range(config.num_hidden_layers):
            path = self.attention_class.donor_layout.attention.format(layer_idx=layer_idx)
            block, _, name = path.rpartition(".")
            setattr(self.get_submodule(block), name, self.attention_class(config, layer_idx))
        self.post_init()


class PlannedHead(GroupedByDefault):
    """Mixin before a family's native head class: puts the planned base model below the native head."""

    model_class: type

    def __init__(self, config):
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.model_class(config))
        self.post_init()


class BuiltEagerly:
    """Mixin before `PlannedModel` and `PlannedHead` where native blocks look their attention up by a name, and know few."""

    def __init__(self, config):
        wanted = config._attn_implementation
        config._attn_implementation = "eager"
        super().__init__(config)
        config._attn_implementation = self.get_correct_attn_implementation(wanted)
