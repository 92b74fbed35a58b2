"""Convert a donor on disk into a student on disk, shard by shard."""

import errno
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..convert.calibration import Calibration, calibrated, text_record
from ..convert.donor import Donor, open_donor
from ..convert.donor_folder import carry_files
from ..convert.manifest import Manifest, make_manifest
from ..convert.plan import ConversionPlan, make_plan
from ..convert.surgery import converted_shards, head_bytes
from ..convert.target import Target, choose_target
from ..progress_bar import progress_bar
from ..staging import check_output, file_sha256, flush, staged_folder
from ..weights.checkpoint import INDEX_FILE, SINGLE_FILE
from .explanation import explain, facts
from .json_members import read_text, with_inner_members, with_members, without_members


WAITING = ".converted-layers"


def convert_checkpoint(
    donor: str | Path | Donor,
    output: str | Path,
    plan: ConversionPlan | None = None,
    *,
    calibration: Calibration | torch.Tensor | None = None,
    choice: dict | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    weights_only: bool = False,
    trust_remote_code: bool = False,
    **plan_fields,
) -> Manifest:
    """Convert a folder or a Hub repository into the folder `output`, holding about one shard of changed tensors.

    With rows of text, it holds one layer of the donor and the text's hidden states (of families that `why_loaded_whole`
    names none of; the others are loaded whole).

    The student has the tensors that `convert` gives in memory, bit for bit, in the donor's shards, with the donor's
    tokenizer, generation configuration, chat template and licence files beside them.

    Args:
        donor: folder, repository, or a donor opened with `open_donor`.
        output: folder to write; it appears complete or not at all.
        plan: what the student shall be; or give its fields, as in `num_key_value_heads=2`.
        calibration: rows of token ids `[N, L]` that methods may look at the donor with, or a calibration made of them;
            without it they go by the weights alone.
        choice: how the plan was found, for the manifest.
        overwrite: replace `output` if it holds a model.
        revision, weights_only, trust_remote_code: as for `open_donor`.

    Returns:
        The manifest written into `output`.

    Raises:
        Refusal: bad input; nothing is written.
        OSError: the disk failed or is full; nothing is left behind.
    """
    plan = make_plan(plan, plan_fields)
    output = Path(output).expanduser()
    if not isinstance(donor, Donor):
        check_output(output, overwrite, None)
        donor = open_donor(donor, revision=revision, weights_only=weights_only, trust_remote_code=trust_remote_code)
    check_output(output, overwrite, donor.folder)
    target = choose_target(donor, plan)
    waiting_bytes = 0 if calibration is None else head_bytes(donor)
    _check_space(output, explain(donor, plan, target).after["weight_bytes"] + waiting_bytes)
    with staged_folder(output, overwrite) as staging, ThreadPoolExecutor(2) as pool:
        known = calibrated(donor, plan, target, calibration, scratch=staging / WAITING)
        hashes = None
        if donor.revision is None:
            hashes = {file: pool.submit(file_sha256, donor.folder / file) for file in donor.tensors.shards}
        try:
            _write_weights(donor, plan, target, known, staging, pool)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        if (staging / WAITING).exists():
            shutil.rmtree(staging / WAITING)
        _write_config(donor, target, staging)
        carry_files(donor.folder, staging)
        found = hashes and {file: future.result() for file, future in hashes.items()}
        manifest = make_manifest(donor, plan, target, found, text_record(calibration), choice)
        manifest.write(staging)
    return manifest


def _check_space(output: Path, needed_bytes: int) -> None:
    existing = next(path for path in (output.resolve(), *output.resolve().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"needs {needed_bytes:,} bytes, {free_bytes:,} are free. Nothing was written: make room, or write elsewhere",
            str(output),
        )


def _write_weights(
    donor: Donor, plan: ConversionPlan, target: Target, known: dict, staging: Path, pool: ThreadPoolExecutor
) -> None:
    total_bytes = total_parameters = 0
    weight_map, flushed = {}, []
    for file, tensors in _converted_shards_with_bar(donor, plan, target, known):
        try:
            save_file(tensors, staging / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(
                errno.EIO, f"writing failed ({error}). Nothing was left behind", str(staging / file)
            ) from None
        flushed.append(pool.submit(flush, staging / file))  # while the next shard is converted
        total_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        total_parameters += sum(tensor.numel() for tensor in tensors.values())
        weight_map.update(dict.fromkeys(tensors, file))
    for future in flushed:
        future.result()
    if set(weight_map.values()) != {SINGLE_FILE}:
        metadata = {"total_parameters": total_parameters, "total_size": total_bytes}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (staging / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _converted_shards_with_bar(donor: Donor, plan: ConversionPlan, target: Target, known: dict) -> Iterator:
    """With a bar on terminals, unless Hugging Face's own bars are switched off."""
    total_bytes = facts(donor)["weight_bytes"]
    with progress_bar("Converting", total_bytes, "B", unit_scale=True) as bar:
        yield from converted_shards(donor, plan, target, bar.update, **known)


def _write_config(donor: Donor, target: Target, staging: Path) -> None:
    """A native student of the donor's class keeps the donor's `config.json` but for what the plan changes, byte for byte."""
    if target.same_class:
        text = without_members(read_text(donor.folder / "config.json"), ("auto_map", "_name_or_path"))
        if donor.raw_config.get("architectures") != [target.model_class.__name__]:
            text = with_members(text, {"architectures": [target.model_class.__name__]})
        if donor.composite is None:
            text = with_members(text, target.changed_fields)
        else:
            text = with_inner_members(text, "text_config", target.changed_fields)
        (staging / "config.json").write_bytes(text.encode("utf-8"))
    else:
        target.config.architectures = [target.model_class.__name__]
        target.config.save_pretrained(staging)
