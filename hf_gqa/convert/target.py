"""Which class the student becomes: the donor's own, a native relative, or a bundle, and why."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from ..methods import METHODS
from ..refusal import Refusal
from ..runtime.attention_layout import AttentionLayout
from ..runtime.layer_plan import LayerPlan, check_rows
from .donor import Donor
from .families import family_of, native_class
from .plan import ConversionPlan, check_plan
from .relatives import RELATIVES, Relative
from .rows_with_encoder import checked_rows_with_encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The student before it has weights.

    Args:
        export: "native" or "bundle".
        reason: why this export, in one sentence.
        rows: one row for each attention of the donor: without an encoder, per layer.
        same_class: whether the student's class and tensor names are the donor's.
        changed_fields: of the donor's configuration, where the class is the donor's.
        passed_through: (name, tensor) -> tensor, for tensors outside attention.
    """

    export: str
    reason: str
    config: PretrainedConfig
    model_class: type[PreTrainedModel]
    layout: AttentionLayout
    rows: tuple[LayerPlan, ...]
    same_class: bool
    changed_fields: dict = field(default_factory=dict)
    passed_through: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, tensor: tensor


def choose_target(donor: Donor, plan: ConversionPlan) -> Target:
    """Decide the student's class.

    Raises:
        Refusal: the plan does not fit the donor's heads or norms, or its `export` cannot be had.
    """
    rows = _checked_rows(donor, plan)
    _check_scores(donor, plan, rows)
    native, obstacle = _native(donor, rows)
    if plan.export == "native" and native is None:
        raise Refusal(f"export = native: {obstacle}. Use --export auto or bundle.")
    if native is not None and plan.export != "bundle":
        return native
    reason = "asked for with export = bundle" if native is not None else obstacle
    return _bundle(donor, rows, reason)


def _checked_rows(donor: Donor, plan: ConversionPlan) -> tuple[LayerPlan, ...]:
    """The plan's table, when it fits the donor's heads and layers."""
    if donor.layout.cross_attention is not None:
        return checked_rows_with_encoder(donor, plan)
    sharing = [n for n, row in enumerate(getattr(donor.config, "layer_plan", None) or []) if len(row) > 1]
    if sharing:
        raise Refusal(
            f"'{donor.name}': its layer {sharing[0]} borrows from another, and a student cannot be converted further. "
            f"Convert its donor, with a plan that says all of it."
        )
    if plan.convert_encoder:
        raise Refusal(
            f"convert_encoder: donor '{donor.name}' has no encoder beside a decoder. Leave --convert-encoder out."
        )
    _check_ties(donor, plan)
    types = getattr(donor.config, "layer_types", None) or ["attention"] * len(donor.sites)
    rows = plan.rows(donor.num_key_value_heads, types)
    pairs = zip(donor.num_key_value_heads, (row.num_key_value_heads for row in rows), strict=False)
    for heads, wanted in dict.fromkeys(pairs):
        check_plan(plan, donor.num_attention_heads, heads, donor.name, wanted)
    try:
        check_rows(rows, len(donor.sites), donor.num_attention_heads, types, donor.layout.num_layers_field)
    except ValueError as error:
        raise Refusal(str(error)) from None
    _check_shared_init(plan, rows)
    if not donor.layout.passes_keywords and any(row.borrows_states for row in rows):
        raise Refusal(
            f"sharing = {plan.sharing}: layers of a {donor.layout.model_type} cannot lend each other queries, keys or values, "
            f"for its blocks hand nothing on to attention. Tie weights instead (albert, albert_attention)."
        )
    if donor.as_published and any(row.parameters_from is not None and row.tied != "attention" for row in rows):
        raise Refusal(
            f"sharing = {plan.sharing}: ties feed-forwards, and '{donor.name}' stores its experts one by one, under names that "
            f"its class does not have. Use albert_attention, or convert the loaded model (hf_gqa.convert)."
        )
    _check_observing(donor, plan, rows)
    return rows


