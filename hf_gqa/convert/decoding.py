"""Whether a model decodes from its cache what one forward computes; looked at before anything expensive is done with it."""

from transformers import PreTrainedModel

from ..evaluating import evaluating
from ..refusal import Refusal
from .families import is_encoder
from .fresh_process import cached_against_whole, probe_inputs


# In parts of the largest logit. A cache that is ignored shows as 0.1 to 1; `verify` compares more sharply.
ALLOWED = {"float32": 1e-3, "bfloat16": 1e-1, "float16": 5e-2}


def check_decoding(model: PreTrainedModel, where: str) -> None:
    """Compare cached steps with one forward, under the attention implementation that the model has.

    Encoders keep no cache, and quantized weights round by what they are asked at once: neither is looked at.

    Args:
        where: what the user called it.

    Raises:
        Refusal: they differ, or the model's cache does not grow.
    """
    if is_encoder(model.config.model_type) or getattr(model, "is_quantized", False):
        return
    allowed = ALLOWED.get(str(model.dtype).removeprefix("torch."), ALLOWED["float32"])  # float64 as float32
    inputs = {name: value.to(model.device) for name, value in probe_inputs(model.config).items()}
    inputs = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    try:
        with evaluating(model):
            difference = cached_against_whole(model, inputs)
    except (RuntimeError, ValueError, IndexError) as error:  # IndexError: fewer positions than tokens that are tried
        raise Refusal(f"{where}: cannot decode from its cache ({error})") from None
    if not difference <= allowed:
        raise Refusal(
            f"{where}: what it decodes from its cache differs from one forward by {difference:.2g} of the largest logit, "
            f"allowed {allowed:g}. Its code does not fit the transformers that is installed: run hf-gqa refresh on it, or "
            f"install the transformers that its config.json names under hf_gqa."
        )
