"""What a donor does with some text, gathered once and kept: for methods that look before they merge.

Shapes: N rows, L tokens of a row, F = E + 1 (hidden and a constant one).
"""

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ..methods import METHODS
from ..progress_bar import progress_bar
from ..refusal import Refusal
from ..staging import staged_file
from ..weights.attention_weights import AttentionWeights
from ..weights.head_statistics import HeadStatistics, MomentSum
from .borrower_fit import fitted_borrowers
from .donor import Donor
from .heads_on_disk import HeadsOnDisk
from .layer_conversion import SequentialConversion, converted_layer
from .layer_run import LayerRun
from .plan import ConversionPlan
from .stored_model import loaded_whole, model_to_run
from .surgery import layer_heads
from .target import Target


TOKENS_PER_DIMENSION = 4  # fewer, and the moments are mostly noise
FORMAT = "hf_gqa calibration 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The text as rows of tokens, and the moments of what each layer's attention read of it.

    Args:
        donor: fingerprint of the donor that read it.
        tokens_NL: int32.
        statistics: of each layer.
    """

    donor: str
    tokens_NL: torch.Tensor
    statistics: tuple[HeadStatistics, ...]

    def write(self, file: Path) -> None:
        """The file is there whole or not at all; what had its name before is replaced."""
        tensors = {f"layers.{number}": layer.moment_FF for number, layer in enumerate(self.statistics)}
        tensors["tokens"] = self.tokens_NL
        with staged_file(file) as partial:
            save_file(tensors, partial, metadata={"format": FORMAT, "donor": self.donor})

    @classmethod
    def read(cls, file: Path) -> "Calibration":
        """Raises Refusal for what is no calibration."""
        try:
            with safe_open(file, framework="pt") as stored:
                metadata = stored.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise Refusal(f"{file}: is no calibration of this hf_gqa. Calibrate again.")
                tokens_NL = stored.get_tensor("tokens")
                layers = range(len(stored.keys()) - 1)
                moments = [stored.get_tensor(f"layers.{number}") for number in layers]
        except (SafetensorError, OSError) as error:
            raise Refusal(f"{file}: cannot be read ({error}). Calibrate again.") from None
        statistics = tuple(HeadStatistics(moment_FF=moment, tokens=tokens_NL.numel()) for moment in moments)
        return cls(donor=metadata["donor"], tokens_NL=tokens_NL, statistics=statistics)


def calibrate(donor: Donor, model: PreTrainedModel | None, tokens_NL: torch.Tensor) -> Calibration:
    """Run the donor over the text once, layer by layer.

    Args:
        model: the donor loaded; None for one on disk, of which one layer at a time is read then.
        tokens_NL: rows of tokens; each token attends to all before it in its row.

    Raises:
        Refusal: no rows of the donor's tokens.

    Warns:
        UserWarning: too few tokens for the donor's width.
    """
    tokens_NL = _checked_rows(tokens_NL, donor)
    run = LayerRun(model_to_run(donor) if model is None else model, donor.layout, tokens_NL.long())
    with progress_bar("Calibrating", donor.config.num_hidden_layers, "layer") as bar:
        statistics = []
        for found in _statistics(donor, run):
            statistics.append(found)
            bar.update()
    return Calibration(donor=fingerprint(donor), tokens_NL=tokens_NL, statistics=tuple(statistics))


def _statistics(donor: Donor, run: LayerRun) -> Iterator[HeadStatistics]:
    """Of each layer's inputs, from the bottom up."""
    hidden = run.embedded
    for layer_idx in range(donor.config.num_hidden_layers):
        total = MomentSum(hidden[0].shape[-1])
        hidden = run.outputs(
            layer_idx,
            run.layer(layer_idx),
            hidden,
            lambda _, seen, total=total: total.add(seen["inputs"].flatten(0, 1)),
        )
        yield total.statistics()


def check_decoder(donor: Donor) -> None:
    """Raises Refusal for a donor that reads one text and writes another: rows of tokens do not say which is which.

    And for one whose attentions compute at several depths, each of which reads something else.
    """
    if donor.layout.ties_layers:
        raise Refusal(
            f"calibration: the layers of '{donor.name}' compute with the weights of {len(donor.sites)}, and a calibration is of "
            f"one layer after the other. Leave it out: methods such as mean_pool, group, align and fold go by the weights alone."
        )
    if donor.layout.cross_attention is not None:
        raise Refusal(
            f"calibration: '{donor.name}' is an encoder-decoder, whose cross-attention reads pairs of texts, and a calibration "
            f"is of single ones. Leave it out: methods such as mean_pool, group, align and fold go by the weights alone."
        )


