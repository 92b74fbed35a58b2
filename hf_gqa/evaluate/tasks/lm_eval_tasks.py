"""Tasks of EleutherAI's lm_eval, donor and student on the same documents.

Local tasks (`local_...`) read a folder of jsonl files; all others read the Hub, or what is cached of it.
"""

import copy
import difflib
import io
import logging
import os
import random
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...refusal import Refusal
from ..local_tasks import local_task_names, write_local_tasks
from ..quality.bootstrap import Bootstrap
from ..report import Interval, TaskScore


LOCAL = "local_"
WITHOUT_FILTER = "none"
OF_THE_MEAN = {  # metrics that lm_eval computes of the (weighted) mean of the documents' log-likelihoods
    **dict.fromkeys(("perplexity", "word_perplexity", "byte_perplexity"), lambda mean: np.exp(-mean)),
    "bits_per_byte": lambda mean: -mean / np.log(2),
}


def run_tasks(
    donor: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    tasks_folder: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    bootstrap: Bootstrap,
) -> tuple[TaskScore, ...]:
    """Every metric of every task as lm_eval computes it; `equivalent_command` gives the same numbers.

    Log-probabilities are computed in fp32. What is longer than the model's `max_position_embeddings` (2048 where it has
    none) loses its beginning, in lm_eval, for both models alike. Both are put in evaluation mode.

    Args:
        tasks: names; tasks that begin with `local_` are ours.
        tasks_folder: holds the local tasks' jsonl files.
        limit: of the documents of each task only the first; the scores say how many there were.
        num_fewshot: examples before each document; None: what the task says.
        batch_size: requests at once.
        seed: of the choice of examples.

    Raises:
        Refusal: lm_eval is missing, an unknown task, or one whose data is not to be had.
    """
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise Refusal(f"tasks: {name} = {value}, at least {least} is needed. Give another, or leave it out.")
    with loaded_tasks(tasks, tasks_folder) as loaded:
        if not loaded["tasks"]:
            return ()
        theirs, ours = (
            _results(model, tokenizer, loaded, limit, num_fewshot, batch_size, seed) for model in (donor, student)
        )
    return _scores(theirs, ours, bootstrap)


def check_tasks(tasks: Sequence[str], tasks_folder: Path | None = None) -> None:
    """Raises the Refusal that `run_tasks` would begin with, before anything else has been computed."""
    with loaded_tasks(tasks, tasks_folder):
        pass


def equivalent_command(
    student_path: str | Path,
    tasks: Sequence[str],
    tasks_folder: str | Path | None = None,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    trust_remote_code: bool = False,
    local_tasks: str = "lm_eval_tasks",
) -> str:
    """For a shell: lm_eval's own command, which gives the student the scores of `run_tasks`.

    Args:
        trust_remote_code: for a student that brings its own code.
        local_tasks: folder that the command writes the local tasks to, before lm_eval reads them.
    """
    command = ["python", "-m", "lm_eval", "--model", "hf", "--model_args"]
    command += [f"pretrained={student_path},dtype={dtype},softmax_dtype=float32", "--tasks", ",".join(tasks)]
    command += ["--device", device, "--batch_size", str(batch_size), "--seed", str(seed)]
    for option, value in (("--limit", limit), ("--num_fewshot", num_fewshot)):
        command += [] if value is None else [option, str(value)]
    command += ["--trust_remote_code"] if trust_remote_code else []
    ours = [task for task in tasks if task.startswith(LOCAL)]
    if not ours:
        return shlex.join(command)
    code = "from hf_gqa.evaluate.local_tasks import write_local_tasks; write_local_tasks"
    write = ["python", "-c", f"{code}({str(tasks_folder)!r}, {local_tasks!r}, {ours!r})"]
    return f"{shlex.join(write)} && {shlex.join([*command, '--include_path', local_tasks])}"


@contextmanager
def loaded_tasks(tasks: Sequence[str], tasks_folder: Path | None) -> Iterator[dict]:
    """The tasks with their data, as lm_eval holds them; it may do as it likes in the block."""
    names = list(dict.fromkeys(tasks))
    if not names:
        yield {"tasks": {}}
        return
    with TemporaryDirectory(ignore_cleanup_errors=True) as scratch, undisturbed():
        manager = _task_manager(names, tasks_folder, Path(scratch))
        parts = [_loaded(name, manager) for name in names]
        yield {kind: {k: v for part in parts for k, v in part.get(kind, {}).items()} for kind in ("tasks", "groups")}


@contextmanager
def undisturbed() -> Iterator[None]:
    """lm_eval seeds, warns and prints as a command does; afterwards all is as it was.

    Its progress is shown on a terminal, on stderr, and nowhere else.
    """
    shown = sys.stderr if sys.stderr.isatty() else io.StringIO()
    logger = logging.getLogger("lm_eval")
    with ExitStack() as restored:
        restored.callback(logger.setLevel, logger.level)
        restored.callback(random.setstate, random.getstate())
        restored.callback(np.random.set_state, np.random.get_state())
        restored.callback(_set_environment, dict(os.environ))
        restored.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # those of the libraries that it imports
        restored.enter_context(torch.random.fork_rng())
        restored.enter_context(redirect_stdout(shown))
        restored.enter_context(redirect_stderr(shown))
        logger.setLevel(logging.ERROR)
        yield


def _set_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


