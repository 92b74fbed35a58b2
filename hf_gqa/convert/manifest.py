"""The record of a conversion that travels with the student, and that `verify` reads."""

import json
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from ..reading import read_json
from ..refusal import Refusal
from ..runtime.layer_plan import LayerPlan
from ..staging import file_sha256
from .bundle_code import runtime_sha256
from .donor import Donor
from .plan import ConversionPlan
from .target import Target


MANIFEST_FILE = "conversion_manifest.json"
FORMAT = 1
LEFT_OUT_IF_NONE = ("code_sha256", "refreshed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What was asked, of which donor, and what came out; exact round trip through JSON.

    Args:
        format: version of this record.
        plan: the plan as JSON.
        layer_plan: one row per layer.
        export: "native" or "bundle".
        reason: why.
        model_class: the student's class.
        donor: name, model_type, model_class, num_attention_heads, num_key_value_heads, and what identifies the weights:
            `revision` (a commit on the Hub) or `weights_sha256` (file name -> hash), the other being None.
        versions: of the libraries that wrote the student.
        calibration: the text that methods looked at, `tokens` and `sha256` of its rows; None if there was none.
        choice: what was tried to find the plan, with its numbers; None if the plan was given.
        uptraining: how the student was trained after its conversion; None if it was not.
        code_sha256: of a bundle: file name -> hash of its code as hf_gqa wrote it; None in those of hf_gqa 0.1.0.
        refreshed: each time the code was renewed: `from` and `to`, the versions of hf_gqa and transformers; None: never.
    """

    format: int
    plan: dict
    layer_plan: list[dict]
    export: str
    reason: str
    model_class: str
    donor: dict
    versions: dict
    calibration: dict | None = None
    uptraining: dict | None = None
    choice: dict | None = None
    code_sha256: dict | None = None
    refreshed: list[dict] | None = None

    def to_dict(self) -> dict:
        """As it is on disk."""
        return {key: value for key, value in asdict(self).items() if not (key in LEFT_OUT_IF_NONE and value is None)}

    def write(self, folder: Path) -> None:
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        path = folder / MANIFEST_FILE
        if not path.is_file():
            raise Refusal(f"{path}: missing, so the folder does not say how it was made. Convert the donor again.")
        known = ", ".join(field.name for field in fields(cls))
        values = read_json(path, "Convert the donor again.")
        try:
            manifest = cls(**values)
        except (ValueError, TypeError) as error:
            raise Refusal(f"{path}: not a manifest ({error}). Expected the keys {known}.") from None
        if manifest.format != FORMAT:
            raise Refusal(
                f"{path}: format = {manifest.format!r}, this hf_gqa reads {FORMAT}. Install the hf_gqa of its maker."
            )
        try:
            manifest._check_values()
        except (ValueError, TypeError) as error:
            raise Refusal(f"{path}: not a manifest ({error}). Convert the donor again.") from None
        return manifest

    def _check_values(self) -> None:
        ConversionPlan.from_dict(self.plan)
        for row in self.layer_plan:
            LayerPlan.from_dict(row)
        if self.export not in ("native", "bundle") or not isinstance(self.model_class, str):
            raise ValueError(f"export = {self.export!r}, model_class = {self.model_class!r}")
        if not isinstance(self.uptraining, dict | None):
            raise ValueError(f"uptraining = {self.uptraining!r}")
        if not isinstance(self.calibration, dict | None):
            raise ValueError(f"calibration = {self.calibration!r}")
        if not isinstance(self.choice, dict | None):
            raise ValueError(f"choice = {self.choice!r}")
        if not isinstance(self.code_sha256, dict | None):
            raise ValueError(f"code_sha256 = {self.code_sha256!r}")
        if not all(isinstance(sha256, str) for sha256 in (self.code_sha256 or {}).values()):
            raise ValueError(f"code_sha256 = {self.code_sha256!r}, expected a text for each file")
        self._check_refreshed()
        if not isinstance(self.donor, dict) or not {"revision", "weights_sha256"} <= self.donor.keys():
            raise ValueError(f"donor = {self.donor!r}")

    def _check_refreshed(self) -> None:
        if not isinstance(self.refreshed, list | None):
            raise ValueError(f"refreshed = {self.refreshed!r}")
        for each in self.refreshed or ():
            known = isinstance(each, dict) and each.keys() == {"from", "to"}
            if not known or not all(isinstance(versions, dict) for versions in each.values()):
                raise ValueError(f"refreshed = {self.refreshed!r}")


def make_manifest(
    donor: Donor,
    plan: ConversionPlan,
    target: Target,
    weights_sha256: dict[str, str] | None,
    calibration: dict | None = None,
    choice: dict | None = None,
) -> Manifest:
    return Manifest(
        format=FORMAT,
        plan=plan.to_dict(),
        layer_plan=[row.to_dict() for row in target.rows],
        export=target.export,
        reason=target.reason,
        model_class=target.model_class.__name__,
        donor={
            "name": donor.name,
            "model_type": donor.config.model_type,
            "model_class": donor.model_class.__name__,
            "num_attention_heads": donor.num_attention_heads,
            "num_key_value_heads": donor.num_key_value_heads,
            "revision": donor.revision,
            "weights_sha256": weights_sha256,
        },
        versions={
            "hf_gqa": version("hf_gqa"),
            "safetensors": version("safetensors"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        calibration=calibration,
        choice=choice,
        code_sha256=runtime_sha256(target.config.model_type) if target.export == "bundle" else None,
    )


def donor_identity(donor: Donor) -> dict:
    """What tells this donor's weights from any others: its commit on the Hub, or the SHA-256 of its files."""
    if donor.revision is not None:
        return {"name": donor.name, "revision": donor.revision}
    return {"weights_sha256": {file: file_sha256(donor.folder / file) for file in donor.tensors.shards}}


def comes_from(manifest: Manifest, donor: Donor) -> bool:
    """Whether this donor's weights are those that the student was converted from."""
    recorded = manifest.donor
    if recorded["revision"] is not None or donor.revision is not None:
        return recorded["revision"] == donor.revision
    return recorded["weights_sha256"] == donor_identity(donor)["weights_sha256"]
