"""Recommendations: every number against one worked out by hand, and what is chosen against what was asked for."""

import json
from dataclasses import replace

import pytest

from hf_gqa import convert_checkpoint, open_donor
from hf_gqa.refusal import Refusal
from hf_gqa.workflow.recommend import recommend
from hf_gqa.workflow.serving import Wanted
from hf_gqa.workflow.sweep_table import FORMAT, SweepRow, SweepTable, donor_hash

from .command_line import run_cli
from .sweep_rows import row


DONOR = "examples/donor"  # 6 layers, 8 heads of 32, hidden size 256, vocabulary 2048, tied, bfloat16
LAYERS, HEAD_DIM, WIDTH, BYTES = 6, 32, 256, 2


@pytest.fixture(scope="module")
def donor():
    return open_donor(DONOR)


def wanted(**changes) -> Wanted:
    return Wanted(**({"context_tokens": 512, "batch_size": 4, "memory_bytes": 10**9} | changes))


def sweep_of(donor, *rows: SweepRow) -> SweepTable:
    values = dict.fromkeys(SweepTable.__dataclass_fields__, 0) | {
        "format": FORMAT,
        "donor": "d",
        "dtype": "",
        "device": "",
    }
    return SweepTable(
        **values | {"donor_identity": donor_hash(donor), "donor_loss_nats_per_token": 3.0, "rows": tuple(rows)}
    )


def test_numbers_are_those_worked_out_by_hand(donor):
    found = recommend(donor, wanted(decode_speedup=1.2))
    assert [option.num_key_value_heads for option in found.options] == [8, 4, 2, 1]
    weights = (donor.folder / "model.safetensors").stat().st_size
    for option in found.options:
        removed = LAYERS * 2 * (8 - option.num_key_value_heads) * HEAD_DIM * WIDTH * BYTES
        assert weights - removed - 20_000 < option.weight_bytes < weights - removed
        assert option.cache_bytes == 4 * 512 * LAYERS * 2 * option.num_key_value_heads * HEAD_DIM * BYTES
        assert option.step_bytes == option.weight_bytes + option.cache_bytes  # the embedding is the head
        assert option.allowed_decode_speedup == found.options[0].step_bytes / option.step_bytes
        assert option.total_bytes <= 10**9 and option.meets == (option.allowed_decode_speedup >= 1.2)
    assert found.chosen.num_key_value_heads == 4


def test_the_donor_stays_where_it_will_do(donor):
    found = recommend(donor, wanted())
    assert found.chosen is found.options[0] and found.verdict.startswith("Leave donor as it is")


def test_what_fits_is_where_the_memory_ends(donor):
    """One byte less than the donor needs, and it is not chosen; and so on down to nothing."""
    options = recommend(donor, wanted()).options
    for option, next_one in zip(options, [*options[1:], None], strict=True):
        assert (
            recommend(donor, wanted(memory_bytes=option.total_bytes)).chosen.num_key_value_heads
            == option.num_key_value_heads
        )
        chosen = recommend(donor, wanted(memory_bytes=option.total_bytes - 1)).chosen
        assert (chosen and chosen.num_key_value_heads) == (next_one and next_one.num_key_value_heads)
    impossible = recommend(donor, wanted(memory_bytes=options[-1].total_bytes - 1))
    assert impossible.verdict.startswith("No number of KV heads is enough: with 1 KV head it takes 12.74 MiB, ")
    assert "Ask for less, or quantize." in impossible.verdict


def test_cache_alone_can_be_asked_for(donor):
    options = recommend(donor, wanted()).options
    found = recommend(donor, wanted(memory_bytes=None, cache_bytes=options[2].cache_bytes))
    assert found.chosen.num_key_value_heads == 2 and found.chosen.longest_context_tokens is None


def test_the_sweep_decides_what_costs_least(donor):
    tight = wanted(memory_bytes=recommend(donor, wanted()).options[1].total_bytes)
    assert recommend(donor, tight).chosen.num_key_value_heads == 4
    found = recommend(donor, tight, sweep_of(donor, row(4, 0.5), row(2, 0.3), row(2, 0.1, plan="first-own-2")))
    assert found.chosen.num_key_value_heads == 2 and found.chosen.tried["plan"] == "first-own-2"
    assert "+0.100 nats per token over the donor" in " ".join(found.reasons)
    assert found.options[1].tried["loss_over_donor_nats_per_token"] == pytest.approx(0.5)
    found = recommend(donor, tight, sweep_of(donor, row(8, 0.0)))
    assert found.chosen.num_key_value_heads == 4 and "did not try 4 heads" in " ".join(found.unknown)


def test_what_is_not_known_is_said(donor):
    said = " ".join(recommend(donor, wanted(context_tokens=4096)).unknown)
    assert "more heads are taken to cost less. Run hf-gqa sweep" in said
    assert "has positions for 512 tokens; 4,096 need a longer model first" in said
    short = recommend(donor, wanted(context_tokens=8, batch_size=1))
    assert short.options[-1].allowed_decode_speedup < 1.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_bytes": None}, "recommend: nothing is asked for. Give --memory, --cache or --speedup."),
        ({"context_tokens": 0}, "context_tokens = 0: use a whole number from 1 on."),
        ({"decode_speedup": 0}, "speedup = 0: use a number above 0, such as 1.5."),
    ],
)
def test_wishes_that_make_no_sense(changes, message):
    with pytest.raises(Refusal) as refused:
        wanted(**changes)
    assert str(refused.value) == message


def test_sweep_of_another_donor_is_refused(donor):
    other = replace(sweep_of(donor, row(4, 0.1)), donor_identity="0")
    with pytest.raises(Refusal, match=r"sweep: is of another donor \('d'\) than donor\. Make one with hf-gqa sweep\."):
        recommend(donor, wanted(), other)


def test_a_grouped_donor_goes_on_from_its_heads(tmp_path):
    convert_checkpoint(DONOR, tmp_path / "four", num_key_value_heads=4)
    found = recommend(open_donor(tmp_path / "four"), wanted())
    assert [option.num_key_value_heads for option in found.options] == [4, 2, 1]


def test_command_prints_the_arithmetic_and_json():
    asked = ["recommend", DONOR, "--memory", "13MB", "--context", "512", "--batch", "1"]
    run = run_cli(*asked)
    assert run.exit_code == 0 and run.stdout.startswith("Convert donor to 2 KV heads (8 now)")
    assert "chosen" in run.stdout and "Donor: weights" in run.stdout and "not known:" in run.stdout
    found = json.loads(run_cli(*asked, "--json").stdout)
    assert found["chosen"]["meets"] and found["wanted"]["memory_bytes"] == 13_000_000
    run = run_cli("recommend", DONOR, "--context", "512", "--memory", "much")
    assert run.exit_code == 2 and "memory = 'much' is no amount of memory" in run.stderr