def _checked_rows(tokens_NL: torch.Tensor, donor: Donor) -> torch.Tensor:
    """As int32; warns of too few."""
    check_decoder(donor)
    if tokens_NL.dim() != 2 or tokens_NL.is_floating_point() or not tokens_NL.numel():
        raise Refusal(
            f"calibration: got {tokens_NL.dtype} of shape {list(tokens_NL.shape)}. Give rows of token ids, [rows, tokens]."
        )
    longest, vocabulary = donor.longest_tokens, donor.config.vocab_size
    if longest is not None and tokens_NL.shape[1] > longest:
        raise Refusal(
            f"calibration: rows of {tokens_NL.shape[1]:,} tokens are longer than max_position_embeddings = {longest:,} of "
            f"'{donor.name}'. Give shorter rows."
        )
    if tokens_NL.min() < 0 or tokens_NL.max() >= vocabulary:
        raise Refusal(
            f"calibration: its token ids go from {int(tokens_NL.min())} to {int(tokens_NL.max())}, those of "
            f"'{donor.name}' from 0 to {vocabulary - 1}. Use the donor's own tokenizer."
        )
    needed = TOKENS_PER_DIMENSION * donor.config.hidden_size
    if tokens_NL.numel() < needed:
        warnings.warn(
            f"calibration: {tokens_NL.numel():,} tokens say little about {donor.config.hidden_size:,} dimensions; what they "
            f"are silent on is left as it is. Give {needed:,} tokens or more.",
            stacklevel=3,
        )
    return tokens_NL.to(torch.int32)


def fingerprint(donor: Donor) -> str:
    """Of the values of the attention weights, some of each; the same in memory and on disk, whatever the file names."""
    digest = hashlib.sha256()
    for layer_idx, heads in layer_heads(donor):
        for name in ("query_HDE", "key_KDE", "value_KDE", "output_EHD"):
            tensor = getattr(heads, name)
            some = tensor.flatten(1)[:, :: max(1, tensor[0].numel() // 64)]
            digest.update(json.dumps([layer_idx, name, list(tensor.shape)]).encode())
            digest.update(some.to(torch.float64).cpu().numpy().tobytes())
    return digest.hexdigest()


def text_record(calibration: Calibration | torch.Tensor | None) -> dict | None:
    """What a manifest says of the text."""
    if calibration is None:
        return None
    tokens_NL = calibration.tokens_NL if isinstance(calibration, Calibration) else calibration
    rows = tokens_NL.to("cpu", torch.int32).contiguous().numpy().tobytes()
    return {"tokens": tokens_NL.numel(), "sha256": hashlib.sha256(rows).hexdigest()}


def calibrated(
    donor: Donor,
    plan: ConversionPlan,
    target: Target,
    calibration: Calibration | torch.Tensor | None,
    model: PreTrainedModel | None = None,
    scratch: Path | None = None,
) -> dict:
    """What `converted_shards` needs to know of the text: `statistics`, and layers that were `converted` already.

    Rows of tokens are looked at and forgotten layer by layer: each layer is converted as soon as the donor has gone past
    it, where layers do not lend each other heads.

    Args:
        calibration: made before, or rows of tokens to make it of; None: nothing is known.
        model: the donor loaded; by default it is read from its files, one layer at a time where that can be.
        scratch: folder to make, in which converted layers wait; by default they do so in memory.

    Raises:
        Refusal: the calibration of another donor, or none for borrowers that shall be fitted.
    """
    fits = plan.shared_init == "fit"
    if calibration is None:
        if not fits:
            return {}
        raise Refusal(
            "shared_init = fit: fits borrowers to what the donor computes on text, and there is none. Give --calibration or "
            "--calibration-tokens (calibration= in Python), or use shared_init = own."
        )
    check_decoder(donor)
    is_made = isinstance(calibration, Calibration)
    if is_made and calibration.donor != fingerprint(donor):
        raise Refusal(
            f"calibration: was made with another donor than '{donor.name}', whose weights differ. Calibrate this one."
        )
    if not is_made and any(row.borrows for row in target.rows):
        calibration, is_made = calibrate(donor, model, calibration), True
    statistics = calibration.statistics if is_made else None
    if is_made and not (observes(plan) or fits):
        return {"statistics": statistics}
    tokens_NL = (calibration.tokens_NL if is_made else _checked_rows(calibration, donor)).long()
    if model is None:
        model = loaded_whole(donor) if fits else model_to_run(donor)
    if fits:
        return {"statistics": statistics, "converted": fitted_borrowers(donor, model, plan, target, tokens_NL)}
    layers = _converted(donor, LayerRun(model, donor.layout, tokens_NL), plan, target, statistics)
    with progress_bar("Converting layers", donor.config.num_hidden_layers, "layer") as bar:
        converted = {} if scratch is None else HeadsOnDisk(scratch)
        for layer_idx, heads in layers:
            converted[layer_idx] = heads
            bar.update()
    return {"statistics": statistics, "converted": converted}


def observes(plan: ConversionPlan) -> bool:
    """Whether one of its methods must see the student compute."""
    return any(getattr(METHODS.get(name), "observes", False) for name in plan.method)


def _converted(
    donor: Donor, run: LayerRun, plan: ConversionPlan, target: Target, statistics: Sequence[HeadStatistics] | None
) -> Iterator[tuple[int, AttentionWeights]]:
    """Each layer's converted heads, from the bottom up; statistics that were not gathered before are on the way."""
    wanted = [row.num_key_value_heads for row in target.rows]
    if observes(plan):
        sequence = SequentialConversion(donor, run)
        for layer_idx, heads in layer_heads(donor):
            seen = None if statistics is None else statistics[layer_idx]
            yield layer_idx, sequence.layer(plan, heads, layer_idx, wanted[layer_idx], seen)
        return
    for (layer_idx, heads), seen in zip(layer_heads(donor), _statistics(donor, run), strict=True):
        yield layer_idx, converted_layer(donor, plan, heads, layer_idx, wanted[layer_idx], seen)
