"""Where a donor's files are, and which of them go along with its weights."""

import os
import shutil
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..refusal import Refusal


CARRIED_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.tiktoken", "spiece.model",
    "generation_config.json", "chat_template*", "additional_chat_templates/*", "preprocessor_config.json",
    "processor_config.json", "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
WEIGHT_FILES = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors", "conversion_manifest.json",
)  # fmt: skip


def carry_files(folder: Path, destination: Path) -> None:
    """Copy what goes with a donor's weights into its student: tokenizer, generation settings, licence."""
    for pattern in CARRIED_FILES:
        for source in sorted(folder.glob(pattern)):
            if source.is_file() and source.suffix not in (".py", ".safetensors"):
                copy = destination / source.relative_to(folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, copy)


def locate(name_or_path: str, revision: str | None) -> tuple[Path, str | None]:
    """The folder of a donor, and the commit if it came from the Hub."""
    path = Path(os.path.expanduser(name_or_path))
    if path.is_dir() and revision is not None:
        raise Refusal(f"{path}: is a folder, which has no revision '{revision}'. Leave --revision out.")
    if path.is_dir():
        if not any(path.iterdir()):
            raise Refusal(f"{path}: the folder is empty. Give a folder with config.json and safetensors weights.")
        return path, None
    if path.exists():
        raise Refusal(f"{path}: is a file. Give the folder that holds config.json and the weights.")
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise Refusal(f"{path}: no such folder. Give a folder with config.json and safetensors weights.")
    try:
        folder = Path(
            snapshot_download(
                name_or_path,
                revision=revision,
                allow_patterns=[*WEIGHT_FILES, *CARRIED_FILES, "*.py"],
                local_files_only=constants.HF_HUB_OFFLINE,
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Refusal(
            f"{name_or_path}: neither a folder here nor a repository that could be fetched ({type(error).__name__}: "
            f"{reason}). Check the spelling, your access, and HF_HUB_OFFLINE."
        ) from None
    return folder, folder.name
