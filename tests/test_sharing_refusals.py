"""Tables and plans that no model can follow are refused, with the row, the value and what is allowed."""

import json

import pytest
import yaml

from hf_gqa import Refusal, convert
from hf_gqa.convert.families import load_family
from hf_gqa.convert.plan import ConversionPlan
from hf_gqa.runtime.layer_plan import LayerPlan, check_rows
from hf_gqa.sharing import SHARINGS, every, nearest_owners

from .command_line import assert_one_message, run_cli
from .donor_folders import write_donor
from .sharing_students import PLANS, deep_donor


TYPES = ["sliding_attention", "full_attention"] * 2


def table(*rows: dict) -> tuple[LayerPlan, ...]:
    return tuple(LayerPlan.from_dict({"num_key_value_heads": 2, **row}) for row in rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"key_from": 0, "value_from": 0}, {}, {}, {}],
            "layer_plan row 0: key_from = 0: the first layer has no earlier one to borrow from. Let it own what it uses.",
        ),
        (
            [{}, {"key_from": 2, "value_from": 2}, {}, {}],
            "layer_plan row 1: key_from = 2 is no earlier layer. Use one of 0 to 0, or leave it out.",
        ),
        (
            [{}, {}, {"value_from": -1}, {}],
            "layer_plan row 2: value_from = -1 is no earlier layer. Use one of 0 to 1, or leave it out.",
        ),
        (
            [{}, {}, {"key_from": "1"}, {}],
            "layer_plan row 2: key_from = '1' is no earlier layer. Use one of 0 to 1, or leave it out.",
        ),
        (
            [{}, {}, {}, {"parameters_from": True, "tied": "all"}],
            "layer_plan row 3: parameters_from = True is no earlier layer. Use one of 0 to 2, or leave it out.",
        ),
        (
            [{}, {}, {"key_from": 1, "value_from": 1}, {}],
            "layer_plan row 2: key_from = 1: layer 1 is full_attention, layer 2 is sliding_attention. Use one of 0.",
        ),
        (
            [{}, {"query_from": 0, "key_from": 0}, {}, {}],
            "layer_plan row 1: query_from = 0: layer 0 is sliding_attention, layer 1 is full_attention. Use its own: no "
            "earlier layer of its type owns them.",
        ),
        (
            [{}, {}, {"num_key_value_heads": 1, "value_from": 0}, {}],
            "layer_plan row 2: value_from = 0: layer 0 has num_key_value_heads = 2, layer 2 has 1. Give both the same.",
        ),
        (
            [{}, {}, {"query_from": 0, "key_from": 0, "value_from": 0}, {}],
            "layer_plan row 2: query_from, key_from and value_from are all borrowed, so that nothing reads what enters the "
            "layer's attention. Let it own its values.",
        ),
        (
            [{}, {}, {"query_from": 0}, {}],
            "layer_plan row 2: query_from = 0 with key_from = None: borrowed queries fit the keys of their own layer only. "
            "Set key_from to 0.",
        ),
        (
            [{}, {}, {"tied": "all"}, {}],
            "layer_plan row 2: tied = 'all' without parameters_from. Say of which layer, or leave it out.",
        ),
        (
            [{}, {}, {"parameters_from": 0, "tied": "norms"}, {}],
            "layer_plan row 2: tied = 'norms' is unknown. Use one of attention, feed_forward, all.",
        ),
        (
            [{}, {}, {"key_from": 0, "value_from": 0}, {"parameters_from": 2, "tied": "attention"}],
            "layer_plan row 3: parameters_from = 2: layer 2 borrows by key_from, so it has no weights for what layer 3 "
            "computes. Let both borrow, or neither.",
        ),
    ],
)
def test_table_is_refused(rows, message):
    with pytest.raises(ValueError) as refused:
        check_rows(table(*rows), 4, 4, TYPES)
    assert str(refused.value) == message
    with pytest.raises(Refusal) as refused:
        convert(
            deep_donor("gemma3_text", num_hidden_layers=4, layer_types=TYPES),
            layer_plan=[row.to_dict() for row in table(*rows)],
        )
    assert str(refused.value) == message


