"""The front door: one Typer command per station."""

import signal
import sys

import typer

from . import quiet as quiet
from .analyze import analyze
from .card import card
from .convert import convert
from .evaluate import evaluate
from .inspect import inspect
from .push import push
from .recommend import recommend
from .refresh import refresh
from .run import run
from .sweep import sweep
from .teacher_logits import teacher_logits
from .uptrain import uptrain
from .verify import verify


app = typer.Typer(
    name="hf-gqa",
    help="Turn a pretrained Transformers checkpoint into a grouped-query one that is cheaper to serve.",
    epilog="Exit codes: 0 done, 1 a check failed, 2 the input was refused, 3 reading or writing failed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"token_normalize_func": lambda token: token.replace("_", "-")},
)
for command, example in (
    (inspect, "hf-gqa inspect ./my-donor"),
    (analyze, "hf-gqa analyze ./my-donor --text held_out.txt --shared-layers 6 --output-dir ./my-analysis"),
    (convert, "hf-gqa convert ./my-donor ./my-student --num-key-value-heads 2 --method mean_pool"),
    (
        uptrain,
        "hf-gqa uptrain ./my-student ./my-uptrained --teacher ./my-donor --train-file corpus.txt --budget-tokens 1000000",
    ),
    (teacher_logits, "hf-gqa teacher-logits ./my-student ./my-logits --config recipe.yaml --top-k 64"),
    (
        evaluate,
        "hf-gqa evaluate ./my-uptrained --donor ./my-donor --text held_out.txt --output-dir ./my-report",
    ),
    (run, "hf-gqa run recipe.yaml"),
    (
        sweep,
        "hf-gqa sweep ./my-donor ./my-sweep --num-key-value-heads 4,2,1 --methods mean_pool,first --text held_out.txt",
    ),
    (recommend, "hf-gqa recommend ./my-donor --memory 24GB --context 32768 --batch 8 --sweep ./my-sweep"),
    (verify, "hf-gqa verify ./my-student --donor ./my-donor"),
    (refresh, "hf-gqa refresh ./my-old-bundle --dry-run"),
    (card, "hf-gqa card ./my-student --report ./my-report --donor ./my-donor"),
    (push, "hf-gqa push ./my-student my-name/my-student"),
):
    app.command(epilog=f"Example: {example}")(command)


def show_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=show_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that staged folders are removed
    app()
