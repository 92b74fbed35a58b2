"""The licence of a student: what its donor states, and nothing that its donor does not state."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from ..convert.manifest import Manifest
from ..reading import read_json
from ..refusal import Refusal
from ..staging import file_sha256


LICENCE_FILE = "licence.json"
STATED = "copied from the donor's card"
TEXTS = ("LICENSE*", "LICENCE*", "COPYING*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Licence:
    """What the metadata of a card says of the licence, and where that is from.

    Args:
        license, license_name, license_link: as in the metadata of cards on the Hub; None where nothing is stated.
        source: in words.
    """

    license: str | None
    license_name: str | None
    license_link: str | None
    source: str


def find_licence(student: Path) -> Licence:
    """As an earlier card copied it from the donor's, else from the licence file that the student carries."""
    kept = student / "evaluation" / LICENCE_FILE
    if kept.is_file():
        return _read(kept)
    texts = sorted(path.name for pattern in TEXTS for path in student.glob(pattern) if path.is_file())
    if texts:
        return Licence(
            license="other",
            license_name="license-of-the-donor",
            license_link=texts[0],
            source=f"the donor's own text, carried along in {' and '.join(texts)}",
        )
    source = "the donor states none that is known here, so none is claimed"
    return Licence(license=None, license_name=None, license_link=None, source=source)


def licence_of_donor(donor: str, student: Path) -> Licence:
    """As the metadata of the donor's card states it; if it states none, as `find_licence`.

    Args:
        donor: folder or Hub repository.

    Raises:
        Refusal: not the donor that the student's manifest names, or a card that cannot be read.
    """
    card = _donor_card(donor, Manifest.read(student).donor)
    if card is None:
        return find_licence(student)
    try:
        data = ModelCard(card.read_text(encoding="utf-8")).data.to_dict()
    except Exception as error:  # of YAML, of decoding, of the metadata's own checks
        reason = " ".join(str(error).split())[:200]
        raise Refusal(f"{card}: its metadata cannot be read ({reason}). Correct it, or leave --donor out.") from None
    if not isinstance(data.get("license"), str):
        return find_licence(student)
    return Licence(
        license=data["license"],
        license_name=data.get("license_name"),
        license_link=data.get("license_link"),
        source=STATED,
    )


def write_licence(licence: Licence, folder: Path) -> None:
    """What the donor's card states, so that the student's can be made and checked again where the donor is not at hand."""
    if licence.source != STATED:
        return
    (folder / LICENCE_FILE).write_text(json.dumps(asdict(licence), indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> Licence:
    known = {field.name for field in fields(Licence)}
    values = read_json(path, "Remove it, then give --donor.")
    try:
        if set(values) != known or not all(value is None or isinstance(value, str) for value in values.values()):
            raise ValueError(f"expected text under {', '.join(sorted(known))}")
    except (ValueError, TypeError) as error:
        raise Refusal(
            f"{path}: not a licence as hf-gqa card writes it ({error}). Remove it, then give --donor."
        ) from None
    return Licence(**values)


def _donor_card(donor: str, recorded: dict) -> Path | None:
    """The donor's README.md; None if it has none."""
    folder = Path(donor).expanduser()
    if folder.is_dir():
        _check_same(folder, recorded)
        return folder / "README.md" if (folder / "README.md").is_file() else None
    if recorded["revision"] is None or recorded.get("name") != donor:
        raise Refusal(f"{donor}: not the donor in the manifest, '{recorded.get('name')}'. Give that one.")
    try:
        return Path(hf_hub_download(donor, "README.md", revision=recorded["revision"]))
    except (HfHubHTTPError, OSError, ValueError) as error:
        if getattr(getattr(error, "response", None), "status_code", None) == 404:
            return None
        raise Refusal(
            f"{donor}: its card could not be fetched ({type(error).__name__}). Check HF_HUB_OFFLINE and your access, or "
            f"leave --donor out."
        ) from None


def _check_same(folder: Path, recorded: dict) -> None:
    hashes = recorded["weights_sha256"]
    if hashes is None:
        same = folder.resolve().name == recorded["revision"]  # a snapshot in the Hub's cache
    else:
        same = all((folder / file).is_file() and file_sha256(folder / file) == sha for file, sha in hashes.items())
    if not same:
        raise Refusal(
            f"{folder}: not the donor in the manifest, its weights are others. Give the donor of this student."
        )
