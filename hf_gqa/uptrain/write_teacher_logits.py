"""Run a teacher over a data set once and keep, at every position, its k likeliest tokens.

Shapes: B rows of a batch, S sequence, V vocabulary, k listed tokens, C tokens of a chunk, R rows of a shard.
"""

import errno
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel

from ..evaluating import evaluating
from ..progress_bar import progress_bar
from ..refusal import Refusal
from ..staging import publish_file
from .stored_teacher import (
    INTEGER_DTYPES,
    SETTINGS_FILE,
    TeacherLogitsSettings,
    check_shard,
    describe_rows,
    read_rows,
    read_settings,
    shard_file,
)


TOKENS_PER_CHUNK = 1024
PARTIAL = ".partial"


def write_teacher_logits(
    teacher: PreTrainedModel,
    rows: Dataset,
    folder: str | Path,
    *,
    top_k: int,
    donor_id: str,
    batch_size: int = 8,
    rows_per_shard: int = 256,
) -> None:
    """Write the teacher's `top_k` likeliest tokens, and their log-probabilities, at every position of every row.

    A run that was stopped continues after its last complete shard when it is called again with the same arguments, and
    gives the same bytes. One process writes a folder at a time. The teacher's own logits (batch_size, S, V) are held
    once, in its dtype; what is computed from them in float32 is held for TOKENS_PER_CHUNK tokens.

    Args:
        teacher: a causal language model, on any device; documents in a row are told apart by their positions.
        rows: packed rows, with `input_ids` and `position_ids` of one length.
        folder: new, empty, or of an earlier call.
        top_k: 1 to the vocabulary's size. A token then takes top_k * 4 bytes on disk, or top_k * 6 with a vocabulary
            above 65,536.
        donor_id: the teacher's name, for the record.
        batch_size: rows that the teacher sees at once; may be changed to continue, at the price of the same bytes.
        rows_per_shard: rows of a file.

    Raises:
        Refusal: arguments out of range, a folder of other settings or with other files in it, a damaged shard, a
            teacher whose logits are not finite.
        OSError: the disk failed or is full; what is complete stays.
    """
    folder = Path(folder).expanduser()
    settings = _settings(teacher, rows, top_k, donor_id, rows_per_shard)
    if batch_size < 1:
        raise Refusal(f"write_teacher_logits: batch_size = {batch_size} is below 1. Give 1 or more.")
    _check_folder(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    present = [shard for shard in range(settings.num_shards) if (folder / shard_file(shard)).exists()]
    for shard in present:
        check_shard(folder, settings, shard)
    done = sum(settings.shard_shape(shard)[0] for shard in present)
    with (
        progress_bar("Teacher", settings.num_rows, "row", initial=done) as bar,
        evaluating(teacher),
    ):
        if not (folder / SETTINGS_FILE).is_file():
            _write_settings(folder, settings)
        for shard in sorted(set(range(settings.num_shards)) - set(present)):
            _write_shard(folder, shard, _shard_tensors(teacher, rows, settings, shard, batch_size, bar))
    if not read_settings(folder).complete:
        _write_settings(folder, replace(settings, complete=True))


def _settings(
    teacher: PreTrainedModel, rows: Dataset, top_k: int, donor_id: str, rows_per_shard: int
) -> TeacherLogitsSettings:
    vocab_size = teacher.config.get_text_config().vocab_size
    if not 1 <= top_k <= vocab_size:
        raise Refusal(f"write_teacher_logits: top_k = {top_k} is not in 1 to {vocab_size}, the vocabulary. Give one.")
    if rows_per_shard < 1:
        raise Refusal(f"write_teacher_logits: rows_per_shard = {rows_per_shard} is below 1. Give 1 or more.")
    return TeacherLogitsSettings(
        donor_id=donor_id,
        teacher_dtype=str(teacher.dtype).removeprefix("torch."),
        top_k=top_k,
        vocab_size=vocab_size,
        rows_per_shard=rows_per_shard,
        token_ids_dtype=next(
            name for name, dtype in INTEGER_DTYPES.items() if vocab_size <= torch.iinfo(dtype).max + 1
        ),
        **describe_rows(rows),
    )


def _check_folder(folder: Path, settings: TeacherLogitsSettings) -> None:
    """Refuse a folder that holds anything but what these settings have written."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise Refusal(f"{folder}: is not a folder. Give another one for the teacher's logits.")
    if not (folder / SETTINGS_FILE).is_file():
        others = sorted(path.name for path in folder.iterdir() if not path.name.endswith(PARTIAL))
        if others:
            raise Refusal(f"{folder}: holds '{others[0]}' and no {SETTINGS_FILE}. Give a new or an empty folder.")
        return
    before = asdict(read_settings(folder))
    for key, value in asdict(settings).items():
        if key != "complete" and before[key] != value:
            raise Refusal(
                f"{folder}: was begun with {key} = {before[key]!r}, now {value!r}. "
                f"Continue with what it was begun with, or give another folder."
            )


def _shard_tensors(
    teacher: PreTrainedModel, rows: Dataset, settings: TeacherLogitsSettings, shard: int, batch_size: int, bar: tqdm
) -> dict[str, torch.Tensor]:
    """Batches begin with the shard, so that they are the same wherever a run was stopped."""
    shape_RSk = settings.shard_shape(shard)
    token_ids_RSk = torch.empty(shape_RSk, dtype=INTEGER_DTYPES[settings.token_ids_dtype])
    log_probs_RSk = torch.empty(shape_RSk, dtype=torch.float16)
    first = shard * settings.rows_per_shard
    for start in range(0, shape_RSk[0], batch_size):
        stop = min(start + batch_size, shape_RSk[0])
        read = read_rows(rows, first + start, first + stop)
        token_ids_BSk, log_probs_BSk = _top_k(teacher, read, settings)
        if not log_probs_BSk.isfinite().all():
            raise Refusal(
                f"rows {first + start} to {first + stop - 1}: the teacher's logits hold NaN or Inf. "
                f"Load it in a wider dtype than {settings.teacher_dtype}, or repair it."
            )
        token_ids_RSk[start:stop], log_probs_RSk[start:stop] = token_ids_BSk.to(token_ids_RSk.dtype), log_probs_BSk
        bar.update(stop - start)
    return {"token_ids": token_ids_RSk, "log_probs": log_probs_RSk}


@torch.no_grad()
def _top_k(
    teacher: PreTrainedModel, read: dict[str, torch.Tensor], settings: TeacherLogitsSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their log-probabilities under the full softmax, (B, S, k), on the CPU."""
    inputs = {column: tensor.to(teacher.device) for column, tensor in read.items()}
    # with a cache, transformers would not look for documents in the positions
    logits_BSV = teacher(**inputs, use_cache=False).logits
    assert logits_BSV.shape[-1] == settings.vocab_size
    found = []
    for logits_CV in logits_BSV.flatten(0, 1).split(TOKENS_PER_CHUNK):
        logits_CV = logits_CV.float()
        top = logits_CV.topk(settings.top_k)
        log_probs_Ck = top.values - logits_CV.logsumexp(-1, keepdim=True)
        found.append((top.indices.cpu(), log_probs_Ck.cpu()))
    token_ids, log_probs = (torch.cat(parts).unflatten(0, logits_BSV.shape[:2]) for parts in zip(*found, strict=True))
    return token_ids, log_probs.clamp(min=torch.finfo(torch.float16).min)  # exp of that is 0, as of -inf


def _write_shard(folder: Path, shard: int, tensors: dict[str, torch.Tensor]) -> None:
    partial = folder / (shard_file(shard) + PARTIAL)
    try:
        save_file(tensors, partial)
    except SafetensorError as error:
        raise OSError(errno.EIO, f"writing failed ({error}). What is complete stays", str(partial)) from None
    # safetensors writes for the user alone; the settings have the mode of the user's umask
    shutil.copymode(folder / SETTINGS_FILE, partial)
    publish_file(partial, folder / shard_file(shard))


def _write_settings(folder: Path, settings: TeacherLogitsSettings) -> None:
    partial = folder / (SETTINGS_FILE + PARTIAL)
    partial.write_text(settings.to_json(), encoding="utf-8")
    publish_file(partial, folder / SETTINGS_FILE)
