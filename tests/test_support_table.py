"""The tables of families say what the code does, in the files and in `hf-gqa inspect`."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_gqa import Refusal
from hf_gqa.cli import app
from hf_gqa.convert.donor import donor_from_model
from hf_gqa.convert.families import FAMILIES, load_family
from hf_gqa.convert.plan import ConversionPlan
from hf_gqa.convert.target import choose_target
from hf_gqa.export.support_table import COLUMNS, TABLES, support_row, with_table, write_tables
from hf_gqa.methods import METHODS, method_kind
from hf_gqa.sharing import SHARINGS

from .seq2seq_donors import seq2seq_donor
from .tiny_donors import NUM_ATTENTION_HEADS, tiny_donor


REPOSITORY = Path(__file__).parent.parent
WAYS = {"reduce": "{}", "rearrange": "{},mean_pool", "repair": "mean_pool,{}"}
every_family = pytest.mark.parametrize("name", FAMILIES.names())


@pytest.mark.parametrize("file", TABLES)
def test_tables_in_the_repository_are_those_of_the_code(file):
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    assert with_table(text, TABLES[file]()) == text, "run `make families`"


def test_tables_are_written_between_their_marks(tmp_path):
    (tmp_path / "docs").mkdir()
    for file in TABLES:
        text = (REPOSITORY / file).read_text(encoding="utf-8")
        (tmp_path / file).write_text(text.replace("| `llama` |", "| `lama` |"), encoding="utf-8")
    write_tables(tmp_path)
    for file in TABLES:
        assert (tmp_path / file).read_text(encoding="utf-8") == (REPOSITORY / file).read_text(encoding="utf-8")


def refused(donor, **fields) -> bool:
    try:
        choose_target(donor, ConversionPlan(**fields))
    except Refusal:
        return True
    return False


@every_family
def test_row_says_what_conversion_does(name):
    """The tiny donors have every norm that their family can have."""
    with_encoder = load_family(name).donor_layout.cross_attention is not None
    row, donor = support_row(name), donor_from_model(seq2seq_donor(name) if with_encoder else tiny_donor(name))
    assert set(row) == set(COLUMNS)
    refusing = [m for m in METHODS.names() if f"`{m}`" in row["methods"]]
    for method in METHODS.names():
        if method_kind(method) in WAYS:
            plan = {"num_key_value_heads": 2, "method": WAYS[method_kind(method)].format(method)}
            assert refused(donor, **plan) == (method in refusing), method
    few = choose_target(donor, ConversionPlan(num_key_value_heads=2))
    one = choose_target(donor, ConversionPlan(num_key_value_heads=1))
    assert few.export == row["export"].split(";")[0]
    assert (one.export == "native") == ("native" in row["export"])
    assert choose_target(donor, ConversionPlan(num_key_value_heads=NUM_ATTENTION_HEADS)).export == "native"
    for sharing in set(SHARINGS.names()) - {"own"}:
        found = refused(donor, num_key_value_heads=2, sharing=sharing, share_every=2)
        assert found == (row["sharing"] == "none" or f"`{sharing}`" in row["sharing"]), sharing


@every_family
def test_head_classes_of_the_row_load(name):
    heads = [] if support_row(name)["heads"] == "none" else support_row(name)["heads"].split(", ")
    assert [f"AutoModelFor{head}" for head in heads] == list(load_family(name).head_classes)


def test_inspect_prints_the_row(tmp_path):
    tiny_donor("olmo2").save_pretrained(tmp_path)
    found = CliRunner().invoke(app, ["inspect", str(tmp_path)], env={"COLUMNS": "400"})
    assert found.exit_code == 0
    line = next(line for line in found.output.splitlines() if line.strip().startswith("family "))
    assert "olmo2: projections separate; query and key norms over all heads at once; fewer KV heads native;" in line
    assert "methods all but fold, low_rank, refit_queries; sharing all" in line


def test_the_worked_example_is_the_file():
    text = (REPOSITORY / "docs/add-a-family.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    file = (REPOSITORY / "hf_gqa/runtime/modeling_gqa_smollm3.py").read_text(encoding="utf-8")
    assert len(blocks) == 2 and all(block in file for block in blocks)
