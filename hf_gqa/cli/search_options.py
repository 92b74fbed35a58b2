"""What `convert` takes to leave the plan to be found with text: a cache budget, or `--method auto`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..convert.cache_bytes import cache_bytes_per_token_computed
from ..convert.calibration import Calibration
from ..convert.donor import Donor
from ..convert.stored_model import loaded_whole
from ..export.explanation import stored_dtype
from ..human_units import human_bytes
from ..refusal import Refusal
from ..workflow.head_budget import check_budget_bytes
from ..workflow.search_plan import AUTO, FoundPlan, search_plan
from .plan_options import parsed_layers
from .printing import console


FIELDS = (
    *("num_key_value_heads", "method", "sharing", "share_every", "shared_init", "export", "seed"),
    "convert_encoder",
)
LayerHeads = Annotated[
    str | None, typer.Option(help="In place of --num-key-value-heads: KV heads of each layer, such as 4,4,2,1.")
]
KvBudget = Annotated[
    str | None,
    typer.Option(
        help="In place of --num-key-value-heads: share of the donor's cache, such as 25%, given to the layers that need it. "
        "Needs --calibration or --calibration-tokens."
    ),
]
CacheBudget = Annotated[int | None, typer.Option(help="The same as bytes of cache for a token.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedSearch:
    """What is to be found.

    Args:
        asked: fields of the plan that are given.
        share: of the donor's cache; None for no budget, or one in bytes.
        budget_bytes: of cache for a token.
    """

    asked: dict
    share: float | None
    budget_bytes: int | None

    def search(self, donor: Donor, calibration: Calibration | None) -> FoundPlan:
        """Raises Refusal where there is no text, or for a budget that cannot be met."""
        if calibration is None:
            what = "method = auto: tries methods" if self.asked["method"] == AUTO else "cache budget: tries layers"
            raise Refusal(f"{what} on text, and there is none. Give --calibration or --calibration-tokens.")
        whole = cache_bytes_per_token_computed(donor.config, donor.num_key_value_heads, stored_dtype(donor))
        budget_bytes = self.budget_bytes if self.share is None else int(whole * self.share + 1e-6)
        if budget_bytes is not None:
            check_budget_bytes(donor, budget_bytes)
        model = loaded_whole(donor)
        return search_plan(donor, model, calibration, budget_bytes=budget_bytes, **self.asked)


def rows_of_layers(given: str | None) -> tuple[dict, ...] | None:
    """'4,4,2' -> rows of a plan."""
    if given is None:
        return None
    counts = [part.strip() for part in given.split(",")]
    if not all(count.isdecimal() for count in counts):
        raise Refusal(f"--layer-heads {given}: is no list of KV heads. Give a number for each layer, such as 4,4,2,1.")
    return tuple({"num_key_value_heads": int(count)} for count in counts)


def plan_fields(options: dict) -> dict:
    """The options of `convert` that say what the student shall be, as fields of a plan."""
    asked = {name: options[name] for name in FIELDS}
    layers = {
        "shared_layers": parsed_layers(options["shared_layers"]),
        "layer_plan": rows_of_layers(options["layer_heads"]),
    }
    return asked | layers


def wanted_search(
    asked: dict, plan_file: Path | None, kv_budget: str | None, cache_budget: int | None
) -> WantedSearch | None:
    """None where the plan says it all.

    Raises:
        Refusal: options that contradict each other, or a budget that is none.
    """
    budgets = {"--kv-budget": kv_budget, "--cache-budget": cache_budget}
    given = [name for name, value in budgets.items() if value is not None]
    if not given and asked["method"] != AUTO:
        return None
    others = {"--num-key-value-heads": asked["num_key_value_heads"], "--layer-heads": asked["layer_plan"]}
    if given:
        given += [name for name, value in others.items() if value is not None]
    given += ["--plan"] if plan_file is not None else []
    if len(given) > 1:
        raise Refusal(f"convert: {' and '.join(given)} say each how many KV heads there shall be. Give one of them.")
    if plan_file is not None or not (given or any(value is not None for value in others.values())):
        raise Refusal(
            "method = auto: finds methods, not how many KV heads there shall be. Give --num-key-value-heads, --layer-heads, "
            "--kv-budget or --cache-budget with it."
        )
    fixed = {name: value for name, value in asked.items() if value is not None}
    return WantedSearch(asked=fixed, share=_share(kv_budget), budget_bytes=cache_budget)


def print_search(found: FoundPlan) -> None:
    """What was tried, with its numbers."""
    if found.allotment is not None:
        counts = sorted({count for damage in found.allotment.damages for count in damage}, reverse=True)
        table = Table("layer", *(f"{count} KV heads" for count in counts), "chosen", title_justify="left")
        table.title = "KL to the donor (nats per token) where one layer alone has fewer KV heads"
        rows = zip(found.allotment.damages, found.allotment.num_key_value_heads, strict=True)
        for layer_idx, (damage, chosen) in enumerate(rows):
            cells = (f"{damage[count]:.4f}" if count in damage else "" for count in counts)
            table.add_row(str(layer_idx), *cells, str(chosen))
        console().print(table)
        spent, budget = (human_bytes(n) for n in (found.allotment.spent_bytes, found.allotment.budget_bytes))
        console().print(f"cache for a token: {spent} of the {budget} allowed")
    if found.trials:
        table = Table("method", "KL to the donor", "loss", "seconds", title_justify="left")
        table.title = "Tried on part of the text, measured on the rest"
        for trial in found.trials:
            name = ",".join(trial.method)
            if trial.refused is None:
                table.add_row(name, f"{trial.kl:.4f}", f"{trial.loss:.4f}", f"{trial.seconds:.1f}")
            else:
                table.add_row(name, "refused", "", "")
        console().print(table)


def _share(kv_budget: str | None) -> float | None:
    """'25%' and '0.25' -> 0.25."""
    if kv_budget is None:
        return None
    number = kv_budget.strip().removesuffix("%")
    try:
        share = float(number) / (100 if kv_budget.strip().endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise Refusal(f"--kv-budget {kv_budget}: is no share of the donor's cache. Give one such as 25% or 0.25.")
    return share
