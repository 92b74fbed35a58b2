"""Who may import whom: the floors of the package, the rooms of a floor, and plug-ins, which only registries import."""

import ast
import re
from pathlib import Path

import hf_gqa


PACKAGE = Path(hf_gqa.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    **{"runtime": 0, "weights": 1, "methods": 2, "sharing": 2, "convert": 3, "text": 3},
    **{"evaluate": 4, "uptrain": 4, "analyze": 5, "export": 5, "workflow": 6, "cli": 7},
}
ROOMS = {
    "evaluate": {
        **{"recipe": 0, "report": 0, "inputs": 0, "local_tasks": 0, "retrieval": 1, "page": 1, "quality": 1, "cost": 1},
        **{"tasks": 2, "measuring": 3, "evaluation": 4},
    },
}
FOR_ALL_BUT_RUNTIME = {
    *("evaluating", "human_units", "progress_bar", "reading", "recipe", "refusal", "registry", "staging"),
}
PLUGINS = re.compile(
    r"hf_gqa\.(methods|sharing|uptrain\.objectives|convert\.relatives|evaluate\.retrieval|runtime\.modeling_gqa_\w+)"
    r"(\.\w+)?"
)
PLUGIN_PACKAGES = {
    *("hf_gqa.methods", "hf_gqa.sharing", "hf_gqa.uptrain.objectives"),
    *("hf_gqa.convert.relatives", "hf_gqa.evaluate.retrieval"),
}
TRAINING_LIBRARIES = {"peft", "accelerate", "datasets"}


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in FILES}


def short(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def imports_of(file: Path) -> list[tuple[int, str]]:
    """(line, absolute name of the module) of every import in the file, at the top or inside a function."""
    package = name_of(file) if file.name == "__init__.py" else name_of(file).rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            names = [f"{module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name if name in MODULES else module) for name in names]
    return sorted(set(found))


def first_below(module: str) -> str:
    """hf_gqa.convert.plan -> convert; nothing for the package itself."""
    return [*module.split("."), ""][1]


def floor_breach(importer: str, imported: str) -> str | None:
    """Why `importer` may not import `imported`; both are modules of hf_gqa."""
    here, there = first_below(importer), first_below(imported)
    if here == "":
        return None  # the front page may show everything
    if here == there:
        return room_breach(ROOMS.get(here, {}), importer.split(".")[2:], imported.split(".")[2:])
    if here in FOR_ALL_BUT_RUNTIME:
        return None if there in FOR_ALL_BUT_RUNTIME else "what all floors use stands on none of them"
    if there in FOR_ALL_BUT_RUNTIME:
        return "is not shipped" if here == "runtime" else None
    if there == "":
        return None if here == "cli" else "only the front door knows the front page"
    if here not in FLOORS or there not in FLOORS:
        return "is on no floor"
    return None if FLOORS[there] < FLOORS[here] else "goes up or sideways"


def room_breach(rooms: dict[str, int], importer: list[str], imported: list[str]) -> str | None:
    """The same within a floor that has rooms, which are steps of a stair; names start below the floor's."""
    if not rooms or not importer or importer[:1] == imported[:1]:
        return None
    here, there = importer[0], "".join(imported[:1])
    if here not in rooms or there not in rooms:
        return "is in no room"
    return None if rooms[there] < rooms[here] else "goes up or sideways to another room"


def breaches(importer: str, file: Path) -> list[str]:
    found = []
    for line, imported in imports_of(file):
        library, floor = imported.partition(".")[0], FLOORS.get(first_below(importer))
        reason = floor_breach(importer, imported) if library == "hf_gqa" else None
        if library in TRAINING_LIBRARIES and floor not in (3, 4, 5):
            reason = "belongs on floors 3 to 5"
        if PLUGINS.fullmatch(imported) and imported not in PLUGIN_PACKAGES:
            reason = "a plug-in is asked for in its registry"
        if reason:
            found.append(f"{short(file)}:{line}: imports {imported}: {reason}")
    return found
