"""What each family can become: the rows of docs/families.md, of the README's table and of `hf-gqa inspect`.

Written from the families' own files, so that no table can say anything else than the code.
`python -m hf_gqa.export.support_table` (`make families`) writes the tables again.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from ..convert.families import FAMILIES, Family, load_family
from ..convert.relatives import RELATIVES
from ..methods import METHODS
from ..runtime.attention_layout import AttentionLayout
from ..sharing import SHARINGS


COLUMNS = {
    "family": "family (`model_type`)",
    "projections": "query, key and value",
    "norms": "norms on queries and keys",
    "position": "position",
    "export": "student with fewer KV heads",
    "heads": "heads of a bundle",
    "methods": "methods",
    "sharing": "sharing",
}
BEGIN = "<!-- families: written by `make families` -->"
END = "<!-- families: end -->"


def support_row(name: str) -> dict[str, str]:
    """The cells of one family, by column."""
    family = load_family(name)
    layout = family.donor_layout
    return {
        "family": f"`{name}`",
        "projections": f"fused: `{layout.fused}`" if layout.fused else "separate",
        "norms": norms_in_words(layout),
        "position": layout.position,
        "export": export_in_words(family),
        "heads": ", ".join(head.removeprefix("AutoModelFor") for head in family.head_classes) or "none",
        "methods": methods_in_words(layout),
        "sharing": sharing_in_words(layout),
    }


def norms_in_words(layout: AttentionLayout) -> str:
    if layout.query_norm is None:
        return "none"
    kinds = {
        "shared": "one weight for all heads",
        "per_head": "a weight for each head",
        "joint": "over all heads at once",
    }
    return kinds[layout.norm_weights] + if_switched(layout)


def if_switched(layout: AttentionLayout) -> str:
    return f", if `{layout.norm_switch}`" if layout.norm_switch else ""


def export_in_words(family: Family) -> str:
    if family.donor_layout.key_value_heads_field is not None:
        return "native"
    if not isinstance(family.native_fields(family.native_config_class(), 1), str):
        return f"bundle; one KV head: native `{family.model_type}`"
    if family.model_type in RELATIVES.names():
        return f"bundle; one KV head: native `{RELATIVES.get(family.model_type).model_type}`"
    return "bundle"


def methods_in_words(layout: AttentionLayout) -> str:
    reasons = {
        "observes": layout.cross_attention is not None or layout.ties_layers,
        "computes_scores": layout.query_norm is None and not layout.plain_scores,
        "moves_heads": layout.head_positions == "always",
        "needs_linear_scores": layout.query_norm is not None,
    }
    refused = [n for n in METHODS.names() if any(getattr(METHODS.get(n), r, False) for r in reasons if reasons[r])]
    moving = (
        "" if layout.head_positions in (None, "always") else f"; none that moves heads, if `{layout.head_positions}`"
    )
    return (all_but(refused) + if_switched(layout) if refused else "all") + moving


def all_but(names: Iterable[str]) -> str:
    return f"all but {', '.join(f'`{name}`' for name in names)}"


def sharing_in_words(layout: AttentionLayout) -> str:
    """Patterns are rows, which planned attention follows in every family whose blocks let it."""
    lending = [n for n in SHARINGS.names() if any(row.borrows_states for row in SHARINGS.get(n)((0, 0), (1, 1)))]
    if layout.cross_attention is not None or layout.ties_layers:
        return "none"
    return "all" if layout.passes_keywords else all_but(lending)


def families_table() -> str:
    """Markdown, one row per family."""
    rows = [support_row(name) for name in FAMILIES.names()]
    return markdown([list(COLUMNS.values()), *([row[column] for column in COLUMNS] for row in rows)])


def short_table() -> str:
    """Markdown, one row for all families that become the same."""
    rows = [support_row(name) for name in FAMILIES.names()]
    by_export: dict[str, list[str]] = {}
    for row in rows:
        by_export.setdefault(row["export"], []).append(row["family"])
    lines = [[", ".join(by_export[export]), export] for export in sorted(by_export, reverse=True)]
    return markdown([[COLUMNS["family"], COLUMNS["export"]], *lines])


def markdown(lines: list[list[str]]) -> str:
    head, *rows = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, f"|{'---|' * len(lines[0])}", *rows])


TABLES = {"docs/families.md": families_table, "README.md": short_table}


def with_table(text: str, table: str) -> str:
    """A file's text with the table between its marks written again."""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    assert len(pattern.findall(text)) == 1, "the marks of the table are not there once"
    return pattern.sub(lambda _: f"{BEGIN}\n{table}\n{END}", text)


def write_tables(repository: Path) -> None:
    for file, table in TABLES.items():
        path = repository / file
        path.write_text(with_table(path.read_text(encoding="utf-8"), table()), encoding="utf-8")


if __name__ == "__main__":
    write_tables(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