def test_borrowing_from_a_borrower_is_refused():
    rows = table({}, {"key_from": 0, "value_from": 0}, {"key_from": 1, "value_from": 1})
    with pytest.raises(ValueError, match=r"row 2: key_from = 1: layer 1 itself borrows, from layer 0\. Use 0\."):
        check_rows(rows, 3, 4)


def test_configuration_with_such_a_table_is_refused():
    rows = [{"num_key_value_heads": 4}, {"num_key_value_heads": 4, "key_from": 3}]
    with pytest.raises(Exception, match=r"layer_plan row 1: key_from = 3 is no earlier layer"):
        load_family("llama").config_class(
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, layer_plan=rows
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sharing": "echoes"}, "sharing pattern 'echoes' is unknown. Did you mean 'echo'? Known: "),
        (
            {"sharing": "echo"},
            "sharing = echo: nothing says which layers borrow. Give one of shared_layers (such as 2,3)",
        ),
        (
            {"sharing": "echo", "shared_layers": [1], "share_every": 2},
            "sharing = echo: shared_layers and share_every says which layers borrow. Give one of",
        ),
        (
            {"num_key_value_heads": 2, "shared_layers": [1]},
            "shared_layers: sharing = own shares nothing. Use sharing = one of ",
        ),
        ({"sharing": "echo", "shared_layers": []}, "shared_layers = () is no list of layers. Give their numbers"),
        ({"sharing": "echo", "shared_layers": ["2"]}, "shared_layers = ('2',) is no list of layers."),
        ({"sharing": "echo", "share_every": 1}, "share_every = 1 is not a whole number from 2. Use 2 or more."),
        (
            {"sharing": "echo", "share_every": 2, "shared_init": "median"},
            "shared_init = 'median' is unknown. Use one of own, mean, fit.",
        ),
        (
            {"layer_plan": [{"num_key_value_heads": 4}], "sharing": "echo", "share_every": 2},
            "layer_plan: its rows say all that share_every, sharing would. Give either.",
        ),
        ({"layer_plan": [{"heads": 4}]}, "layer_plan: a row has the key num_key_value_heads and may have "),
    ],
)
def test_plan_is_refused(fields, message):
    with pytest.raises(Refusal) as refused:
        ConversionPlan(**fields)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shared_layers": [6]}, "shared_layers: there is no layer 6. Use some of 1 to 5."),
        (
            {"shared_layers": [0]},
            "shared_layers: layer 0 (attention) has no earlier layer of its type to borrow from; it is the first. Leave layer "
            "0 out.",
        ),
        (
            {"share_every": 2, "shared_init": "mean", "sharing": "echo"},
            "shared_init = mean: is about weights, and about keys and values for other queries, that a layer lends, and "
            "there are none. Use shared_init = own.",
        ),
        (
            {"share_every": 2, "num_key_value_heads": 2, "method": "align,mean_pool"},
            "method = align,mean_pool: changes queries or output projections to fit new KV heads, layer by layer, and "
            "layer 0 shares with others. Use a method that leaves them alone, such as mean_pool or first.",
        ),
        (
            {"share_every": 2, "num_key_value_heads": 2, "method": "mean_pool,refit"},
            "method = mean_pool,refit: 'refit' fits one layer after the other, and here layers share. Leave it out.",
        ),
        (
            {"share_every": 2, "export": "native"},
            "export = native: in a native llama every layer owns its queries, keys, values and weights. Use --export auto "
            "or bundle.",
        ),
    ],
)
def test_plan_that_the_donor_cannot_follow_is_refused(fields, message):
    with pytest.raises(Refusal) as refused:
        convert(deep_donor("llama"), **{"sharing": "cross_layer_kv"} | fields)
    assert str(refused.value) == message


