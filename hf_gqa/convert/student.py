"""Open a student: a folder or a repository with a language model, its tokenizer and the record of its conversion."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..refusal import Refusal
from .donor import Donor, open_donor
from .manifest import MANIFEST_FILE, Manifest
from .model_kind import CAUSAL_LM, kind_of, why_no_kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """A student on disk, and in memory for training.

    Args:
        folder: where it came from.
        model: of the kind that was asked for.
        stored_dtype: of the weights on disk, which the export keeps.
        manifest: of its conversion, if it has one.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stored_dtype: torch.dtype
    manifest: Manifest | None


def open_student(name_or_path: str | Path, dtype: torch.dtype, kind: str = CAUSAL_LM, **loading) -> Student:
    """Raises Refusal for what cannot be opened, or is a model of another kind; `loading` goes to `from_pretrained`."""
    folder = Path(name_or_path).expanduser()
    manifest = Manifest.read(folder) if (folder / MANIFEST_FILE).is_file() else None
    if manifest is not None and manifest.model_class.startswith("GPTBigCode"):  # no donor, for now
        stored = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **loading)
    else:
        opened = open_donor(name_or_path)
        folder = opened.folder  # of a repository, where it was downloaded to
        manifest = Manifest.read(folder) if (folder / MANIFEST_FILE).is_file() else None
        _check_kind(name_or_path, opened, kind)
        stored = opened.tensors.dtype(next(name for names in opened.tensors.shards.values() for name in names))
        model = opened.model_class.from_pretrained(folder, config=opened.config, dtype=dtype, **loading)
    return Student(folder=folder, model=model, tokenizer=load_tokenizer(folder), stored_dtype=stored, manifest=manifest)


def _check_kind(name_or_path: str | Path, opened: Donor, wanted: str) -> None:
    found = kind_of(opened.model_class, opened.config)
    if found == wanted:
        return
    if wanted != CAUSAL_LM:
        raise Refusal(
            f"{name_or_path}: is a {opened.model_class.__name__} ({found or 'of no kind that is known'}), the donor is of "
            f"kind {wanted}. Give the student of this donor."
        )
    reason = (
        why_no_kind(opened.model_class, opened.config)
        if found is None
        else (f"is a {opened.model_class.__name__}, which predicts no tokens one after the other")
    )
    raise Refusal(f"{name_or_path}: {reason}. Convert a donor with a causal language modelling head.")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of many kinds, by what is missing
        reason = " ".join(str(error).split())[:200]
        raise Refusal(
            f"{folder}: no tokenizer that loads ({reason}). Copy the donor's tokenizer files there."
        ) from None


def check_same_tokens(donor: Donor, student: Student, role: str, advice: str) -> None:
    """Raises Refusal unless donor and student read and predict the same tokens.

    Args:
        role: what the donor is called in the message.
        advice: its last sentence.
    """
    theirs, ours = donor.config.vocab_size, student.model.config.vocab_size
    if theirs != ours:
        raise Refusal(
            f"{role} {donor.name}: its vocabulary has {theirs:,} tokens, the student's {ours:,}; their predictions cannot "
            f"be compared. {advice}"
        )
    check_same_tokenizer(donor, student.tokenizer, role, advice)


def check_same_tokenizer(donor: Donor, tokenizer: PreTrainedTokenizerBase, role: str, advice: str) -> None:
    """Raises Refusal unless the donor's tokenizer has this one's vocabulary; arguments as in `check_same_tokens`."""
    mine = tokenizer.get_vocab()
    other = load_tokenizer(donor.folder).get_vocab()
    if mine != other:
        token = next(iter(sorted(set(mine.items()) ^ set(other.items()), key=lambda item: (item[1], item[0]))))[0]
        raise Refusal(
            f"{role} {donor.name}: its tokenizer is not the student's (they differ on {token!r}), so it would be asked "
            f"about other text. {advice}"
        )
