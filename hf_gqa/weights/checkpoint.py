"""Where a donor's tensors come from: a folder of safetensors, read lazily, or a model in memory."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..reading import read_json
from ..refusal import Refusal


SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # of the first BERTs
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class StateDict:
    """Tensors of a model in memory, as one shard."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.tensors = tensors
        self.shards = {SINGLE_FILE: tuple(tensors)}

    def get(self, name: str) -> torch.Tensor:
        return self.tensors[name].detach()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def size_bytes(self, name: str) -> int:
        return self.tensors[name].nbytes


class Checkpoint:
    """A folder of safetensors files; tensors are mapped, not read, until they are used.

    Attributes:
        shards: file name -> names of the tensors in it, in the order of the donor; of older names, what they are now.

    Raises:
        Refusal: no safetensors, an unusable index, a file that is missing, outside the folder, or not readable.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._open = {}
        listed = self._listed_shards()
        self.shards = {file: tuple(self._file(file).keys()) for file in listed}
        self._file_of, self._stored_name = {}, {}
        for file, name in ((file, name) for file, names in self.shards.items() for name in names):
            twin = self._file_of.setdefault(name, file)
            if twin != file:
                raise Refusal(f"{folder}: '{name}' is in {twin} and in {file}. Download the donor again.")
        for file, names in listed.items():
            absent = sorted(set(names) - set(self.shards[file]))
            if absent:
                raise Refusal(
                    f"{folder / INDEX_FILE}: says that '{absent[0]}' is in {file}, which does not hold it "
                    f"({len(absent)} such tensors). Download the donor again."
                )
        if listed and any(listed.values()):
            unlisted = sorted(set(self._file_of) - {name for names in listed.values() for name in names})
            if unlisted:
                raise Refusal(
                    f"{folder / INDEX_FILE}: does not list '{unlisted[0]}', which {self._file_of[unlisted[0]]} holds "
                    f"({len(unlisted)} such tensors). Index and files are of different checkpoints: download both again."
                )
        self._rename()

    def _rename(self) -> None:
        """As transformers does when it loads."""
        for name in list(self._file_of):
            for old, new in OLD_NAMES.items():
                renamed = name.replace(old, new)
                if renamed != name and renamed not in self._file_of:  # with both, the old one is left to be refused
                    self._file_of[renamed], self._stored_name[renamed] = self._file_of.pop(name), name
        now = {stored: name for name, stored in self._stored_name.items()}
        self.shards = {file: tuple(now.get(name, name) for name in names) for file, names in self.shards.items()}

    def _listed_shards(self) -> dict[str, list[str]]:
        """File name -> tensors that the index places in it; no tensors listed for a checkpoint without an index."""
        if (self.folder / SINGLE_FILE).is_file():
            return {SINGLE_FILE: []}
        index = self.folder / INDEX_FILE
        if not index.is_file():
            pickled = sorted(path.name for pattern in PICKLED for path in self.folder.glob(pattern))
            if pickled:
                raise Refusal(
                    f"{self.folder}: the weights are pickled ({', '.join(pickled[:3])}), and unpickling runs whatever code "
                    f"they carry. If you trust their author, rewrite them once: "
                    f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors."
                )
            raise Refusal(f"{self.folder}: no weights. Expected {SINGLE_FILE} or {INDEX_FILE} with its shards.")
        listed = read_json(index, "Download the donor again.")
        try:
            weight_map = listed["weight_map"]
            files = sorted(set(weight_map.values()))
        except (KeyError, TypeError, AttributeError) as error:
            raise Refusal(f"{index}: not an index ({error!r}). Expected an object with 'weight_map'.") from None
        if not isinstance(listed.get("metadata", {}), dict):  # which transformers would stumble over
            raise Refusal(f"{index}: 'metadata' is no object. Download the donor again, or leave it out.")
        if not files:
            raise Refusal(f"{index}: 'weight_map' is empty. Download the donor again.")
        for file in files:
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
                raise Refusal(f"{index}: shard {file!r} is not a file name inside the folder. Refusing to follow it.")
            if not file.endswith(".safetensors"):
                raise Refusal(f"{index}: shard '{file}' is no safetensors file. Download the donor again.")
            if not (self.folder / file).is_file():
                raise Refusal(f"{index}: shard '{file}' is missing. Download the donor again.")
        return {file: [name for name, where in weight_map.items() if where == file] for file in files}

    def _file(self, file: str):
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.folder / file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise Refusal(
                    f"{self.folder / file}: not a readable safetensors file ({error}). It may be truncated or corrupt: "
                    f"download it again."
                ) from None
        return self._open[file]

    def _slice(self, name: str):
        return self._file(self._file_of[name]).get_slice(self._stored_name.get(name, name))

    def get(self, name: str) -> torch.Tensor:
        return self._file(self._file_of[name]).get_tensor(self._stored_name.get(name, name))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | str:
        """A torch dtype for the floating types we convert, else the name that safetensors gives."""
        stored = self._slice(name).get_dtype()
        return FLOAT_DTYPES.get(stored, stored)

    def size_bytes(self, name: str) -> int:
        """Of a tensor of a floating type we convert."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize
