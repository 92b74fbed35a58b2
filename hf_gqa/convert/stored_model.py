"""A donor on disk whose parts are given their values one at a time, so that it need not fit in memory.

transformers loads a model whole. Here it is built without values (on the meta device), and a copy of one part of it, a layer or
what is around the layers, is given those that loading would have given it: parameters from the donor's files, buffers that
are stored nowhere from the class, which computes them when it loads too.
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from .donor import Donor
from .stored_tensors import class_names


class StoredModel:
    """Stands in for a loaded model where copies of its parts are all that is run.

    Attributes:
        base_model: without values.
    """

    def __init__(self, donor: Donor):
        self.tensors = donor.tensors
        self.dtype = _loaded_dtype(donor)
        with torch.device("meta"):
            self.model = donor.model_class._from_config(copy.deepcopy(donor.model_config), dtype=self.dtype)
        self.base_model = self.model.base_model
        plain = class_names(self.model, donor.family, donor.composite)
        self.stored = {plain(name): name for shard in donor.tensors.shards.values() for name in shard}
        tied = [(plain(a), plain(b)) for a, b in (getattr(self.model, "all_tied_weights_keys", None) or {}).items()]
        for one, other in (*tied, *((b, a) for a, b in tied)):
            if one not in self.stored and other in self.stored:
                self.stored[one] = self.stored[other]

    def why_whole(self) -> str | None:
        """What of the model cannot be given values part by part, if anything."""
        keeps = self.model._keep_in_fp32_modules or self.model._keep_in_fp32_modules_strict
        if keeps and any(self.tensors.dtype(name).itemsize > self.dtype.itemsize for name in self.stored.values()):
            return f"{type(self.model).__name__} keeps some of its weights in more bits than the others"
        missing = sorted(name for name in self.base_model.state_dict() if name not in self.stored)
        if missing:
            return f"'{missing[0]}' is not in its files"
        parts = {type(part): (name, part) for name, part in self.base_model.named_modules()}
        for name, part in parts.values():
            if any(isinstance(value, torch.Tensor) and value.is_meta for value in vars(part).values()):
                return f"'{name}' keeps a tensor that is no buffer"
            if not self._computes_its_buffers(part):
                return f"'{name}' has a buffer that its class does not compute when it loads"
        return None

    def fill(self, part: nn.Module, path: str) -> None:
        """Give a copied part its values, float32; `path` is where it is below the base model."""
        for name, module in part.named_modules():
            own = ".".join(filter(None, (path, name)))
            self._compute_buffers(module)
            for key, parameter in list(module.named_parameters(recurse=False)):
                value = self._value(f"{own}.{key}")
                module.register_parameter(key, nn.Parameter(value, requires_grad=parameter.requires_grad))
            for key, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_meta:
                    module.register_buffer(key, self._value(f"{own}.{key}"))

    def _value(self, name: str) -> torch.Tensor:
        """As it would be loaded, copied: a tensor of the files is a view of the mapped file, which others read too."""
        stored = self.tensors.get(self.stored[name.removeprefix(".")])
        return stored.to(self.dtype).to(torch.float32, copy=True) if stored.is_floating_point() else stored.clone()

    def _compute_buffers(self, module: nn.Module, before: int = 0) -> None:
        """Those that are not stored, by the class's own rule; `before` is what they hold until then."""
        made = {
            name: torch.full_like(buffer, before, device="cpu")
            for name, buffer in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set
        }
        if made:
            module._buffers.update(made)
            with torch.no_grad():
                self.base_model._init_weights(module)

    def _computes_its_buffers(self, module: nn.Module) -> bool:
        """Whether they come out the same whatever they held."""
        if not module._non_persistent_buffers_set:
            return True
        found = []
        for before in (0, 1):
            alone = copy.copy(module)
            alone._buffers = dict(module._buffers)
            self._compute_buffers(alone, before)
            found.append([alone._buffers[name] for name in sorted(module._non_persistent_buffers_set)])
        return all(map(torch.equal, *found))


def model_to_run(donor: Donor) -> PreTrainedModel | StoredModel:
    """The donor, whose files give values to one part at a time where that can be, else loaded whole."""
    if donor.composite is None and not donor.as_published:
        stored = StoredModel(donor)
        if stored.why_whole() is None:
            return stored
    return loaded_whole(donor)


def loaded_whole(donor: Donor) -> PreTrainedModel:
    return donor.model_class.from_pretrained(donor.folder, config=donor.model_config, dtype="auto").eval()


def why_loaded_whole(donor: Donor) -> str | None:
    """Why running the donor on text takes the memory of all its layers; None where it takes that of one."""
    if donor.composite is not None:
        return "it is one tower of several"
    if donor.as_published:
        return "its files are in a layout that transformers converts when it loads"
    return StoredModel(donor).why_whole()


def _loaded_dtype(donor: Donor) -> torch.dtype:
    """What `dtype="auto"` says: the configuration's, else that of the first tensor."""
    said = getattr(donor.model_config, "dtype", None)
    if said is not None:
        return getattr(torch, said) if isinstance(said, str) else said
    return donor.tensors.dtype(next(name for names in donor.tensors.shards.values() for name in names))
