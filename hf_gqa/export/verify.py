"""Check a student on disk against its own manifest, in a process without hf_gqa, and against its donor."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..convert import fresh_process
from ..convert.bundle_code import foreign_code
from ..convert.cache_bytes import cached_heads_of
from ..convert.donor import Donor
from ..convert.families import family_of, is_encoder
from ..convert.manifest import MANIFEST_FILE, Manifest, comes_from
from ..convert.plan import ConversionPlan
from ..convert.surgery import layer_heads
from ..reading import read_json
from ..refusal import Refusal
from ..runtime.layer_plan import LayerPlan
from ..weights.attention_weights import AttentionWeights
from ..weights.head_tensors import write_heads
from .heads_oracle import put_converted_heads, put_fitted_borrowers
from .sharing_oracle import share_layers


NOT_RUN = "Not run; read it, then use --trust-remote-code, or hf-gqa refresh if an older hf_gqa wrote it"
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}
# Of steps from the cache against one forward: sums are taken in another order, which experts' routing makes more of.
CACHED_TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2, "float16": 1e-2}


class CheckFailed(Refusal):
    """The student is not what it says it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at: passed, failed, or (None) not looked at and why."""

    name: str
    passed: bool | None
    detail: str

    def to_dict(self) -> dict:
        return asdict(self)


def verify(
    output: str | Path, donor: Donor | None = None, *, dtype: str = "float32", trust_remote_code: bool = False
) -> list[Check]:
    """Load the student in a fresh process where hf_gqa cannot be imported, and compare it with what was asked for.

    Args:
        output: folder of a student.
        donor: what it was converted from; then its logits are compared with those of the donor whose KV heads are
            overwritten by what the method makes of each group (a student must compute the same).
        dtype: to compute in; float32 compares most sharply.
        trust_remote_code: run the bundle's code even if it is not byte for byte the code of this hf_gqa.

    Raises:
        Refusal: no folder, no manifest, or an unknown dtype.
    """
    folder = Path(output).expanduser()
    if dtype not in TOLERANCE:
        raise Refusal(f"dtype = {dtype!r} is unknown. Use one of {', '.join(TOLERANCE)}.")
    if not folder.is_dir():
        raise Refusal(f"{folder}: no such folder. Give a folder that hf-gqa convert wrote.")
    manifest = Manifest.read(folder)
    checks = []
    if manifest.export == "bundle":
        checks.append(_check_code(folder, trust_remote_code))
        if not checks[0].passed:
            return checks
    with tempfile.TemporaryDirectory() as scratch:
        logits_file = Path(scratch) / "logits.safetensors"
        found, error = _load_in_fresh_process(folder, manifest, dtype, logits_file, Path(scratch))
        if error:
            return [*checks, Check(name="loads without hf_gqa", passed=False, detail=error)]
        checks += _check_loaded(found, manifest, CACHED_TOLERANCE[dtype])
        if donor is None:
            checks.append(Check(name="equals the donor's merged heads", passed=None, detail="no donor was given"))
        else:
            checks.append(_check_donor(donor, manifest))
            if checks[-1].passed:
                checks.append(_check_oracle(donor, folder, manifest, dtype, load_file(logits_file)["logits"]))
    return checks


def _check_code(folder: Path, trust_remote_code: bool) -> Check:
    name = "code is this hf_gqa's, byte for byte"
    try:
        different = foreign_code(folder, read_json(folder / "config.json"))
    except (OSError, ValueError, AttributeError) as error:
        return Check(name=name, passed=False, detail=f"config.json cannot be read ({error})")
    if not different:
        return Check(name=name, passed=True, detail="every file that would be executed")
    detail = f"differs: {', '.join(different)}"
    if trust_remote_code:
        return Check(name=name, passed=True, detail=f"{detail}; run all the same, as asked")
    return Check(name=name, passed=False, detail=f"{detail}. {NOT_RUN}")


def _load_in_fresh_process(folder: Path, manifest: Manifest, dtype: str, logits_file: Path, scratch: Path):
    """What the process found, or None and the last line of its complaint."""
    arguments = {
        "folder": str(folder.resolve()),
        "trust_remote_code": manifest.export == "bundle",
        "dtype": dtype,
        "model_class": manifest.model_class,
        "logits_file": str(logits_file),
        "key_weights": _key_weights(manifest),
    }
    run = subprocess.run(
        [sys.executable, "-I", fresh_process.__file__, json.dumps(arguments)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")},
        cwd=scratch,
        stdin=subprocess.DEVNULL,  # no question can be answered on the user's behalf
        capture_output=True,
        text=True,
    )
    if run.returncode:
        lines = run.stderr.strip().splitlines()
        return None, lines[-1] if lines else f"the process ended with {run.returncode}"
    return json.loads(run.stdout.strip().splitlines()[-1]), None


def _key_weights(manifest: Manifest) -> list[str] | None:
    """Of an encoder: where its keys' weights are, layer by layer."""
    family = family_of(manifest.donor["model_type"], MANIFEST_FILE)
    layout = family.bundle_layout if manifest.export == "bundle" else family.donor_layout
    if not layout.bidirectional:
        return None
    layers = range(len(manifest.layer_plan))
    return [
        f"{layout.attention.format(layer_idx=layer_idx)}.{layout.fused or layout.key}.weight" for layer_idx in layers
    ]


