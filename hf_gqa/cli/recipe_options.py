"""The fields of a recipe as options of a command, and a YAML file of them as another."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args, get_origin

import typer

from ..recipe import Recipe


@dataclass(frozen=True, slots=True)
class Asked:
    """What a user gave: a file, and options, which win."""

    recipe_class: type[Recipe]
    config: Path | None
    given: dict

    def recipe(self) -> Recipe:
        """Raises Refusal for a file or values that make no recipe."""
        of_file = self.recipe_class.read(self.config) if self.config is not None else {}
        for name, replaced in self.recipe_class.replaces.items():
            if self.given.get(name):
                of_file = {key: value for key, value in of_file.items() if key not in replaced}
        return self.recipe_class.from_dict(of_file | self.given)


def with_options_of(recipe_class: type[Recipe], help_texts: dict[str, str]) -> Callable[[Callable], Callable]:
    """Decorates a command: its parameter `asked` becomes --config and one option per field that has a help text."""

    def decorate(command: Callable) -> Callable:
        own = [parameter for name, parameter in inspect.signature(command).parameters.items() if name != "asked"]
        chosen = [field for field in fields(recipe_class) if field.name in help_texts]
        config = typer.Option(None, help="YAML with these options as keys (with underscores); options given win.")
        options = [_parameter("config", Path | None, config)]
        options += [_option(field.name, field.type, help_texts[field.name]) for field in chosen]

        @functools.wraps(command)
        def with_options(**values):
            asked = {field.name: values.pop(field.name) for field in chosen}
            given = {name: value for name, value in asked.items() if value is not None}
            return command(asked=Asked(recipe_class, values.pop("config"), given), **values)

        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own, *options)]
        with_options.__signature__ = inspect.Signature(parameters)
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_options

    return decorate


def _option(name: str, kind, help_text: str) -> inspect.Parameter:
    flag = f"--{name.replace('_', '-')}"
    if kind is bool:
        return _parameter(name, bool | None, typer.Option(None, f"{flag}/--no-{flag[2:]}", help=help_text))
    kind = list[get_args(kind)[0]] | None if get_origin(kind) is tuple else kind | None
    return _parameter(name, kind, typer.Option(None, flag, help=help_text))


def _parameter(name: str, annotation, default) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
