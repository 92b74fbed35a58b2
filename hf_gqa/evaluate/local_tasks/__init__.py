"""Tasks for lm_eval over a folder of jsonl files, so that they run without a network; one YAML file each.

`local_<name>.yaml` reads `<name>.jsonl`. Every line is an object with the fields that the file names in its metadata.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from ...refusal import Refusal


HERE = Path(__file__).parent


def local_task_names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("local_*.yaml"))


def write_local_tasks(
    tasks_folder: str | Path, destination: str | Path, names: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Write the tasks so that they read the files of a folder; `lm_eval --include_path` then finds them.

    Args:
        tasks_folder: holds the jsonl files.
        destination: folder for the YAML files, and for what `datasets` makes of the jsonl files; made if it is missing.
        names: which; None: those whose file is in the folder.

    Returns:
        Names of the tasks that were written.

    Raises:
        Refusal: a file is missing, or does not have what the task reads.
    """
    folder, destination = Path(tasks_folder).expanduser().resolve(), Path(destination).resolve()
    tasks = {name: yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8")) for name in local_task_names()}
    if not folder.is_dir():
        raise Refusal(f"{tasks_folder}: no such folder. Give the one that holds the tasks' jsonl files.")
    if names is None:
        names = [name for name, task in tasks.items() if _data_of(task, folder).is_file()]
    if not names:
        files = ", ".join(_data_of(task, folder).name for task in tasks.values())
        raise Refusal(f"{tasks_folder}: holds no file of a local task. Give a folder with some of {files}.")
    destination.mkdir(parents=True, exist_ok=True)
    for name in names:
        data = _data_of(tasks[name], folder)
        _check_lines(name, data, tasks[name])
        # The cache goes with the tasks, not into the user's own: the data may be anything.
        tasks[name]["dataset_kwargs"] = {"data_files": {"test": str(data)}, "cache_dir": str(destination / "cache")}
        text = yaml.safe_dump(tasks[name], sort_keys=False, allow_unicode=True)
        (destination / f"{name}.yaml").write_text(text, encoding="utf-8")
    return tuple(names)


def _data_of(task: dict, folder: Path) -> Path:
    return folder / task["dataset_kwargs"]["data_files"]["test"]


def _check_lines(name: str, data: Path, task: dict) -> None:
    """lm_eval would fail without a line number, or count a document without a right choice as wrong."""
    if not data.is_file():
        raise Refusal(f"task '{name}': needs {data}, which is not there. Give another tasks folder, or leave it out.")
    documents = 0
    with open(data, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            fault = _fault(line, task) if line.strip() else None
            if fault:
                raise Refusal(f"{data}: line {number} {fault}. Correct it, or leave task '{name}' out.")
            documents += bool(line.strip())
    if not documents:
        raise Refusal(f"{data}: holds no documents. Give the file of task '{name}', or leave it out.")


def _fault(line: bytes, task: dict) -> str | None:
    """What is wrong with one document."""
    try:
        document = json.loads(line.decode("utf-8"))
    except ValueError as error:
        return f"is no JSON in UTF-8 ({error})"
    missing = [field for field in task["metadata"]["fields"] if not isinstance(document, dict) or field not in document]
    if missing:
        return f"has no {', '.join(missing)}"
    if "doc_to_choice" in task:
        gold, choices = document["gold"], document[task["doc_to_choice"]]
        if not isinstance(choices, list) or not isinstance(gold, int) or not 0 <= gold < len(choices):
            return f"has gold = {gold!r}, which is none of its choices"
    return None
