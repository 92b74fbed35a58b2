"""A teacher's top-k log-probabilities on disk, read in training when the teacher does not fit beside the student.

Shapes: B rows of a batch, S sequence, k listed tokens.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open

from ..reading import read_json
from ..refusal import Refusal


SETTINGS_FILE = "teacher_logits.json"
FORMAT = "hf_gqa teacher logits, version 1"
COLUMNS = ("input_ids", "position_ids")
ROWS_PER_READ = 1024
INTEGER_DTYPES = MappingProxyType({"U16": torch.uint16, "I32": torch.int32})


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherLogitsSettings:
    """What a folder of teacher logits holds: its `teacher_logits.json`.

    Attributes:
        format: FORMAT; another one is another version's.
        donor_id: the teacher, as its user calls it.
        teacher_dtype: of the teacher's weights.
        top_k: tokens listed at each position, likeliest first.
        vocab_size: of the teacher.
        sequence_length: tokens of a row.
        num_rows: rows of the data set.
        rows_per_shard: rows of each shard but the last.
        rows_sha256: of all `input_ids` and `position_ids`.
        token_ids_dtype, log_probs_dtype: as safetensors calls them.
        complete: whether every shard has been written.
    """

    format: str = FORMAT
    donor_id: str
    teacher_dtype: str
    top_k: int
    vocab_size: int
    sequence_length: int
    num_rows: int
    rows_per_shard: int
    rows_sha256: str
    token_ids_dtype: str
    log_probs_dtype: str = "F16"
    complete: bool = False

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type or (field.type is int and value < 1):
                raise ValueError(
                    f"{field.name} = {value!r} is not {'at least 1' if field.type is int else field.type.__name__}"
                )
        if self.token_ids_dtype not in INTEGER_DTYPES or self.log_probs_dtype != "F16":
            raise ValueError(f"token_ids_dtype = {self.token_ids_dtype!r}, log_probs_dtype = {self.log_probs_dtype!r}")

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.rows_per_shard)

    def shard_shape(self, shard: int) -> list[int]:
        """Of both of its tensors: (rows, S, k)."""
        rows = min(self.rows_per_shard, self.num_rows - shard * self.rows_per_shard)
        return [rows, self.sequence_length, self.top_k]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def shard_file(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def read_settings(folder: Path) -> TeacherLogitsSettings:
    """The folder's `teacher_logits.json`, complete or not.

    Raises:
        Refusal: there is none, or it is not one that this version writes.
    """
    file = folder / SETTINGS_FILE
    if not file.is_file():
        raise Refusal(f"{folder}: holds no {SETTINGS_FILE}. Write the teacher's logits there first.")
    read = read_json(file, "Write the teacher's logits into a new folder.")
    try:
        if read["format"] != FORMAT:
            raise ValueError(f"format = {read['format']!r}, expected {FORMAT!r}")
        return TeacherLogitsSettings(**read)
    except (ValueError, TypeError, KeyError) as error:
        raise Refusal(
            f"{file}: not readable ({type(error).__name__}: {error}). Write the teacher's logits into a new folder."
        ) from None


def read_rows(rows: Dataset, start: int, stop: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `position_ids` of some rows, int64 (rows, S).

    Raises:
        Refusal: rows of several lengths.
    """
    read = rows.with_format("torch", columns=list(COLUMNS), dtype=torch.int64)[start:stop]
    if len({len(row) for column in COLUMNS for row in read[column]}) != 1:
        raise Refusal(f"rows: {start} to {stop - 1} are of several lengths. Pack them into rows of one length.")
    return {column: torch.stack(tuple(read[column])) for column in COLUMNS}


def describe_rows(rows: Dataset) -> dict[str, int | str]:
    """`num_rows`, `sequence_length` and `rows_sha256` of the packed rows; reads them all.

    Raises:
        Refusal: no rows, rows without one of the columns, or rows of several lengths.
    """
    absent = [column for column in COLUMNS if column not in rows.column_names]
    if absent or not len(rows):
        raise Refusal(
            f"rows: {len(rows)} rows of {rows.column_names}. Give at least one, with {' and '.join(COLUMNS)}."
        )
    lengths, sha256 = set(), hashlib.sha256()
    for start in range(0, len(rows), ROWS_PER_READ):
        read = read_rows(rows, start, min(start + ROWS_PER_READ, len(rows)))
        lengths.add(read["input_ids"].shape[1])
        both = torch.stack([read[column] for column in COLUMNS], dim=1)  # row by row, however many are read at once
        sha256.update(both.numpy().tobytes())
    if len(lengths) != 1:
        raise Refusal(f"rows: are of lengths {sorted(lengths)}. Pack them into rows of one length.")
    return {"num_rows": len(rows), "sequence_length": lengths.pop(), "rows_sha256": sha256.hexdigest()}