def _check_ties(donor: Donor, plan: ConversionPlan) -> None:
    """Refuse to let layers share that share already."""
    borrows = any(len(row) > 1 for row in plan.layer_plan or ())
    if donor.layout.ties_layers and (plan.sharing != "own" or borrows):
        raise Refusal(
            f"sharing = {plan.sharing}: the {donor.config.num_hidden_layers} layers of '{donor.name}' compute with the weights of "
            f"{len(donor.sites)} already, so there is nothing left to share. Give num_key_value_heads alone."
        )


def _check_observing(donor: Donor, plan: ConversionPlan, rows: tuple[LayerPlan, ...]) -> None:
    observing = [name for name in plan.method if getattr(METHODS.get(name), "observes", False)]
    if observing and (donor.layout.ties_layers or any(row.borrows for row in rows)):
        raise Refusal(
            f"method = {','.join(plan.method)}: '{observing[0]}' fits one layer after the other, and here layers share. "
            f"Leave it out."
        )


def _check_shared_init(plan: ConversionPlan, rows: tuple[LayerPlan, ...]) -> None:
    tied = [layer_idx for layer_idx, row in enumerate(rows) if row.parameters_from is not None]
    if plan.shared_init == "fit" and tied:
        raise Refusal(
            f"shared_init = fit: layer {tied[0]} computes with the weights of another, which cannot fit one layer more than the "
            f"other. Use shared_init = own or mean."
        )
    if plan.shared_init == "fit" and not any(row.borrows_states for row in rows):
        raise Refusal("shared_init = fit: fits layers to what they borrow, and none borrows. Use shared_init = own.")
    lent = any(
        row.parameters_from is not None or (row.query_from is None and (row.key_from, row.value_from) != (None, None))
        for row in rows
    )
    if plan.shared_init == "mean" and not lent:
        raise Refusal(
            "shared_init = mean: is about weights, and about keys and values for other queries, that a layer "
            "lends, and there are none. Use shared_init = own."
        )


def _check_scores(donor: Donor, plan: ConversionPlan, rows: tuple[LayerPlan, ...]) -> None:
    """Refuse methods that a norm between projection and score defeats, or scores that nobody else can compute."""
    if donor.num_key_value_heads == [row.num_key_value_heads for row in rows]:
        return
    for name in plan.method:
        if getattr(METHODS.get(name), "moves_heads", False) and donor.has_head_positions:
            raise Refusal(
                f"method = {','.join(plan.method)}: '{name}' moves heads, and each query head of '{donor.name}' has positions of "
                f"its own ({donor.layout.position}). Leave it out."
            )
        if getattr(METHODS.get(name), "computes_scores", False) and not donor.layout.plain_scores:
            raise Refusal(
                f"method = {','.join(plan.method)}: '{name}' computes scores, to which a {donor.layout.model_type} adds what "
                f"its attention alone knows. Leave it out."
            )
    if not donor.has_head_norms:
        return
    defeated = [name for name in METHODS.names() if getattr(METHODS.get(name), "needs_linear_scores", False)]
    for name in plan.method:
        if name in defeated:
            raise Refusal(
                f"method = {','.join(plan.method)}: '{name}' passes maps through queries and keys, which a "
                f"{donor.layout.model_type} norms after their projections. Use others: "
                f"{', '.join(other for other in METHODS.names() if other not in defeated)}."
            )


def _native(donor: Donor, rows: tuple[LayerPlan, ...]) -> tuple[Target | None, str]:
    """The native student, or None and the reason."""
    layout = donor.family.donor_layout
    full = [row.num_key_value_heads for row in rows] == [site.num_attention_heads for site in donor.sites]
    if layout.cross_attention is not None and not full:
        return None, f"a native {layout.model_type} has as many KV heads as query heads"
    if any(row != LayerPlan(num_key_value_heads=row.num_key_value_heads) for row in rows):
        return None, f"in a native {layout.model_type} every layer owns its queries, keys, values and weights"
    if layout.cross_attention is None and any(row != rows[0] for row in rows):
        return None, f"a native {layout.model_type} has one number of KV heads for all layers"
    is_whole = layout.cross_attention is not None  # with all its heads, by now
    fields = {} if is_whole else donor.family.native_fields(donor.config, rows[0].num_key_value_heads)
    if not isinstance(fields, str):
        return _of_the_family(donor, rows, fields), ""
    obstacles = [fields]
    if layout.model_type in RELATIVES.names():
        target, obstacle = _of_a_relative(donor, rows, RELATIVES.get(layout.model_type))
        if target is not None:
            return target, ""
        obstacles.append(obstacle)
    return None, "; ".join(obstacles)


