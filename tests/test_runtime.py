"""The shipped code: the table of rows, the configuration that carries it, and layers that differ in heads."""

import json

import pytest
import torch
import transformers
from transformers import AutoModel, PreTrainedModel

from hf_gqa import convert
from hf_gqa.convert.families import load_family
from hf_gqa.runtime.layer_plan import LayerPlan, check_rows, uniform_rows

from .conformance import (
    ATTENTIONS,
    assert_close_for_float32,
    assert_same_tensors,
    cached_head_counts,
    every_export,
    every_family,
    every_model,
    every_storage,
    logits_of,
)
from .covering import each_value
from .decoding import assert_cached_equals_uncached, generate, logits_in_chunks, new_cache
from .oracle import assert_same_logits, model_key_value_views, overwrite_groups
from .tiny_donors import (
    ALL_MODEL_TYPES,
    MODEL_TYPES,
    NUM_ATTENTION_HEADS,
    tokens_and_mask,
    use_attention,
)
from .uneven_students import UNEVEN, auto_head, bundle_config, uneven_student


REFUSED_FIRST = {"num_hidden_layers": ("gpt_neo", "smollm3"), "layer_plan": ("gpt_bigcode",)}


def copies_of_heads(student: PreTrainedModel) -> PreTrainedModel:
    """The slow reference: the bundle with as many KV heads as query heads, each a copy of the student's."""
    rows = (NUM_ATTENTION_HEADS,) * student.config.num_hidden_layers
    model_type = student.config.model_type.removeprefix("gqa_")
    reference = auto_head(model_type).from_config(bundle_config(model_type, rows)).eval()
    own, copied = student.state_dict(), reference.state_dict()
    same = {name: own[name] for name, tensor in copied.items() if name in own and own[name].shape == tensor.shape}
    reference.load_state_dict(copied | same)
    views = model_key_value_views(reference)
    for name, head_K in model_key_value_views(student).items():
        copies = len(views[name]) // len(head_K)
        for head, view in enumerate(views[name]):  # tensors, or lists of a norm for each head
            view.copy_(head_K[head // copies])
    return convert(reference, num_key_value_heads=NUM_ATTENTION_HEADS, export="native")


def test_row_round_trip_and_refusals():
    row = LayerPlan(num_key_value_heads=2)
    assert LayerPlan.from_dict(json.loads(json.dumps(row.to_dict()))) == row
    for wrong, got in (
        ({}, "[]"),
        ({"num_key_value_heads": 2, "window": 3}, "['num_key_value_heads', 'window']"),
        ([2], "[2]"),
        (2, "2"),
    ):
        with pytest.raises(ValueError) as refused:
            LayerPlan.from_dict(wrong)
        assert str(refused.value) == (
            f"layer_plan: a row has the key num_key_value_heads and may have key_from, parameters_from, query_from, tied, "
            f"value_from; got {got}. Convert the donor again."
        )


def test_table_with_another_number_of_rows_is_refused():
    with pytest.raises(ValueError) as refused:
        check_rows(uniform_rows(3, 2), num_hidden_layers=2, num_attention_heads=4)
    assert str(refused.value) == "layer_plan: 3 rows for num_hidden_layers = 2. Give one row each."


@pytest.mark.parametrize("heads", [0, -2, 4, 5, 12, True, "2", 2.0, None])
def test_row_whose_heads_do_not_divide_is_refused(heads):
    rows = (LayerPlan(num_key_value_heads=2), LayerPlan(num_key_value_heads=heads))
    with pytest.raises(ValueError) as refused:
        check_rows(rows, num_hidden_layers=2, num_attention_heads=6)
    assert str(refused.value) == (
        f"layer_plan row 1: num_key_value_heads = {heads!r} does not divide num_attention_heads = 6. "
        "Use one of 1, 2, 3, 6."
    )


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_rows_that_divide_are_accepted(heads):
    check_rows(uniform_rows(2, heads), num_hidden_layers=2, num_attention_heads=6)


@every_model
def test_configuration_round_trip_through_json(model_type, tmp_path):
    config = bundle_config(model_type, UNEVEN)
    assert config.layer_plan == [{"num_key_value_heads": 2}, {"num_key_value_heads": 1}]
    again = type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert (on_disk["layer_plan"], on_disk["num_key_value_heads"]) == (config.layer_plan, 2)
    assert type(config).from_pretrained(tmp_path).layer_plan == config.layer_plan


@every_model
def test_configuration_without_rows_is_uniform(model_type):
    values = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    values |= {"num_hidden_groups": 3} if model_type == "albert" else {}
    values |= {"attention_types": [[["global"], 3]]} if model_type == "gpt_neo" else {}
    own_names = load_family(model_type).config_class.attribute_map
    config = load_family(model_type).config_class(**{own_names.get(name, name): v for name, v in values.items()})
    assert config.layer_plan == [{"num_key_value_heads": 2}] * 3


def test_gpt2_configuration_without_kv_heads_has_all_of_them():
    config = load_family("gpt2").config_class(n_layer=2, n_head=4)
    assert (config.num_key_value_heads, config.layer_plan) == (4, [{"num_key_value_heads": 4}] * 2)


@every_model
@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"num_key_value_heads": 4},
            "num_key_value_heads = 4 is not the largest count in layer_plan, 2. The rows decide: set num_key_value_heads "
            "to 2, or convert the donor again.",
        ),
        ({"num_hidden_layers": 3}, "layer_plan: 2 rows for num_hidden_layers = 3. Give one row each."),
        (
            {"layer_plan": [{"num_key_value_heads": 3}, {"num_key_value_heads": 1}]},
            "layer_plan row 0: num_key_value_heads = 3 does not divide num_attention_heads = 4. Use one of 1, 2, 4.",
        ),
        (
            {"layer_plan": [{"heads": 2}, {"heads": 1}]},
            "layer_plan: a row has the key num_key_value_heads and may have key_from, parameters_from, query_from, tied, "
            "value_from; got ['heads']. Convert the donor again.",
        ),
    ],
    ids=["count", "rows", "divide", "keys"],
)
def test_configuration_that_contradicts_its_rows_is_refused(model_type, changes, message):
    if (model_type, *changes) == ("albert", "num_hidden_layers"):
        changes, message = {"num_hidden_groups": 3}, message.replace("num_hidden_layers", "num_hidden_groups")
    if model_type in REFUSED_FIRST.get(next(iter(changes)), ()):
        message = ""  # the native class has something to say before
    values = bundle_config(model_type, UNEVEN).to_dict()
    for field in ("model_type", "layer_types"):
        values.pop(field, None)
    if (model_type, *changes) == ("gpt_bigcode", "num_key_value_heads"):
        pytest.skip("the native class counts its heads itself")
    with pytest.raises(Exception) as refused:  # the validator of transformers wraps ours
        load_family(model_type).config_class(**(values | changes))
    assert message in str(refused.value)