def _check_loaded(found: dict, manifest: Manifest, allowed: float) -> list[Check]:
    wrong_keys = {kind: found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if found[kind]}
    encoder = is_encoder(manifest.donor["model_type"])
    rows = [LayerPlan.from_dict(row) for row in manifest.layer_plan]
    wanted = [row.num_key_value_heads for row in rows] if encoder else cached_heads_of(rows)
    seen, planned = map(_without_places, (found["heads"], wanted[: found["cached_attentions"]]))
    checks = [
        Check(
            name="loads without hf_gqa",
            passed=found["class"] == manifest.model_class,
            detail=f"{found['class']}, expected {manifest.model_class}",
        ),
        Check(
            name="no missing or unexpected tensors",
            passed=not wrong_keys,
            detail="; ".join(f"{kind}: {', '.join(keys[:3])}" for kind, keys in wrong_keys.items())
            or "every key matched",
        ),
        Check(
            name=f"KV heads per layer, seen in the {'weights' if encoder else 'cache'}, equal the plan",
            passed=seen == planned,
            detail=f"{seen}, planned {planned}",
        ),
        Check(name="output is finite", passed=found["finite"], detail="2 x 24 tokens, one row left-padded"),
    ]
    if found["generated_tokens"] is not None:
        done = found["generated_tokens"]
        checks.append(Check(name="generates", passed=done == 4, detail=f"{done} of 4 tokens"))
    checks += [_check_cached_steps(*step, allowed) for step in found["cached_steps"].items()]
    return checks


def _check_cached_steps(attention: str, difference: float | str, allowed: float) -> Check:
    name = f"decoding from the cache equals one forward, attention {attention}"
    if isinstance(difference, str):
        return Check(name=name, passed=None, detail=difference)
    detail = f"largest difference {difference:.2g} of the largest logit, allowed {allowed:.2g}"
    return Check(name=name, passed=difference <= allowed, detail=detail)


def _without_places(cached: list) -> list[int | str]:
    """KV heads that each layer caches; a layer that keeps one of keys and values keeps it in the place of keys."""
    pairs = [pair if isinstance(pair, list | tuple) else (pair, pair) for pair in cached]
    return [pair[0] if pair[0] == pair[1] else f"{max(pair)} of one" for pair in pairs]


def _check_donor(donor: Donor, manifest: Manifest) -> Check:
    name, same = "donor is the one in the manifest", comes_from(manifest, donor)
    if manifest.donor["revision"] is not None or donor.revision is not None:
        detail = f"revision {donor.revision}, manifest {manifest.donor['revision']}"
    else:
        detail = "weights have the same SHA-256" if same else "weights have another SHA-256"
    return Check(name=name, passed=same, detail=detail)


