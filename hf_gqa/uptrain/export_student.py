"""Write a trained student as a checkpoint like the one it came from."""

import copy
import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from ..convert.donor_folder import carry_files
from ..convert.manifest import MANIFEST_FILE, Manifest
from ..staging import staged_folder


def export_student(
    model: nn.Module,
    output: Path,
    *,
    source: Path | None,
    uptraining: dict,
    dtype: torch.dtype | None = None,
    processing_class=None,
    overwrite: bool = False,
    writes: bool = True,
    also: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Save the student into `output`, which appears complete or not at all; the model in memory stays as it is.

    Adapters of peft are merged. What training frameworks persist wrongly is put right: `use_cache` is True.

    Args:
        model: unwrapped; may be a peft model, and may be sharded over processes (then all of them must call this).
        source: the folder the student was loaded from, whose tokenizer, licence and manifest go along; None if unknown.
        uptraining: what the manifest records of the training.
        dtype: of the saved weights; None: as they are in memory.
        processing_class: tokenizer to save where there is no source.
        overwrite: replace `output` at one stroke if it exists.
        also: writes further files into the folder before it appears.
        writes: False in processes that only take part in gathering.
    """
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    state = model.state_dict()
    if any(isinstance(tensor, DTensor) for tensor in state.values()):
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not writes:
        return
    first = {}  # sharded, what is one parameter under several names was gathered once for each
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state[name] = state[first.setdefault(id(parameter), name)]
    if dtype is not None:
        state = cast(state, dtype)
    with staged_folder(output, overwrite) as staging:
        try:
            model.save_pretrained(staging, state_dict=state)
        except SafetensorError as error:
            raise OSError(
                errno.EIO, f"writing failed ({error}). Checkpoints are kept: make room, then resume", str(output)
            ) from None
        _correct_config(staging / "config.json", dtype)
        if source is not None:
            carry_files(source, staging)
        elif processing_class is not None:
            processing_class.save_pretrained(staging)
        if source is not None and (source / MANIFEST_FILE).is_file():
            replace(Manifest.read(source), uptraining=uptraining).write(staging)
        also(staging)


def cast(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Floating-point tensors in another dtype; those that were one tensor under several names still are."""
    made: dict[tuple, torch.Tensor] = {}
    for tensor in state.values():
        key = tensor.data_ptr(), tensor.shape
        if key not in made:
            made[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return {name: made[tensor.data_ptr(), tensor.shape] for name, tensor in state.items()}


def _correct_config(path: Path, dtype: torch.dtype | None) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config["use_cache"] = True
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
