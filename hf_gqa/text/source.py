"""The text that a student is uptrained on: files, folders, or a dataset, read by the datasets library."""

import codecs
import glob
import hashlib
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from datasets import (
    Dataset,
    Features,
    IterableDataset,
    Value,
    concatenate_datasets,
    disable_progress_bars,
    load_dataset,
    load_dataset_builder,
)
from datasets.exceptions import DatasetsError
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from pyarrow import ArrowException
from transformers import PreTrainedTokenizerBase

from ..refusal import Refusal
from ..staging import file_sha256


READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
OF_DATASETS = ("dataset_name", "dataset_config_name", "dataset_split")  # options that say which
TEXT = Features({"text": Value("string")})
CHUNK_BYTES = 1 << 20
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
READING_ERRORS = (
    *(DatasetsError, ArrowException, ValueError, RuntimeError),
    *(FileNotFoundError, ConnectionError, HfHubHTTPError),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """Where the text comes from: `train_file` or `dataset_name`, exactly one of them.

    Args:
        train_file: files (.txt, one document each; .jsonl, .json, .parquet, one document per row), or folders, walked
            in sorted order for such files; what is hidden or empty in a folder is passed over.
        dataset_name: a dataset on the Hub, or the folder of one.
        dataset_config_name: which of its configurations.
        dataset_split: which of its splits.
        text_column: the column with the text, or with conversations (lists of messages); by default `text`, or else
            `messages`.
        streaming: read while training instead of preparing the text on disk first.

    Raises:
        Refusal: none or both of `train_file` and `dataset_name`, or a configuration without a dataset.
    """

    train_file: tuple[str, ...] = ()
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_split: str = "train"
    text_column: str | None = None
    streaming: bool = False

    def __post_init__(self):
        if isinstance(self.train_file, str | Path):
            raise Refusal(f"train_file: got the string '{self.train_file}'. Give a list of files and folders.")
        object.__setattr__(self, "train_file", tuple(map(str, self.train_file)))
        if self.train_file and self.dataset_name:
            raise Refusal(
                f"text: got both train_file = {_listed(self.train_file)} and dataset_name = '{self.dataset_name}'. "
                f"Give one of them."
            )
        if not self.train_file and not self.dataset_name:
            raise Refusal("text: got neither train_file nor dataset_name. Give one of them.")
        if self.dataset_config_name is not None and not self.dataset_name:
            raise Refusal(
                f"text: dataset_config_name = '{self.dataset_config_name}' belongs to a dataset, and dataset_name is not "
                f"given. Leave it out, or give dataset_name."
            )


def keep_bars_on_terminals() -> None:
    """The datasets library shows its own wherever it runs."""
    if not sys.stderr.isatty():
        disable_progress_bars()


def open_documents(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> Dataset | IterableDataset:
    """The documents as strings, in the one column `text`; conversations go through the tokenizer's chat template.

    Nothing that comes with a dataset is executed. What is not streamed lies in the cache of the datasets library.

    Raises:
        Refusal: anything missing, unreadable, not UTF-8, without text, or without the column asked for.
    """
    parts = [_as_documents(rows, where, source, tokenizer) for where, rows in open_rows(source)]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def open_rows(source: TextSource) -> Iterator[tuple[str, Dataset | IterableDataset]]:
    """What a source holds with all of its columns, and what to call it: a dataset, or files of one kind after another.

    Raises:
        Refusal: anything missing, unreadable, or not UTF-8.
    """
    if source.dataset_name:
        where = source.dataset_name
        yield where, _load(where, source, where, source.dataset_split, name=source.dataset_config_name)
        return
    files = _files(source)
    for file in files:
        if file.suffix.lower() != ".parquet":
            _check_utf8(file)
    for reader, group in groupby(files, _reader):
        names = [str(file) for file in group]
        where = _listed(names)
        options = {"text": {"sample_by": "document", "encoding": "utf-8-sig"}}.get(reader, {})
        yield where, _load(where, source, reader, "train", data_files=[*map(glob.escape, names)], **options)


def fingerprint(source: TextSource) -> str:
    """What a resumed run compares: the same text has the same fingerprint, wherever its files lie.

    Files and folders count by their contents, a dataset on the Hub by its name, configuration, split and commit.
    """
    is_folder = source.dataset_name is not None and Path(source.dataset_name).is_dir()
    identity = [source.dataset_config_name, source.dataset_split, source.text_column]
    if source.train_file or is_folder:
        files = _files(source) if source.train_file else _below(Path(source.dataset_name))
        identity += [[file.suffix.lower(), file.stat().st_size, file_sha256(file)] for file in files]
    else:
        identity += [source.dataset_name, _builder_hash(source)]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _builder_hash(source: TextSource) -> str:
    try:
        return load_dataset_builder(source.dataset_name, source.dataset_config_name).hash
    except READING_ERRORS as error:
        raise unreadable(source.dataset_name, source, error) from None


def check_source(source: TextSource) -> None:
    """Raises the Refusal that reading would begin with for files; a dataset on the Hub is not asked for."""
    if source.train_file:
        _files(source)
    elif Path(source.dataset_name).exists() and not Path(source.dataset_name).is_dir():
        raise Refusal(f"{source.dataset_name}: is a file, not the folder of a dataset. Give it as text instead.")


def _files(source: TextSource) -> list[Path]:
    files = []
    for path in map(Path, source.train_file):
        if path.is_dir():
            found = [file for file in _below(path) if _reader(file) and file.stat().st_size]
            if not found:
                raise Refusal(f"{path}: holds no file with text ({', '.join(READERS)}). Give another folder.")
            files += found
        elif not path.is_file():
            raise Refusal(f"{path}: is no file and no folder. Check train_file.")
        elif not _reader(path):
            raise Refusal(f"{path}: has the suffix '{path.suffix}', known are {', '.join(READERS)}. Convert it to one.")
        elif not path.stat().st_size:
            raise Refusal(f"{path}: is empty. Leave it out.")
        else:
            files.append(path)
    return files


def has_columns(source: TextSource) -> bool:
    """Whether any of its files has columns of its own; that of a .txt is named by its reader.

    Raises:
        Refusal: a file that is not there, or cannot be read.
    """
    return any(_reader(file) != "text" for file in _files(source))


def _below(folder: Path) -> list[Path]:
    """All files that are not hidden, sorted by path."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _reader(file: Path) -> str | None:
    return READERS.get(file.suffix.lower())


def _check_utf8(file: Path) -> None:
    decoder, read_bytes = codecs.getincrementaldecoder("utf-8")("strict"), 0
    with open(file, "rb") as stream:
        while True:
            chunk = stream.read(CHUNK_BYTES)
            kept_bytes = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                offset = read_bytes - kept_bytes + error.start
                stream.seek(0)
                encoding = "UTF-16" if stream.read(2) in UTF16_MARKS else "LATIN1"
                name = shlex.quote(str(file))
                raise Refusal(
                    f"{file}: is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {offset:,}). Convert it, if it "
                    f"is {encoding}: iconv -f {encoding} -t UTF-8 {name} > {shlex.quote(f'{file.stem}.utf8{file.suffix}')}"
                ) from None
            if not chunk:
                return
            read_bytes += len(chunk)


def _load(where: str, source: TextSource, reader: str, split: str, **options) -> Dataset | IterableDataset:
    """Streamed JSON of mixed types would come undecoded, texts in quotation marks; without that option it is an error."""
    try:
        if source.streaming and hasattr(load_dataset_builder(reader, **options).config, "on_mixed_types"):
            options["on_mixed_types"] = None
        return load_dataset(reader, split=split, streaming=source.streaming, **options)
    except READING_ERRORS as error:
        raise unreadable(where, source, error) from None


def unreadable(where: str, source: TextSource, error: Exception) -> Exception:
    """The Refusal to raise; an error of the disk stays what it is."""
    cause = error.__cause__ or error
    if isinstance(cause, OSError) and cause.errno is not None:
        return cause
    if constants.HF_HUB_OFFLINE and source.dataset_name and isinstance(error, ConnectionError | HfHubHTTPError):
        return Refusal(
            f"{where}: is no folder here and not in the cache of datasets, and the Hub is offline (HF_HUB_OFFLINE is set). "
            f"Unset it, or download the dataset first."
        )
    reason = " ".join(str(cause).split())[:300].rstrip(".")
    if "corresponds to no data" in reason and source.train_file:
        return Refusal(f"{where}: holds no text. Give other text.")
    advice = "Repair the file, or do not stream it" if source.streaming else "Repair the file"
    if source.dataset_name:
        advice = "Check dataset_name, dataset_config_name and dataset_split"
    return Refusal(f"{where}: cannot be read ({type(cause).__name__}: {reason}). {advice}.")


def _as_documents(
    dataset: Dataset | IterableDataset, where: str, source: TextSource, tokenizer: PreTrainedTokenizerBase
) -> Dataset | IterableDataset:
    try:
        columns = dataset.column_names or list(next(iter(dataset), {}))
        column = source.text_column or ("text" if "text" in columns else "messages")
        if columns and column not in columns:
            wanted = f"'{column}'" if source.text_column else "'text' or 'messages'"
            raise Refusal(f"{where}: has no column {wanted} (columns: {', '.join(columns)}). Give text_column.")
        rows = iter(dataset.select_columns([column])) if columns else iter(())
        first = next((row[column] for row in rows if _holds_text(row[column])), None)
    except Refusal:
        raise
    except READING_ERRORS as error:
        raise unreadable(where, source, error) from None
    if first is None:
        found = f" (columns: {', '.join(columns)}; read: {column})" if columns else ""
        raise Refusal(f"{where}: holds no text{found}. Give other text, or another text_column.")
    where = f"{where}: column '{column}'"
    if isinstance(first, str) and (dataset.features or {}).get(column) == Value("string"):
        dataset = dataset.select_columns([column])
        return dataset if column == "text" else dataset.rename_column(column, "text")
    arguments = {"where": where, "column": column}
    if not isinstance(first, str):
        _check_conversation(first, where, tokenizer)
        arguments["tokenizer"] = tokenizer
    function = _strings if isinstance(first, str) else _rendered
    return dataset.map(function, batched=True, fn_kwargs=arguments, remove_columns=columns, features=TEXT)


def _holds_text(value) -> bool:
    return bool(value.strip() if isinstance(value, str) else value)


def _check_conversation(value, where: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if not isinstance(value, list) or not isinstance(value[0], dict):
        raise Refusal(
            f"{where}: holds {type(value).__name__} where text or a list of messages is needed. Give text_column."
        )
    if not {"role", "content"} <= value[0].keys():
        raise Refusal(
            f"{where}: its messages have the keys {', '.join(value[0])}, needed are role and content. Rename them."
        )
    if getattr(tokenizer, "chat_template", None) is None:
        raise Refusal(
            f"{where}: holds conversations, and the tokenizer has no chat template to turn them into text. Give a "
            f"text_column with plain text, or a tokenizer with a chat_template."
        )


def _strings(batch: dict[str, list], where: str, column: str) -> dict[str, list]:
    for value in batch[column]:
        if not isinstance(value, str | None):
            raise Refusal(f"{where}: holds {value!r:.80}, which is not text. Make all of its rows strings.")
    return {"text": batch[column]}


def _rendered(batch: dict[str, list], where: str, column: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """Keys that only other messages have come back as None, and a template takes None for a value."""
    texts = []
    for conversation in batch[column]:
        try:
            messages = [
                {key: value for key, value in message.items() if value is not None} for message in conversation or ()
            ]
            texts.append(tokenizer.apply_chat_template(messages, tokenize=False) if messages else "")
        except Exception as error:  # a template is anybody's code
            raise Refusal(
                f"{where}: the chat template fails on {conversation!r:.80} ({error}). Repair the conversation."
            ) from None
    return {"text": texts}


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