@every_model
def test_new_model_is_initialised_as_its_family_is(model_type):
    """The modules that replace native ones get the family's initialisation, not that of torch."""
    if model_type == "modernbert" and transformers.__version__.startswith("5.4."):
        pytest.skip("transformers 5.4 initialises the projections of ModernBERT by their names")
    config = bundle_config(model_type, UNEVEN, initializer_range=0.5, init_std=0.5)
    for auto_class in (AutoModel, auto_head(model_type)):
        torch.manual_seed(0)
        for (_, part, kind), view in model_key_value_views(auto_class.from_config(config)).items():
            if kind == "bias":
                assert not view.any()
            elif part != "key norm":
                assert view.std().item() == pytest.approx(0.5, rel=0.2)


@every_model
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_model_ties_its_embeddings_if_asked(model_type, tied):
    student = auto_head(model_type).from_config(bundle_config(model_type, UNEVEN, tie_word_embeddings=tied))
    assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) == tied


@each_value(model_type=ALL_MODEL_TYPES, heads=[(2, 1), (1, 4)])
def test_layers_with_different_heads_equal_copied_heads(model_type, heads):
    student = uneven_student(model_type, heads)
    reference = copies_of_heads(student)
    assert cached_head_counts(student) == list(heads)
    real = tokens_and_mask()[1].bool()
    for attention in ATTENTIONS:
        use_attention(student, attention)
        assert_close_for_float32(logits_of(student, padded=True)[real], logits_of(reference, padded=True)[real])