def _of_the_family(donor: Donor, rows: tuple[LayerPlan, ...], fields: dict) -> Target:
    layout = donor.family.donor_layout
    same_class = donor.config.model_type == layout.model_type
    config = copy.deepcopy(donor.model_config) if same_class else _plain(donor.config, donor.family.native_config_class)
    language = config if donor.composite is None else config.get_text_config()
    for name, value in fields.items():
        setattr(language, name, value)
    return Target(
        export="native",
        reason=_why_native(donor, rows[0].num_key_value_heads),
        config=config,
        model_class=donor.model_class if same_class else native_class(donor.model_class),
        layout=donor.layout if same_class else layout,
        rows=rows,
        same_class=same_class,
        changed_fields=fields,
    )


def _why_native(donor: Donor, num_key_value_heads: int) -> str:
    if donor.family.donor_layout.key_value_heads_field is not None:
        return f"{donor.family.model_type} has a number of KV heads of its own"
    if num_key_value_heads == donor.num_attention_heads:
        return "every query head has a KV head of its own"
    if num_key_value_heads == 1:
        return f"{donor.family.model_type} has a setting for one KV head"
    return "the number of KV heads is the donor's"


def _of_a_relative(donor: Donor, rows: tuple[LayerPlan, ...], relative: Relative) -> tuple[Target | None, str | None]:
    model_type, layout = relative.model_type, family_of(relative.model_type, donor.name).donor_layout
    obstacle = relative.obstacle(donor.config, rows)
    class_name = relative.class_names.get(donor.model_class.__name__)
    if obstacle is None and class_name is None:
        obstacle = f"{model_type}, its native relative, has no class for {donor.model_class.__name__}"
    if obstacle is not None:
        return None, obstacle
    target = Target(
        export="native",
        reason=f"{donor.family.model_type} with one KV head computes what {model_type} computes",
        config=relative.config(donor.config),
        model_class=getattr(transformers, class_name),
        layout=layout,
        rows=rows,
        same_class=False,
        passed_through=relative.passed_through,
    )
    return target, None


def _bundle(donor: Donor, rows: tuple[LayerPlan, ...], reason: str) -> Target:
    family = donor.family
    own_class = family.own_classes | {ours: ours for ours in family.own_classes.values()}
    if donor.model_class not in own_class:
        allowed = ", ".join(sorted(native.__name__ for native in family.own_classes))
        raise Refusal(
            f"export: {donor.model_class.__name__} cannot become a bundle, and not a native student either "
            f"({reason}). Use a donor of class {allowed}."
        )
    if getattr(donor.config, "add_cross_attention", False):
        raise Refusal("export: a bundle has no cross-attention (add_cross_attention is set). Use a decoder-only donor.")
    planned = {"layer_plan": [row.to_dict() for row in rows]}
    if family.donor_layout.cross_attention is None:
        planned["num_key_value_heads"] = max(row.num_key_value_heads for row in rows)
    config = _plain(donor.config, family.config_class, **planned)
    return Target(
        export="bundle",
        reason=reason,
        config=config,
        model_class=own_class[donor.model_class],
        layout=family.bundle_layout,
        rows=rows,
        same_class=False,
    )


def _plain(config: PretrainedConfig, config_class: type[PretrainedConfig], **changes) -> PretrainedConfig:
    """The same settings under another configuration class."""
    ours = {"model_type", "architectures", "transformers_version", "auto_map", "layer_plan", "num_key_value_heads"}
    copied = config_class(**{key: value for key, value in config.to_dict().items() if key not in ours}, **changes)
    before, after = config.to_dict(), copied.to_dict()
    for name in before.keys() & after.keys() - ours:
        if before[name] != after[name]:
            raise Refusal(
                f"config: {name} = {before[name]!r} becomes {after[name]!r} when transformers "
                f"{transformers.__version__} copies it. Use a newer transformers."
            )
    return copied
