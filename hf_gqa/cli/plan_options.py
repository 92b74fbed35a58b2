"""What `convert` takes to say how layers share: options, or a plan in a file."""

from pathlib import Path
from typing import Annotated

import typer

from ..convert.plan import SHARED_INITS, ConversionPlan
from ..reading import read_yaml
from ..refusal import Refusal
from ..sharing import SHARINGS


Sharing = Annotated[str, typer.Option(help=f"How layers share with earlier ones: {', '.join(SHARINGS.names())}.")]
SharedLayers = Annotated[
    str | None,
    typer.Option(
        help="Layers that borrow, such as 2,3 or 12-21, each from the nearest earlier layer of its kind that does not."
    ),
]
ShareEvery = Annotated[
    int | None,
    typer.Option(help="In place of --shared-layers: of so many consecutive layers, all but the first borrow."),
]
SharedInit = Annotated[
    str,
    typer.Option(
        help=f"What shared layers start from: {', '.join(SHARED_INITS)}; own is the lender's weights, mean that of all who use them, "
        f"fit the lender's, to which queries and outputs of borrowers are fitted on the calibration text."
    ),
]
ConvertEncoder = Annotated[
    bool,
    typer.Option(
        "--convert-encoder",
        help="Of an encoder-decoder, convert the encoder too; its keys and values are never cached.",
    ),
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="File with a plan (YAML), in place of the options that say the same.")
]
OPTIONS = {
    "method": "mean_pool",
    "sharing": "own",
    "shared_init": "own",
    "export": "auto",
    "seed": 0,
    "convert_encoder": False,
}


def parsed_layers(given: str | None) -> tuple[int, ...] | None:
    """'2,3,12-14' -> (2, 3, 12, 13, 14)."""
    if given is None:
        return None
    layers = []
    for part in given.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise Refusal(
                f"--shared-layers {given}: '{part}' is no layer. Give numbers and ranges, such as 2,3 or 12-21."
            )
        layers += range(int(first), int(last if dash else first) + 1)
    return tuple(layers)


def asked_plan(asked: dict) -> ConversionPlan:
    if asked["num_key_value_heads"] is None and asked["layer_plan"] is None and asked["sharing"] == "own":
        raise Refusal("convert: nothing says what to convert to. Give --num-key-value-heads, --sharing or --plan.")
    return ConversionPlan(**asked)


def read_plan(path: Path, asked: dict) -> ConversionPlan:
    """The plan of a file, such as `hf-gqa analyze` writes.

    Raises:
        Refusal: no such file, no plan, or options that the file should say.
    """
    said = [name for name, value in asked.items() if value != OPTIONS.get(name)]
    if said:
        option = f"--{said[0].replace('_', '-')}"
        raise Refusal(f"--plan {path}: {option} is part of the plan. Leave the option out, or write it into the file.")
    values = read_yaml(path, "Give a plan in YAML.")
    try:
        return ConversionPlan.from_dict(values)
    except Refusal as refusal:
        raise Refusal(f"--plan {path}: {refusal}") from None
