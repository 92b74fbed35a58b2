"""Converted heads that wait in a folder, layer by layer, until a student's files are written."""

import errno
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..weights.attention_weights import AttentionWeights


class HeadsOnDisk(Mapping[int, AttentionWeights]):
    """Row number -> its heads; the folder is made here and must stay as long as they are used."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows: list[int] = []
        folder.mkdir()

    def __setitem__(self, row_idx: int, heads: AttentionWeights) -> None:
        tensors = {field.name: getattr(heads, field.name) for field in fields(heads)}
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        plain = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in present.items()}
        try:
            save_file(plain, self._file(row_idx))
        except SafetensorError as error:
            raise OSError(errno.EIO, f"writing failed ({error})", str(self._file(row_idx))) from None
        self.rows.append(row_idx)

    def __getitem__(self, row_idx: int) -> AttentionWeights:
        if row_idx not in self.rows:
            raise KeyError(row_idx)
        with safe_open(self._file(row_idx), framework="pt") as stored:
            names = stored.keys()
            return AttentionWeights(**{name: stored.get_tensor(name) for name in names})

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def _file(self, row_idx: int) -> Path:
        return self.folder / f"{row_idx}.safetensors"