@each_value(model_type=MODEL_TYPES, attention=ATTENTIONS, kind=["dynamic", "static"])
def test_layers_with_different_heads_decode_from_a_cache(model_type, attention, kind):
    student = uneven_student(model_type)
    use_attention(student, attention)
    assert_cached_equals_uncached(student, kind)
    assert torch.equal(
        generate(student, num_beams=3).sequences, generate(student, num_beams=3, use_cache=False).sequences
    )


@every_family
def test_cache_holds_the_heads_of_each_row(model_type):
    student = uneven_student(model_type)
    for kind in ("dynamic", "static"):
        cache = new_cache(kind, student)
        logits_in_chunks(student, cache)
        shapes = [(layer.keys.shape, layer.values.shape) for layer in cache.layers]
        assert all(keys == values for keys, values in shapes)
        head_dim = student.config.hidden_size // NUM_ATTENTION_HEADS
        head_dim = getattr(student.config, "head_dim", None) or head_dim
        assert [(keys[0], keys[1], keys[3]) for keys, _ in shapes] == [(2, heads, head_dim) for heads in UNEVEN]


@every_model
def test_layers_with_different_heads_survive_saving(model_type, tmp_path):
    student = uneven_student(model_type)
    student.save_pretrained(tmp_path)
    again, loading = auto_head(model_type).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert_same_tensors(again.state_dict(), student.state_dict())
    assert torch.equal(logits_of(again), logits_of(student))


@every_storage
@every_export
@pytest.mark.parametrize("heads, wanted", [((2, 1), 1), ((4, 2), 2), ((4, 1), 1)])
def test_layers_with_different_heads_can_be_reduced(model_type, export, heads, wanted):
    donor = uneven_student(model_type, heads)
    student = convert(donor, num_key_value_heads=wanted, export=export)
    assert cached_head_counts(student) == [wanted] * len(heads)
    overwrite_groups(donor, wanted)
    assert_same_logits(student, donor)


@every_storage
@every_export
def test_layers_with_different_heads_can_be_expanded(model_type, export):
    donor = uneven_student(model_type)
    student = convert(donor, num_key_value_heads=NUM_ATTENTION_HEADS, method="expand", export=export)
    assert_same_logits(student, donor)


@every_model
def test_attention_implementation_can_be_switched(model_type):
    student = uneven_student(model_type)
    tokens, mask = tokens_and_mask()
    student_sdpa = "sdpa" if student._supports_sdpa else "grouped_sdpa"
    for attention in ("eager", "sdpa", "eager"):
        use_attention(student, attention)
        assert student.config._attn_implementation == (attention if attention == "eager" else student_sdpa)
        found = student(tokens, attention_mask=mask, output_attentions=attention == "eager")
        if attention == "eager":
            assert len(found.attentions) == student.config.num_hidden_layers
            for weights in found.attentions:
                assert weights.shape == (2, NUM_ATTENTION_HEADS, tokens.shape[1], tokens.shape[1])
                torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.parametrize(
    ("model_type", "attention"), [(name, ATTENTIONS[turn % 2]) for turn, name in enumerate(ALL_MODEL_TYPES)]
)
@pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"
)  # BLOOM's
def test_forward_compiles_without_graph_breaks(model_type, attention):
    student = uneven_student(model_type)
    use_attention(student, attention)
    expected = logits_of(student, padded=True, use_cache=False)
    torch.compiler.reset()
    compiled = torch.compile(student, fullgraph=True, backend="eager")
    assert_close_for_float32(logits_of(compiled, padded=True, use_cache=False), expected)
