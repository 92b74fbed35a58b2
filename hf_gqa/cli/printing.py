"""What commands print: tables for people, JSON for machines, one message for bad input."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from transformers.utils import logging

from ..export.verify import CheckFailed
from ..human_units import human_bytes
from ..refusal import Refusal


CHECK_FAILED, REFUSED, SYSTEM_FAILED = 1, 2, 3


def console() -> Console:
    """On a pipe or in a file, lines are not folded to a guessed width; brackets in names are no markup."""
    return Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


@contextmanager
def errors_as_messages(as_json: bool) -> Iterator[None]:
    """Bad input and failing disks end the command with one message and an exit code, without a traceback."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except (Refusal, OSError) as error:
        if as_json:
            print_json({"error": str(error)})
        print(f"hf-gqa: {error}", file=sys.stderr)
        raise typer.Exit(REFUSED if isinstance(error, Refusal) else SYSTEM_FAILED) from None


@contextmanager
def failed_check_as_message(as_json: bool) -> Iterator[None]:
    """Exit code 1, where other bad input has 2."""
    try:
        yield
    except CheckFailed as failure:
        if as_json:
            print_json({"error": str(failure)})
        print(f"hf-gqa: {failure}", file=sys.stderr)
        raise typer.Exit(CHECK_FAILED) from None


def print_json(value) -> None:
    print(json.dumps(value, indent=2))


def heads_and_layers_in_words(per_layer: list[int]) -> str:
    """[2, 2, 2] -> '2 in each of 3 layers'."""
    if len(set(per_layer)) == 1:
        return f"{per_layer[0]} in each of {len(per_layer)} layers"
    return ", ".join(str(heads) for heads in per_layer)


def all_heads_in_words(side: dict) -> str:
    """With an encoder, of the decoder's attention to itself and to that, and within that."""
    words = heads_and_layers_in_words(side["num_key_value_heads"])
    if "num_key_value_heads_encoder" not in side:
        return words
    cross, encoder = (heads_and_layers_in_words(side[f"num_key_value_heads_{kind}"]) for kind in ("cross", "encoder"))
    return f"{words} of the decoder, cross-attention {cross}, encoder {encoder}"


def cache_in_words(side: dict) -> str:
    """The cache of one token, and what it falls to beyond the sliding window where there is one; none of an encoder."""
    if "cache_bytes_per_encoder_token" in side:
        read = human_bytes(side["cache_bytes_per_encoder_token"])
        return f"{human_bytes(side['cache_bytes_per_token'])} written, {read} for each token that is read"
    if not side["cache_bytes_per_token"]:
        return "none (an encoder)"
    inside, beyond = side["cache_bytes_per_token"], side["cache_bytes_per_token_beyond_window"]
    words = human_bytes(inside)
    return words if inside == beyond else f"{words} ({human_bytes(beyond)} beyond the sliding window)"
