"""hf-gqa recommend: which plan fits what serving asks for."""

from pathlib import Path

import typer
from rich.table import Table

from ..convert.donor import open_donor
from ..evaluate.cost.memory import parse_memory
from ..human_units import human_bytes
from ..workflow.recommend import Recommendation
from ..workflow.recommend import recommend as compare
from ..workflow.serving import TARGET_TOKENS, Wanted
from .options import Json, Revision, WeightsOnly
from .printing import console, errors_as_messages, print_json


def recommend(
    donor: str = typer.Argument(..., help="Folder or Hub repository of the donor; it is only read."),
    memory: str = typer.Option(None, help="For weights and cache together, such as 24GB (10^9) or 24GiB (2^30)."),
    context: int = typer.Option(..., help="Tokens of each sequence; of an encoder-decoder, that its encoder reads."),
    batch: int = typer.Option(1, help="Sequences at once."),
    cache: str = typer.Option(None, help="For the cache alone, such as 4GB."),
    speedup: float = typer.Option(None, help="Of decoding over the donor, such as 1.5."),
    target_tokens: int = typer.Option(
        None, help=f"That an encoder-decoder writes to each; {TARGET_TOKENS} if not said."
    ),
    sweep: Path = typer.Option(None, help="Folder of hf-gqa sweep, for what each plan cost."),
    revision: Revision = None,
    weights_only: WeightsOnly = False,
    json: Json = False,
) -> None:
    """Say which number of KV heads serves so much context in so much memory, what it saves, and what is not known.

    Only shapes are read. Everything follows from arithmetic that is shown, and from the sweep.
    """
    with errors_as_messages(json):
        wanted = Wanted(
            context_tokens=context,
            batch_size=batch,
            memory_bytes=parse_memory(memory) if memory is not None else None,
            cache_bytes=parse_memory(cache) if cache is not None else None,
            decode_speedup=speedup,
            target_tokens=target_tokens,
        )
        found = compare(open_donor(donor, revision=revision, weights_only=weights_only), wanted, sweep)
    if json:
        print_json(found.to_dict())
    else:
        print_recommendation(found)


def print_recommendation(found: Recommendation) -> None:
    table = Table(
        "KV heads", "weights", "cache", "total", "decode, at most", "context that fits", "loss over donor", ""
    )
    for option in found.options:
        tried = f"{option.tried['loss_over_donor_nats_per_token']:+.3f}" if option.tried else "not tried"
        longest = "" if option.longest_context_tokens is None else f"{option.longest_context_tokens:,}"
        table.add_row(
            f"{option.num_key_value_heads}{' (donor)' if option.keeps else ''}",
            human_bytes(option.weight_bytes),
            human_bytes(option.cache_bytes),
            human_bytes(option.total_bytes),
            f"{option.allowed_decode_speedup:.2f}x",
            longest,
            "0" if option.keeps else tried,
            "chosen" if option is found.chosen else "meets it" if option.meets else "",
        )
    out = console()
    out.print(found.verdict)
    out.print(table)
    for sentence in found.reasons:
        out.print(f"- {sentence}")
    for sentence in found.unknown:
        out.print(f"not known: {sentence}")