def check_shard(folder: Path, settings: TeacherLogitsSettings, shard: int) -> None:
    """Refuse a shard that is missing, truncated, or of other tensors than `settings` say; reads its header alone."""
    file = folder / shard_file(shard)
    shape = settings.shard_shape(shard)
    expected = {"log_probs": (settings.log_probs_dtype, shape), "token_ids": (settings.token_ids_dtype, shape)}
    way_out = "Remove it and write the teacher's logits again: only what is missing is computed."
    if not file.is_file():
        raise Refusal(f"{file}: is missing. Write the teacher's logits again: only what is missing is computed.")
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in sorted(opened.keys())}
            found = {name: (read.get_dtype(), read.get_shape()) for name, read in slices.items()}
    except (SafetensorError, OSError) as error:
        raise Refusal(f"{file}: not a readable safetensors file ({error}). {way_out}") from None
    if found != expected:
        raise Refusal(f"{file}: holds {found}, expected {expected}. {way_out}")


class StoredTeacher:
    """The teacher's likeliest tokens at every position of a data set, read from disk a row at a time.

    It holds no open files, so it can be used in any number of DataLoader workers, forked or spawned.

    Attributes:
        folder: where the shards are.
        settings: what they hold.
        bytes_on_disk: of all shards.
    """

    def __init__(self, folder: Path, settings: TeacherLogitsSettings):
        self.folder = folder
        self.settings = settings
        shards = range(settings.num_shards)
        self.bytes_on_disk = sum((folder / shard_file(shard)).stat().st_size for shard in shards)

    @classmethod
    def open(cls, folder: str | Path, rows: Dataset, *, vocab_size: int | None = None) -> "StoredTeacher":
        """Open what `write_teacher_logits` wrote for these rows.

        Args:
            folder: holds `teacher_logits.json` and its shards.
            rows: the data set to train with; all of it is read once, to see that it is the teacher's.
            vocab_size: of the student, to see that it is the teacher's.

        Raises:
            Refusal: incomplete or damaged, of other rows, or of another vocabulary.
        """
        folder = Path(folder).expanduser()
        settings = read_settings(folder)
        if not settings.complete:
            raise Refusal(f"{folder}: is incomplete. Write the teacher's logits again: it continues where it stopped.")
        expected = {} if vocab_size is None else {"vocab_size": vocab_size}
        for key, value in (expected | describe_rows(rows)).items():
            stored = getattr(settings, key)
            if stored != value:
                raise Refusal(
                    f"{folder}: was written with {key} = {stored}, training has {value}. "
                    f"Train with what it was written for (text, sequence_length and what is held out to evaluate on: eval_tokens "
                    f"or eval_file), or write the teacher's logits into another folder."
                )
        for shard in range(settings.num_shards):
            check_shard(folder, settings, shard)
        return cls(folder, settings)

    @property
    def bytes_per_token(self) -> int:
        return self.settings.top_k * (INTEGER_DTYPES[self.settings.token_ids_dtype].itemsize + torch.float16.itemsize)

    def rows(self, row_indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the teacher holds likeliest in some rows.

        Args:
            row_indices: int64 (B,), indices in the data set, in any order.

        Returns:
            token_ids_BSk, int64, and log_probs_BSk, float32, natural logarithms, likeliest first; both on the CPU.

        Raises:
            IndexError: there is no such row.
        """
        settings = self.settings
        shape = (len(row_indices), settings.sequence_length, settings.top_k)
        token_ids_BSk, log_probs_BSk = torch.empty(shape, dtype=torch.int64), torch.empty(shape)
        for place, row in enumerate(row_indices.tolist()):
            if not 0 <= row < settings.num_rows:
                raise IndexError(f"{self.folder}: holds rows 0 to {settings.num_rows - 1}, got {row}.")
            shard, row_of_shard = divmod(row, settings.rows_per_shard)
            with safe_open(self.folder / shard_file(shard), framework="pt") as opened:
                token_ids_BSk[place] = opened.get_slice("token_ids")[row_of_shard].to(torch.int64)
                log_probs_BSk[place] = opened.get_slice("log_probs")[row_of_shard]
        return token_ids_BSk, log_probs_BSk
