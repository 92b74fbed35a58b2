"""Where a donor's files are, and which of them go along with its weights."""

import os
import shutil
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..reading import read_json
from ..refusal import Refusal


# What tokenizers, processors, generation and sentence-transformers read beside the weights; and what the law asks for.
TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.tiktoken", "*.model", "*.spm",
    "target_vocab.json", "normalizer.json", "tekken.json", "bpe.codes", "*vocab.json",
)  # fmt: skip
CARRIED_FILES = (
    *TOKENIZER_FILES, "generation_config.json", "chat_template*", "additional_chat_templates/*", "*preprocessor_config.json",
    "processor_config.json", "modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]_*/*",
    "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
MODULE_WEIGHTS = "[0-9]_*/model.safetensors"  # of a module that sentence-transformers runs after the model
NEVER_CARRIED = (".py", ".bin", ".pt", ".pth", ".pkl", ".safetensors")  # code, pickles, weights of what is converted
ADAPTER_FILE = "adapter_config.json"
WEIGHT_FILES = (
    "config.json", ADAPTER_FILE, "model.safetensors", "model.safetensors.index.json", "model-*.safetensors", "conversion_manifest.json",
)  # fmt: skip


def carry_files(folder: Path, destination: Path) -> None:
    """Copy what goes with a donor's weights into its student: tokenizer, generation settings, licence."""
    for source in sorted({path for pattern in CARRIED_FILES for path in folder.glob(pattern)}):
        if is_carried(folder, source):
            copy = destination / source.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, copy)


def is_carried(folder: Path, path: Path) -> bool:
    relative = path.relative_to(folder)
    if not path.is_file() or not any(matches(relative, pattern) for pattern in CARRIED_FILES):
        return False
    return path.suffix not in NEVER_CARRIED or matches(relative, MODULE_WEIGHTS)


def matches(relative: Path, pattern: str) -> bool:
    """Whether a path below a folder is what a pattern means, which does not look into further folders."""
    return fnmatchcase(relative.as_posix(), pattern) and relative.as_posix().count("/") == pattern.count("/")


def left_behind(folder: Path, weights: Collection[str]) -> list[str]:
    """Files and folders of a donor that no student gets, but for what tells of the donor itself.

    Args:
        weights: files that are converted.
    """
    told = {"config.json", "model.safetensors.index.json", "README.md", "conversion_manifest.json", *weights}
    found = []
    for path in sorted(folder.iterdir()):
        if path.name in told or path.name.startswith("."):
            continue
        inside = [inner for inner in path.rglob("*") if inner.is_file()] if path.is_dir() else [path]
        if not all(is_carried(folder, inner) for inner in inside):
            found.append(path.name)
    return found


def check_no_adapter(folder: Path) -> None:
    """Refuse an adapter: transformers would load it onto the weights, and what converts reads the weights alone."""
    path = folder / ADAPTER_FILE
    if not path.is_file():
        return
    adapter = read_json(path)
    base = adapter.get("base_model_name_or_path") if isinstance(adapter, dict) else None
    raise Refusal(
        f"{path}: here is an adapter (peft), which transformers loads onto the weights and a conversion would leave out. "
        f"Merge it first, then convert the result: "
        f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base or 'BASE'!r}), {str(folder)!r})"
        f".merge_and_unload().save_pretrained('merged'); or remove it from the folder."
    )


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