def _check_oracle(donor: Donor, folder: Path, manifest: Manifest, dtype: str, student_logits: torch.Tensor) -> Check:
    name = "equals the donor's merged heads"
    if manifest.uptraining is not None:
        return Check(name=name, passed=None, detail="trained since its conversion, so its values are its own")
    plan = ConversionPlan.from_dict(manifest.plan)
    rows = [LayerPlan.from_dict(row) for row in manifest.layer_plan]
    heads = [row.num_key_value_heads for row in rows]
    merged_slowly = plan.method in (("mean_pool",), ("first",), ("expand",)) or heads == donor.num_key_value_heads
    if not merged_slowly and any(row.borrows_states or row.parameters_from is not None for row in rows):
        return Check(name=name, passed=None, detail=f"no oracle for layers that share by {','.join(plan.method)}")
    model = donor.model_class.from_pretrained(
        donor.folder, config=donor.model_config, dtype=getattr(torch, dtype)
    ).eval()
    try:
        fitted = ", borrowers as they were fitted" if plan.shared_init == "fit" else ""
        whose = fitted if merged_slowly else f", {put_converted_heads(model, donor, folder, manifest)}"
    except Refusal as refusal:
        return Check(name=name, passed=None, detail=f"the student's heads cannot be read: {refusal}")
    if merged_slowly:
        _merge_slowly(model, donor, plan, rows, folder)
    oracle = _logits(model)
    if oracle.shape != student_logits.shape:
        detail = f"the student predicts {student_logits.shape[-1]:,} tokens, the donor {oracle.shape[-1]:,}: it was resized since"
        return Check(name=name, passed=False, detail=detail)
    mask = fresh_process.probe(donor.config.vocab_size)[1].bool()
    if donor.layout.cross_attention is not None:  # what is padded there is what the encoder reads
        mask = torch.ones_like(mask)
    difference = (oracle - student_logits)[mask].abs().max().item()
    allowed = TOLERANCE[dtype] * max(1.0, oracle[mask].abs().max().item())
    return Check(
        name=name,
        passed=difference <= allowed,
        detail=f"largest difference {difference:.2g}, allowed {allowed:.2g} ({dtype}){whose}",
    )


@torch.no_grad()
def _merge_slowly(
    model: PreTrainedModel, donor: Donor, plan: ConversionPlan, rows: list[LayerPlan], folder: Path
) -> None:
    """In place: the donor's KV heads are overwritten by what each group becomes, fitted borrowers' by the student's."""
    base = model.base_model
    for layer_idx, heads in layer_heads(donor):
        wanted = rows[layer_idx].num_key_value_heads
        if wanted < heads.num_key_value_heads:
            written = write_heads(donor.layout, _merged_in_place(heads, wanted, plan.head_count_method))
            attention = base.get_submodule(donor.sites[layer_idx].path)
            for name, tensor in written.items():
                attention.get_parameter(name).copy_(tensor)
    if plan.shared_init == "fit":
        put_fitted_borrowers(model, donor, folder, rows)
    if any(row.borrows for row in rows):
        share_layers(model, donor.layout, rows, donor.head_dim, plan.shared_init)


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    output = fresh_process.body(model)(**fresh_process.probe_inputs(model.config), use_cache=False)
    return (output.logits if "logits" in output else output.last_hidden_state).float()


def _merged_in_place(heads: AttentionWeights, groups: int, method: str) -> AttentionWeights:
    """Each group's members all overwritten by what the group becomes; the number of KV heads stays. Deliberately slow."""
    members = heads.num_key_value_heads // groups

    def merge(tensor_K: torch.Tensor) -> torch.Tensor:
        merged = tensor_K.clone()
        for start in range(0, len(tensor_K), members):
            group = tensor_K[start : start + members]
            merged[start : start + members] = group.float().mean(0) if method == "mean_pool" else group[0]
        return merged

    return heads.map_key_value(merge)
