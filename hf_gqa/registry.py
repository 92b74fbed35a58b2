"""Plug-ins by file name: a new file in `methods/`, `sharing/`, ... is a new entry, and nobody imports it by name."""

import difflib
import importlib
import pkgutil
from functools import cached_property
from types import ModuleType

from .refusal import Refusal


class Registry:
    """The plug-ins of one package; the file's name is the key.

    Args:
        package: the package whose modules are the plug-ins.
        kind: what one is called in messages, such as "conversion method".
        attribute: the name of the object each file must define.
        prefix: what the names of plug-in files start with; other files of the package are not plug-ins.
    """

    def __init__(self, package: str, kind: str, attribute: str, prefix: str = ""):
        self.package, self.kind, self.attribute, self.prefix = package, kind, attribute, prefix

    def names(self) -> list[str]:
        return list(self._names)

    @cached_property
    def _names(self) -> list[str]:
        """A conversion asks a dozen times: the folder is read once."""
        modules = pkgutil.iter_modules(importlib.import_module(self.package).__path__)
        return sorted(m.name.removeprefix(self.prefix) for m in modules if m.name.startswith(self.prefix))

    def module(self, name: str) -> ModuleType:
        """Raises Refusal if there is no such plug-in or it cannot be imported, TypeError if its file lacks the object."""
        known = self.names()
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            guess = f" Did you mean '{close[0]}'?" if close else ""
            raise Refusal(f"{self.kind} '{name}' is unknown.{guess} Known: {', '.join(known)}.")
        try:
            module = importlib.import_module(f"{self.package}.{self.prefix}{name}")
        except ImportError as error:  # a family that the installed transformers lacks, or calls in an unknown way
            raise Refusal(f"{self.kind} '{name}' cannot be imported: {error}") from None
        if not hasattr(module, self.attribute):
            raise TypeError(f"{module.__file__}: a {self.kind} file must define `{self.attribute}`.")
        return module

    def get(self, name: str):
        return getattr(self.module(name), self.attribute)