def test_nearest_owner_is_of_the_same_type():
    assert nearest_owners([2, 3], TYPES) == (0, 1, 0, 1)
    assert nearest_owners([2, 3], ["attention"] * 4) == (0, 1, 1, 1)
    with pytest.raises(
        Refusal, match=r"layer 1 \(full_attention\) has no earlier layer of its type to borrow from; it is"
    ):
        nearest_owners([1], TYPES)
    with pytest.raises(Refusal, match=r"layer 0 \(attention\) .* Leave layer 0 out\."):
        nearest_owners([0], ["attention"] * 4)


def test_share_every_counts_layers_of_a_type():
    assert every(2, ["attention"] * 5) == (1, 3)
    assert every(2, TYPES) == (2, 3)
    assert every(3, ["attention"] * 6) == (1, 2, 4, 5)


@pytest.mark.parametrize("name", [name for name in SHARINGS.names() if name != "own"])
def test_every_pattern_makes_a_table_that_holds(name):
    lenders = nearest_owners([2, 3, 5], TYPES * 2)
    rows = SHARINGS.get(name)(lenders, (2,) * 8)
    check_rows(rows, 8, 4, TYPES * 2)
    assert [layer_idx for layer_idx, row in enumerate(rows) if row.borrows] == [2, 3, 5]


@pytest.mark.parametrize("fields", PLANS.values(), ids=PLANS)
def test_plan_survives_json(fields):
    plan = ConversionPlan.from_dict(fields)
    assert ConversionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert ConversionPlan.from_dict(yaml.safe_load(yaml.safe_dump(plan.to_dict()))) == plan


def test_plans_of_before_read_and_write_as_they_did():
    assert ConversionPlan(num_key_value_heads=2).to_dict() == {
        "num_key_value_heads": 2,
        "method": ["mean_pool"],
        "sharing": "own",
        "export": "auto",
        "seed": 0,
    }
    assert LayerPlan(num_key_value_heads=2).to_dict() == {"num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["nothing says what to convert to", "--num-key-value-heads, --sharing or --plan"]),
        (["--sharing", "echo", "--shared-layers", "1,x"], ["--shared-layers 1,x: 'x' is no layer", "2,3 or 12-21"]),
        (["--sharing", "echo", "--shared-layers", "3-1"], ["--shared-layers 3-1: '3-1' is no layer"]),
        (["--plan", "absent.yaml"], ["absent.yaml: not a readable YAML file (No such file", "Give a plan in YAML."]),
        (["--plan", "PLAN", "--sharing", "echo"], ["--sharing is part of the plan"]),
        (["--plan", "BAD"], ["plan: unknown key 'share'"]),
        (["--plan", "BROKEN"], ["not a readable YAML file ("]),
    ],
)
def test_command_is_refused(options, words, tmp_path):
    files = {"PLAN": "{sharing: echo, share_every: 2}", "BAD": "{share: 2}", "BROKEN": "{"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    options = [tmp_path / option if option in files else option for option in options]
    result = run_cli("convert", write_donor(tmp_path / "donor"), tmp_path / "student", *options)
    assert_one_message(result, 2, *words)


def test_commands_share(tmp_path):
    """By options, and by a file that says the same, to the same student; verified in a process without hf_gqa."""
    donor = tmp_path / "donor"
    deep_donor("llama").save_pretrained(donor)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"sharing": "echo", "shared_layers": [2, 3, 4]}))
    options = ["--sharing", "echo", "--shared-layers", "2-4"]
    result = run_cli("convert", donor, tmp_path / "one", *options)
    assert result.exit_code == 0, result.output
    assert "Layers 2, 3, 4 of 0 to 5 reuse the attention matrix of an earlier layer" in result.output
    result = run_cli("convert", donor, tmp_path / "two", "--plan", tmp_path / "plan.yaml")
    assert result.exit_code == 0, result.output
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    result = run_cli("verify", tmp_path / "one", "--donor", donor)
    assert result.exit_code == 0, result.output


def test_family_whose_blocks_hand_nothing_on_shares_weights_only():
    with pytest.raises(
        Refusal,
        match=r"layers of a stablelm cannot lend each other queries, .* Tie weights instead \(albert, albert_attention\)\.",
    ):
        convert(deep_donor("stablelm"), sharing="echo", share_every=2)
