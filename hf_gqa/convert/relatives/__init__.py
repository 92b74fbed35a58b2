"""Native classes of another family that compute a student exactly; the file's name is the donors' model type.

A file defines `RELATIVE`: which family, when, and how its tensors differ.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from ...registry import Registry
from ...runtime.layer_plan import LayerPlan


RELATIVES = Registry(__name__, "native relative", "RELATIVE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Relative:
    """Another native class that can hold the student.

    Args:
        model_type: of the other family.
        class_names: donor's class -> class of transformers that takes its place.
        obstacle: (donor configuration, rows) -> why it cannot hold this student, or None.
        config: (donor configuration) -> its configuration.
        transposed: ends of the names of tensors outside attention that it stores the other way round.
    """

    model_type: str
    class_names: dict[str, str]
    obstacle: Callable[[PretrainedConfig, tuple[LayerPlan, ...]], str | None]
    config: Callable[[PretrainedConfig], PretrainedConfig]
    transposed: tuple[str, ...] = ()

    def passed_through(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.t().contiguous() if name.endswith(self.transposed) else tensor
