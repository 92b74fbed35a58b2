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

from ..convert.bundle_code import foreign_code, runtime_sha256
from ..convert.donor_folder import carry_files
from ..convert.fresh_process import first_output, probe_inputs
from ..convert.manifest import MANIFEST_FILE, Manifest
from ..evaluating import evaluating
from ..reading import read_json
from ..refusal import Refusal
from ..staging import staged_folder
from .lora import merged_into_stored


MERGED = {8: 1e-4, 4: 1e-3, 2: 5e-2}  # difference that merging may make, of the largest logit, by bytes of a weight


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
    check_exportable(model)
    trained, model = model, without_adapters(model, source, dtype)
    if model is not trained:
        _check_merged(trained, model)
    state = model.state_dict()
    if any(isinstance(tensor, DTensor) for tensor in state.values()):
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not writes:
        return
    state = _once_each(model, state)
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
            _manifest_of(source, staging, uptraining).write(staging)
        also(staging)


def _once_each(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sharded, what is one parameter under several names was gathered once for each."""
    first: dict[int, str] = {}
    once = {n: state[first.setdefault(id(p), n)] for n, p in model.named_parameters(remove_duplicate=False)}
    return state | once


def _manifest_of(source: Path, student: Path, uptraining: dict) -> Manifest:
    """That of the source, and of the code that was saved if it is the code of this hf_gqa."""
    manifest = replace(Manifest.read(source), uptraining=uptraining)
    config = read_json(student / "config.json")
    if manifest.export != "bundle" or foreign_code(student, config):
        return manifest
    return replace(manifest, code_sha256=runtime_sha256(config["model_type"]))


def check_exportable(model: nn.Module) -> None:
    """Refuse, before it is trained, a model whose adapters cannot become weights of an ordinary checkpoint.

    Raises:
        Refusal: they are tokens and no weights, or they change a weight that is another module's too.
    """
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        raise Refusal(
            "export: prompts and prefixes are tokens that a model is asked with, no weights that could be merged. Train a LoRA, "
            "or without export_dir and save the adapter."
        )
    if not hasattr(model, "merge_and_unload"):
        return
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for path, module in model.named_modules(remove_duplicate=False):
        adapted = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        for parameter in () if adapted is None else adapted.parameters(recurse=False):
            others = [name for name in names[id(parameter)] if not name.startswith(f"{path}.")]
            if others:
                raise Refusal(
                    f"export: the adapter on '{path}' cannot be merged: its weight is '{others[0]}' too, which would change with "
                    f"it. Leave '{path.rpartition('.')[2]}' out of the adapter's targets and modules to save, or untie the two."
                )


@torch.no_grad()
def _check_merged(trained: nn.Module, merged: nn.Module) -> None:
    """Refuse to write a model that computes something else than the one that was trained. Merging into rounded weights may."""
    if getattr(trained, "is_quantized", False):
        return
    asked = probe_inputs(merged.config)
    with evaluating(trained), evaluating(merged):
        given = {name: tensor.to(next(trained.parameters()).device) for name, tensor in asked.items()}
        wanted, found = first_output(trained(**given)).cpu(), first_output(merged(**asked))
    difference, largest = (wanted - found).abs().max(), wanted.abs().max()
    if not difference <= MERGED[merged.dtype.itemsize] * largest:
        raise Refusal(
            f"export: with its adapters merged the model computes something else than it was trained to (largest difference "
            f"{difference:.2g} of {largest:.2g}). Checkpoints are kept: load one and save its adapter with save_pretrained."
        )


def without_adapters(model: nn.Module, source: Path | None, dtype: torch.dtype | None) -> nn.Module:
    """A copy with its adapters merged, into the weights of `source` where its own are quantized; a model without any as it is.

    Raises:
        Refusal: quantized weights, and no whole ones to merge into.
    """
    adapted = hasattr(model, "merge_and_unload")
    if not getattr(model, "is_quantized", False):
        return copy_on_cpu(model).merge_and_unload() if adapted else model
    if source is None or not adapted:
        what = "no folder of the student is known" if source is None else "it has no adapters"
        raise Refusal(
            f"export: the model is quantized and {what}, so there are no whole weights to write. Give source."
        )
    return merged_into_stored(source, dtype or torch.float32, model)


def copy_on_cpu(model: nn.Module) -> nn.Module:
    """A deep copy that takes nothing of a device's memory."""
    tensors = [*model.parameters(), *model.buffers()]
    with torch.no_grad():
        return copy.deepcopy(model, {id(tensor): _on_cpu(tensor) for tensor in tensors})


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    copied = tensor.detach().to("cpu", copy=True)
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def cast(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Floating-point tensors in another dtype; those that were one tensor under several names still are."""
    made: dict[tuple, torch.Tensor] = {}
    for tensor in state.values():
        key = tensor.data_ptr(), tensor.shape
        if key not in made:
            made[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return {name: made[tensor.data_ptr(), tensor.shape] for name, tensor in state.items()}


@torch.no_grad()
def round_to(model: nn.Module, dtype: torch.dtype) -> None:
    """The values that a checkpoint in `dtype` will hold, so that what is evaluated is what is written."""
    for tensor in model.parameters():
        tensor.copy_(tensor.to(dtype))


def _correct_config(path: Path, dtype: torch.dtype | None) -> None:
    config = read_json(path)
    config["use_cache"] = True
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
