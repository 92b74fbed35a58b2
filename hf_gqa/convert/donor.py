"""Open a donor: a folder, a repository on the Hub, or a model in memory; refuse what we would have to guess about."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..refusal import Refusal
from ..runtime.attention_layout import AttentionLayout
from ..weights.checkpoint import FLOAT_DTYPES, Checkpoint, StateDict
from .families import Family, family_of


CARRIED_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.tiktoken", "spiece.model",
    "generation_config.json", "chat_template*", "additional_chat_templates/*", "preprocessor_config.json",
    "processor_config.json", "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
WEIGHT_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
REBUILT_BUFFERS = r"rotary_emb\.inv_freq$"


@dataclass(frozen=True, slots=True, kw_only=True)
class Donor:
    """A donor whose configuration and tensors have been checked against each other.

    Args:
        name: what the user called it: the repository, the folder's name, or the model's own name.
        folder: where its files are; None for a model in memory.
        revision: the commit on the Hub, if it came from there.
        raw_config: `config.json` as it is on disk; None for a model in memory.
        model_class: the native or own class that its tensors belong to.
        tensors: where its tensors come from.
        dropped: names of tensors that the class rebuilds itself and that are not carried along.
    """

    name: str
    folder: Path | None
    revision: str | None
    config: PretrainedConfig
    raw_config: dict | None
    family: Family
    layout: AttentionLayout
    model_class: type[PreTrainedModel]
    tensors: Checkpoint | StateDict
    dropped: frozenset[str]

    @property
    def num_attention_heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        if self.layout.key_value_heads_field is None:
            return self.num_attention_heads
        return getattr(self.config, self.layout.key_value_heads_field)

    @property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.num_attention_heads


def open_donor(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    weights_only: bool = False,
    trust_remote_code: bool = False,
) -> Donor:
    """Open a folder or a Hub repository; nothing in it is executed unless `trust_remote_code`.

    Args:
        weights_only: convert a donor that ships its own code as the native class of its `model_type`, unexecuted.
        trust_remote_code: the same, after the donor's code has run once and computed what the native class computes.

    Raises:
        Refusal: anything missing, unreadable, contradictory, quantized, pickled, or of an unknown family.
    """
    folder, commit = _locate(str(name_or_path), revision)
    name = folder.name if commit is None else str(name_or_path)
    raw = _read_config(folder / "config.json")
    family = family_of(raw.get("model_type"), str(folder / "config.json"))
    ships_code = "auto_map" in raw and raw["model_type"] == family.model_type
    if ships_code and not (weights_only or trust_remote_code):
        raise Refusal(
            f"{folder / 'config.json'}: 'auto_map' names code of the donor's own ({_first_value(raw['auto_map'])}), which "
            f"may compute something else than the native '{family.model_type}'. Use --weights-only to convert its tensors "
            f"as native without running that code, or --trust-remote-code to run it once and compare first."
        )
    config = _parse_config({key: value for key, value in raw.items() if key != "auto_map"}, folder / "config.json")
    model_class = _model_class(raw.get("architectures"), config, family, folder, lenient=ships_code)
    donor = _checked_donor(name, folder, commit, config, raw, family, model_class, Checkpoint(folder))
    if ships_code and trust_remote_code:
        _compare_with_own_code(donor)
    return donor


def donor_from_model(model: PreTrainedModel) -> Donor:
    """Take a model in memory as donor; it is read, never changed.

    Raises:
        Refusal: not a plain transformers model, quantized, without values, or of an unknown family.
    """
    if not isinstance(model, PreTrainedModel):
        raise Refusal(
            f"convert: got {type(model).__module__}.{type(model).__name__}, which is not a transformers model. "
            f"Unwrap it first (model.module for DDP, model.merge_and_unload() for PEFT)."
        )
    where = getattr(model.config, "_name_or_path", None) or type(model).__name__
    family = family_of(model.config.model_type, where)
    if getattr(model.config, "quantization_config", None) is not None:
        raise Refusal(_quantized(where))
    state = model.state_dict()
    empty = [name for name, tensor in state.items() if tensor.is_meta]
    if empty:
        raise Refusal(f"{where}: '{empty[0]}' is on the meta device and has no values. Load the model first.")
    native = getattr(transformers, type(model).__name__, None)
    if type(model) not in (native, family.base_class, family.causal_lm_class):
        raise Refusal(
            f"{where}: {type(model).__name__} is not a class of transformers or of hf_gqa; its code may compute something "
            f"else. Load the checkpoint with the native class of '{family.model_type}'."
        )
    return _checked_donor(where, None, None, model.config, None, family, type(model), StateDict(state))


def _locate(name_or_path: str, revision: str | None) -> tuple[Path, str | None]:
    """The folder of a donor, and the commit if it came from the Hub."""
    path = Path(name_or_path).expanduser()
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
            snapshot_download(name_or_path, revision=revision, allow_patterns=[*WEIGHT_FILES, *CARRIED_FILES, "*.py"])
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Refusal(
            f"{name_or_path}: neither a folder here nor a repository that could be fetched ({type(error).__name__}: "
            f"{reason}). Check the spelling, your access, and HF_HUB_OFFLINE."
        ) from None
    return folder, folder.name


def _read_config(path: Path) -> dict:
    if not path.is_file():
        raise Refusal(f"{path}: missing. Give a folder written by save_pretrained, or a repository of such files.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refusal(f"{path}: not JSON ({error}). Download the donor again.") from None
    if not isinstance(raw, dict):
        raise Refusal(f"{path}: holds {type(raw).__name__}, expected an object. Download the donor again.")
    if raw.get("quantization_config"):
        raise Refusal(_quantized(str(path)))
    return raw


def _quantized(where: str) -> str:
    return (
        f"{where}: the donor is quantized ('quantization_config' is set), and quantized heads cannot be merged. "
        f"Convert the original weights, then quantize the student."
    )


def _parse_config(raw: dict, path: Path) -> PretrainedConfig:
    try:
        return CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    except Exception as error:  # whatever the native class raises on values it cannot take
        reason = " ".join(str(error).split())
        raise Refusal(f"{path}: transformers does not accept it ({reason}). Correct the configuration.") from None


def _model_class(architectures, config, family: Family, folder: Path, lenient: bool) -> type[PreTrainedModel]:
    if config.model_type != family.model_type:
        native = {c.__name__: c for c in (family.base_class, family.causal_lm_class)}
        default = family.causal_lm_class
    else:
        native = vars(transformers) if not architectures else {a: getattr(transformers, a, None) for a in architectures}
        default = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    name = (architectures or [default.__name__])[0]
    found = native.get(name)
    if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is type(config):
        return found
    if lenient:
        return default
    raise Refusal(
        f"{folder / 'config.json'}: architectures = {architectures} is not a class of transformers for "
        f"'{config.model_type}'. Expected one like {default.__name__}."
    )


def _checked_donor(name, folder, revision, config, raw, family, model_class, tensors) -> Donor:
    where = str(folder or name)
    stored = {tensor for names in tensors.shards.values() for tensor in names}
    with torch.device("meta"):
        model = model_class(config)
    prefix = f"{family.donor_layout.base_model_prefix}."

    def bare(tensor: str) -> str:
        return tensor.removeprefix(prefix)

    expected = {bare(tensor): tuple(value.shape) for tensor, value in model.state_dict().items()}
    by_bare_name = {bare(tensor): tensor for tensor in stored}
    rebuilt = [REBUILT_BUFFERS, *(model_class._keys_to_ignore_on_load_unexpected or ())]
    extra = sorted(set(by_bare_name) - set(expected))
    dropped = frozenset(by_bare_name[t] for t in extra if any(re.search(pattern, t) for pattern in rebuilt))
    unknown = [tensor for tensor in extra if by_bare_name[tensor] not in dropped]
    if unknown:
        raise Refusal(
            f"{where}: '{by_bare_name[unknown[0]]}' is no tensor of {model_class.__name__} ({len(unknown)} such tensors). "
            f"Load the donor with its own class and save it again, so that only its tensors remain."
        )
    tied = {bare(target) for target in (getattr(model, "all_tied_weights_keys", None) or {})}
    missing = sorted(set(expected) - set(by_bare_name) - tied)
    if missing:
        raise Refusal(
            f"{where}: '{missing[0]}' of {model_class.__name__} is missing ({len(missing)} such tensors). "
            f"Download the donor again."
        )
    for tensor, shape in expected.items():
        stored_name = by_bare_name.get(tensor)
        if stored_name is None:
            continue
        if tensors.shape(stored_name) != shape:
            raise Refusal(
                f"{where}: '{stored_name}' has shape {list(tensors.shape(stored_name))}, but its configuration says "
                f"{list(shape)}. Weights and config.json are not of the same model: download both again."
            )
        if tensors.dtype(stored_name) not in FLOAT_DTYPES.values():
            raise Refusal(
                f"{where}: '{stored_name}' is stored as {tensors.dtype(stored_name)}, which looks quantized. "
                f"Convert the original weights (F64, F32, F16 or BF16)."
            )
    return Donor(
        name=name,
        folder=folder,
        revision=revision,
        config=config,
        raw_config=raw,
        family=family,
        layout=family.layout_of(config.model_type),
        model_class=model_class,
        tensors=tensors,
        dropped=dropped,
    )


def _first_value(mapping) -> str:
    return next(iter(mapping.values()), "nothing") if isinstance(mapping, dict) else repr(mapping)


@torch.no_grad()
def _compare_with_own_code(donor: Donor) -> None:
    """Run the donor's own code on a few tokens; refuse unless it computes what the native class computes."""
    auto_class = transformers.AutoModelForCausalLM
    tokens = torch.arange(16).remainder(donor.config.vocab_size).unsqueeze(0)
    logits = []
    for load in (
        lambda: auto_class.from_pretrained(donor.folder, trust_remote_code=True, dtype=torch.float32),
        lambda: donor.model_class.from_pretrained(donor.folder, config=donor.config, dtype=torch.float32),
    ):
        logits.append(load().eval()(tokens).logits)
    difference = (logits[0] - logits[1]).abs().max().item()
    scale = logits[1].abs().max().item()
    if not difference <= 1e-4 * scale:
        raise Refusal(
            f"{donor.folder}: its own code computes other logits than the native {donor.model_class.__name__} (largest "
            f"difference {difference:.3g}, logits up to {scale:.3g}). It cannot be converted as '{donor.family.model_type}'."
        )
