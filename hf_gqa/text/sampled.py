"""Text that the donor itself writes, where there is none to uptrain on."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..evaluating import evaluating
from ..progress_bar import progress_bar
from ..reading import read_json
from ..refusal import Refusal
from ..runtime.native_call import cache_argument
from ..staging import file_sha256, publish_file
from .packing import PACKING_VERSION, rows_with_positions
from .roomy_cache import roomy_cache


SETTINGS_FILE = "corpus.json"
PARTIAL = ".partial"


def sampled_rows(
    donor_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    donor_id: str,
    tokens: int,
    sequence_length: int,
    seed: int,
    temperature: float = 1.0,
    batch_size: int = 32,
) -> Dataset:
    """Rows that the donor samples from its own distribution, kept in `folder`, in the columns of `packed_rows`.

    A row starts with BOS, or EOS, or a random token, whichever the tokenizer has first; an EOS ends a document, and the
    donor goes on. The folder is written shard by shard: a stopped run goes on after its last shard, a later one may
    ask for more tokens, and both get what one run without a stop would.

    Args:
        folder: made if need be; holds `corpus.json` and `shard-00000.safetensors`, ...
        donor_id: what identifies the donor, a hash of its weights.
        tokens: rounded up to rows.
        sequence_length: tokens per row, at least 2.
        temperature: of the softmax; no token is cut off.
        batch_size: rows per shard, sampled together.

    Raises:
        Refusal: a number out of range, or a folder made with other settings.
        OSError: the disk failed or is full; complete shards are kept.
    """
    _check_numbers(tokens=tokens, temperature=temperature, batch_size=batch_size)
    if sequence_length < 2:
        raise Refusal(f"sequence_length = {sequence_length}: a row needs at least 2 tokens. Use 2 or more.")
    if seed < 0:
        raise Refusal(f"seed = {seed}: is negative. Use 0 or more.")
    folder, eos = Path(folder), tokenizer.eos_token_id
    settings = {
        **{"donor_id": donor_id, "seed": seed, "temperature": temperature, "sequence_length": sequence_length},
        **{"vocab_size": donor_model.config.vocab_size, "batch_size": batch_size, "eos_token_id": eos},
        "start_token_id": eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
    }
    _open_folder(folder, settings)
    num_rows = -(-tokens // sequence_length)
    shards = [folder / f"shard-{number:05d}.safetensors" for number in range(-(-num_rows // batch_size))]
    with progress_bar("Sampling", len(shards) * batch_size, "row") as bar:
        for number, shard in enumerate(shards):
            if shard.exists():
                _read_shard(shard, (batch_size, sequence_length))
            else:
                _write(shard, save({"input_ids": _sampled_shard(donor_model, settings, number)}))
            bar.update(batch_size)
    found = tuple((str(shard), file_sha256(shard)) for shard in shards)
    arguments = {"shards": found, "num_rows": num_rows, "settings": settings, "version": PACKING_VERSION}
    return Dataset.from_generator(_generate_rows, gen_kwargs=arguments).with_format("numpy")


def _check_numbers(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 < number < float("inf"):
            raise Refusal(f"{name} = {number}: is not a positive number. Use one.")


def _open_folder(folder: Path, settings: dict) -> None:
    file = folder / SETTINGS_FILE
    if not file.exists():
        if folder.exists() and not (folder.is_dir() and all(path.suffix == PARTIAL for path in folder.iterdir())):
            raise Refusal(f"{folder}: exists and holds no {SETTINGS_FILE}. Give another folder for the sampled text.")
        folder.mkdir(parents=True, exist_ok=True)
        _write(file, (json.dumps(settings, indent=2) + "\n").encode())
        return
    found = read_json(file, "Remove the folder, and sample again.")
    found = found if isinstance(found, dict) else {}
    for name, value in settings.items():
        if found.get(name) != value:
            raise Refusal(
                f"{file}: this text was sampled with {name} = {found.get(name)!r}, now it is {value!r}. Give another "
                f"folder, or the same {name}."
            )


def _write(file: Path, content: bytes) -> None:
    """Complete, or not at all."""
    partial = file.with_name(f".{file.name}{PARTIAL}")
    partial.write_bytes(content)
    publish_file(partial, file)


def _sampled_shard(donor_model: PreTrainedModel, settings: dict, number: int) -> torch.Tensor:
    """Shard `number`, `[batch_size, sequence_length]` int32, whatever was sampled before it."""
    device, start_token_id = donor_model.device, settings["start_token_id"]
    first_seed = int(np.random.PCG64([settings["seed"], number]).random_raw() >> 1)  # torch takes 63 bits
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), _as_plain_sampler(donor_model), torch.no_grad():
        torch.default_generator.manual_seed(first_seed)
        for used in cuda:
            torch.cuda.default_generators[used.index or 0].manual_seed(first_seed)
        shape = (settings["batch_size"], 1)
        start = torch.randint(settings["vocab_size"], shape)
        if start_token_id is not None:
            start = torch.full(shape, start_token_id)
        sampling = GenerationConfig(
            do_sample=True,
            temperature=settings["temperature"],
            top_k=0,
            top_p=1.0,
            max_new_tokens=settings["sequence_length"] - 1,
            use_cache=True,
        )
        start = start.to(device)
        tokens = donor_model.generate(
            start,
            attention_mask=torch.ones_like(start),
            generation_config=sampling,
            **{cache_argument(donor_model.forward): roomy_cache(donor_model.config, settings["sequence_length"])},
        )
    return tokens.to("cpu", torch.int32)


@contextmanager
def _as_plain_sampler(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, and without the defaults of its own, such as top_p, that `generate` would mix in.

    Those include the EOS: rows are to be full, so sampling goes on after one.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with evaluating(model):
            yield
    finally:
        model.generation_config = own


def _generate_rows(
    shards: tuple[tuple[str, str], ...], num_rows: int, settings: dict, version: int
) -> Iterator[dict[str, np.ndarray]]:
    for shard, _ in shards:
        shape = (settings["batch_size"], settings["sequence_length"])
        tokens = _read_shard(Path(shard), shape)[:num_rows]
        starts = np.zeros(tokens.shape, bool)
        if settings["eos_token_id"] is not None:
            starts[:, 2:] = tokens[:, 1:-1] == settings["eos_token_id"]  # the first token starts a document, EOS or not
        yield from rows_with_positions(tokens, starts)
        num_rows -= len(tokens)


def _read_shard(shard: Path, shape: tuple[int, int]) -> np.ndarray:
    try:
        tokens = load_file(shard)["input_ids"]
    except (SafetensorError, KeyError) as error:
        raise Refusal(f"{shard}: is damaged ({error}). Remove it, and run again.") from None
    if tuple(tokens.shape) != shape:
        raise Refusal(f"{shard}: has shape {list(tokens.shape)}, not {list(shape)}. Remove it, and run again.")
    return tokens.numpy()