def _task_manager(tasks: list[str], tasks_folder: Path | None, scratch: Path):
    """Knows the local tasks, and lm_eval's own if one of them is asked for: finding those takes seconds."""
    try:
        from lm_eval.tasks import TaskManager
    except (ImportError, AttributeError) as error:  # AttributeError: an old one beside a new transformers
        raise Refusal(
            f"tasks: lm_eval cannot be imported ({error}). Run pip install 'hf_gqa[eval]', or leave the tasks out."
        ) from None
    ours = [task for task in tasks if task.startswith(LOCAL)]
    _check_known(ours, local_task_names())
    if ours and tasks_folder is None:
        raise Refusal(f"task '{ours[0]}': needs a tasks folder with its jsonl file. Give one, or leave the task out.")
    if ours:
        write_local_tasks(tasks_folder, scratch, ours)
    manager = TaskManager(include_path=str(scratch), include_defaults=len(ours) < len(tasks))
    _check_known(tasks, manager.all_tasks)
    return manager


def _check_known(tasks: list[str], known: list[str]) -> None:
    for task in tasks:
        if task not in known:
            close = difflib.get_close_matches(task, {*known, *local_task_names()}, n=3)
            guess = f" Did you mean {' or '.join(close)}?" if close else ""
            raise Refusal(
                f"task '{task}' is unknown to lm_eval.{guess} Ours are {', '.join(local_task_names())}; "
                "python -m lm_eval ls tasks lists the others."
            )


def _loaded(task: str, manager) -> dict:
    """A task, or a group with all its tasks, each with its data."""
    try:
        loaded = manager.load([task])
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Refusal(
            f"task '{task}': its data is not to be had ({reason}). Go online, or use local tasks with a tasks folder."
        ) from None
    if any(getattr(one, "UNSAFE_CODE", False) for one in loaded["tasks"].values()):
        raise Refusal(f"task '{task}': runs code that the model writes. Run it with lm_eval's own command.")
    return loaded


def _results(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, loaded: dict, limit, num_fewshot, batch_size, seed
) -> dict:
    """What lm_eval returns, with the samples.

    As its `simple_evaluate` does it, but that one also asks git and pip about the machine.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for task in loaded["tasks"].values():
        by_itself = task.get_config("num_fewshot")
        if by_itself != 0:  # a task that says 0 means it
            task.set_config(key="num_fewshot", value=(by_itself or 0) if num_fewshot is None else num_fewshot)
        task.set_fewshot_seed(seed=seed)
    reader = HFLM(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # it may be given a pad token
        batch_size=batch_size,
        softmax_dtype="float32",
    )
    return evaluate(lm=reader, task_dict=loaded, limit=limit)


def _scores(theirs: dict, ours: dict, bootstrap: Bootstrap) -> tuple[TaskScore, ...]:
    """One for each metric and filter that is a number for both models."""
    scores = []
    for task, values in ours["results"].items():
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            donor_value = theirs["results"][task].get(key)
            if comma and not metric.endswith("_stderr") and _is_number(value) and _is_number(donor_value):
                stderr = f"{metric}_stderr,{filtered}"
                samples = ours["n-samples"].get(task, {}).get("effective", values.get("sample_len", 0))
                better = ours["higher_is_better"].get(task, {}).get(metric)
                scores.append(
                    TaskScore(
                        task=task,
                        metric=metric if filtered == WITHOUT_FILTER else key,
                        version=str(ours["versions"].get(task)),
                        num_fewshot=int(ours["n-shot"].get(task) or 0),
                        samples=samples,
                        higher_is_better=better is not False,
                        donor=float(donor_value),
                        donor_stderr=_number_or_none(theirs["results"][task].get(stderr)),
                        student=float(value),
                        student_stderr=_number_or_none(values.get(stderr)),
                        difference=_difference(theirs, ours, task, key, bootstrap),
                    )
                )
    return tuple(scores)


def _is_number(value) -> bool:
    return isinstance(value, int | float | np.number) and bool(np.isfinite(value))


def _number_or_none(value) -> float | None:
    return float(value) if _is_number(value) else None


def _difference(theirs: dict, ours: dict, task: str, key: str, bootstrap: Bootstrap) -> Interval | None:
    """Paired by document; None where the score is no function of the documents' mean (an F1, a group)."""
    columns = [_by_document(results, task, key) for results in (theirs, ours)]
    if any(column is None for column in columns) or columns[0].keys() != columns[1].keys():
        return None
    donor_D2, student_D2 = (np.array([column[document] for document in sorted(column)]) for column in columns)
    transform = OF_THE_MEAN.get(key.partition(",")[0], np.asarray)
    for values_D2, results in ((donor_D2, theirs), (student_D2, ours)):
        score = transform(values_D2[:, 0].sum() / values_D2[:, 1].sum())
        if not abs(score - results["results"][task][key]) <= 1e-9 * max(1, abs(score)):
            return None
    if not np.array_equal(donor_D2[:, 1], student_D2[:, 1]):
        return None
    return bootstrap.difference(student_D2[:, 0], donor_D2[:, 0], donor_D2[:, 1], transform)


def _by_document(results: dict, task: str, key: str) -> dict[int, tuple[float, float]] | None:
    """(score, weight) of each document: lm_eval keeps a number, or (log-likelihood, words or bytes)."""
    metric, _, filtered = key.partition(",")
    samples = [sample for sample in results["samples"].get(task, []) if sample["filter"] == filtered]
    found = {sample["doc_id"]: _pair(sample.get(metric)) for sample in samples}
    known = found and all(_is_number(part) for pair in found.values() for part in pair)
    return {document: (float(pair[0]), float(pair[1])) for document, pair in found.items()} if known else None


def _pair(value) -> tuple:
    return tuple(value) if isinstance(value, list | tuple) and len(value) == 2 else (value, 1)
