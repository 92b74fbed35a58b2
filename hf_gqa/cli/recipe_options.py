"""The fields of a recipe as options of a command, and a YAML file of them as another."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import typer

from ..uptrain.objectives import OBJECTIVES
from ..uptrain.phases import TRAINED
from ..uptrain.recipe import UptrainRecipe


HELP = {
    "teacher": "Donor to distil from: folder or Hub repository.",
    "teacher_logits": "Folder of `hf-gqa teacher-logits`, in place of running the teacher.",
    "train_file": "Text: .txt, .jsonl, .parquet, or folders of them; repeatable.",
    "dataset_name": "Text: a dataset on the Hub or in a folder.",
    "dataset_config_name": "Its configuration.",
    "dataset_split": "Its split; 'train' if not said.",
    "text_column": "Column to read; 'text', else 'messages', if not said.",
    "streaming": "Read the dataset as it comes.",
    "sample_from_teacher": "No text at all: the donor writes it.",
    "sampled_tokens": "How much it writes; the budget if not said.",
    "eval_file": "Text to evaluate on; else some of the text is held out.",
    "eval_tokens": "How much is held out.",
    "budget_tokens": "Tokens to train on.",
    "budget_fraction": "The same, as a fraction of --pretraining-tokens; 0.05 in the GQA paper.",
    "pretraining_tokens": "Tokens that the donor was pre-trained on.",
    "objective": f"One of {', '.join(OBJECTIVES.names())}; distill if there is a teacher.",
    "train": f"Parameters to train: {', '.join(TRAINED)}; the objective's choice if not said.",
    "lora_rank": "Train adapters of this rank, and key and value projections in full.",
    "learning_rate": "Peak; 0.256 / hidden_size if not said.",
    "sequence_length": "Tokens per row; what the student can, up to 1024, if not said.",
    "attend_across_documents": "Let the documents of a packed row see each other.",
    "per_device_train_batch_size": "Rows; as many as leave some 300 steps if not said.",
    "gradient_accumulation_steps": "Batches per step.",
    "gradient_checkpointing": "Less memory, more time; never reentrant.",
    "bf16": "Compute in bfloat16, with weights in --dtype.",
    "dtype": "Of the weights while they are trained: float32 or bfloat16.",
    "torch_compile": "Compile the student.",
    "seed": "Of the order of the text, of sampled text, of adapters.",
    "logging_steps": "How often losses are logged.",
    "eval_steps": "How often the held-out text is evaluated.",
    "save_steps": "How often a checkpoint is saved.",
    "export": "Write the 'last' student, or the 'best' by held-out loss.",
}


def with_recipe_options(command: Callable) -> Callable:
    """The command, whose parameter `asked` (the recipe's keys as given) becomes --config and one option per field."""
    own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name != "asked"]
    options = [_option(field.name, field.type) for field in fields(UptrainRecipe) if field.name in HELP]
    config = typer.Option(None, help="YAML with these options as keys (with underscores); options given win.")
    options.insert(0, _parameter("config", Path | None, config))

    @functools.wraps(command)
    def with_options(**values):
        asked = {name: values.pop(name) for name in HELP}
        return command(
            asked=(values.pop("config"), {name: value for name, value in asked.items() if value is not None}), **values
        )

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *options)]
    with_options.__signature__ = inspect.Signature(parameters)
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def recipe_of(asked: tuple[Path | None, dict]) -> UptrainRecipe:
    """Raises Refusal for a file or values that make no recipe."""
    config, given = asked
    return UptrainRecipe.from_dict((UptrainRecipe.read(config) if config is not None else {}) | given)


def _option(name: str, kind) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    if kind is bool:
        return _parameter(name, bool | None, typer.Option(None, f"{flag}/--no-{flag[2:]}", help=HELP[name]))
    kind = list[str] | None if kind == tuple[str, ...] else kind | None
    return _parameter(name, kind, typer.Option(None, flag, help=HELP[name]))


def _parameter(name: str, annotation, default) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
