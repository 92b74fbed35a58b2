"""hf-gqa inspect: what a donor is and what it can become."""

import typer
from rich.table import Table

from ..convert.donor import open_donor
from ..export.inspection import inspect_donor
from ..human_units import human_bytes, human_count
from .options import Json, Revision, TrustRemoteCode, WeightsOnly
from .printing import all_heads_in_words, cache_in_words, console, errors_as_messages, print_json


def inspect(
    donor: str = typer.Argument(..., help="Folder or Hub repository of the donor."),
    revision: Revision = None,
    weights_only: WeightsOnly = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Show what DONOR is and can become.

    Heads, cache, legal numbers of KV heads and how each would be exported. Nothing is written.
    """
    with errors_as_messages(json):
        opened = open_donor(donor, revision=revision, weights_only=weights_only, trust_remote_code=trust_remote_code)
        found = inspect_donor(opened)
    if json:
        print_json(found)
        return
    out = console()
    out.print(f"{found['donor']}: {found['model_class']} ({found['model_type']}), position: {found['position']}")
    out.print(f"  query heads    {found['num_attention_heads']} x {found['head_dim']}")
    out.print(f"  KV heads       {all_heads_in_words(found)}")
    out.print(
        f"  parameters     {human_count(found['parameters'])} ({human_bytes(found['weight_bytes'])}, {found['dtype']})"
    )
    out.print(f"  cache/token    {cache_in_words(found)}")
    out.print(f"  family         {family_in_words(found['family'])}")
    print_targets(found)


def print_targets(found: dict) -> None:
    out = console()
    what = "cache/token" if found["cache_bytes_per_token"] else "keys, values/token"
    table = Table("KV heads", "method", what, "of donor", "tensor parallel", "export", "because")
    for target in found["targets"]:
        table.add_row(
            str(target["num_key_value_heads"]),
            target["kind"],
            cache_in_words(target)
            if target["cache_bytes_per_token"]
            else human_bytes(target["key_value_bytes_per_token"]),
            f"{target['key_value_fraction']:.3g}",
            ", ".join(map(str, target["tensor_parallel_sizes"])),
            target["export"],
            target["reason"],
        )
    out.print(table)
    for target in found["impossible"]:
        out.print(f"not {target['num_key_value_heads']}: {target['reason']}")


def family_in_words(row: dict[str, str]) -> str:
    """The row of docs/families.md, on one line."""
    cells = {column: cell.replace("`", "") for column, cell in row.items()}
    return (
        f"{cells['family']}: projections {cells['projections']}; query and key norms {cells['norms']}; fewer KV heads {cells['export']}; "
        f"bundle heads {cells['heads']}; methods {cells['methods']}; sharing {cells['sharing']}"
    )
