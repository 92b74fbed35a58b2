"""Floor 2: conversion methods, one file each; the file's name is the method's name.

A method file defines `METHOD`, an instance of a frozen dataclass with a `kind` and a
`__call__(heads: AttentionWeights, layer: MethodContext) -> AttentionWeights`:

- `rearrange` keeps what the layer computes and its number of KV heads;
- `reduce` lowers the number of KV heads to `layer.num_key_value_heads`;
- `expand` raises it, and keeps what the layer computes;
- `repair` comes after a `reduce`, keeps the number of KV heads and makes up for some of what was lost.

Where a method can use statistics of a text, it does without them what it can from the weights alone; one with
`observes = True` must see the student compute. `needs_linear_scores = True` refuses families that norm queries and keys
after their projections, `computes_scores = True` those whose attention adds something to its scores, `moves_heads = True` those whose query heads
each have positions of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..refusal import Refusal
from ..registry import Registry
from ..weights.attention_weights import AttentionWeights
from ..weights.head_statistics import HeadStatistics
from ..weights.output_moments import OutputMoments
from ..weights.query_fit import AttentionRows
from ..weights.rotation import Rotation


METHODS = Registry(__name__, "conversion method", "METHOD")
KINDS = ("rearrange", "reduce", "expand", "repair")
HEAD_COUNT_KINDS = ("reduce", "expand")


class StudentOnText(Protocol):
    """The student reading the calibration text: below the layer in question it is converted."""

    def output_moments(self, heads: AttentionWeights) -> OutputMoments:
        """What the layer with these heads would put out, and what it should."""

    def attention_rows(self) -> Sequence[AttentionRows]:
        """What the attention of donor and student read, of some of the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodContext:
    """What a method may know besides the heads.

    Args:
        layer_idx: the layer, from 0.
        num_key_value_heads: KV heads the layer shall have.
        seed: the plan's seed.
        initializer_range: standard deviation of the donor's own initialisation.
        rotation: of the layer's queries and keys; None where nothing rotates.
        head_norms: whether queries and keys are normed, which stands between them and any map.
        statistics: of what the donor's attention reads over the calibration text; None where there is no text.
        before: the heads as they were before their number changed; for a `repair`.
        text: the student on the calibration text, as far as it is converted; None where there is no text.
    """

    layer_idx: int
    num_key_value_heads: int
    seed: int
    initializer_range: float
    rotation: Rotation | None = None
    head_norms: bool = False
    statistics: HeadStatistics | None = None
    before: AttentionWeights | None = None
    text: StudentOnText | None = None

    def statistics_for(self, heads: AttentionWeights) -> HeadStatistics:
        """What is known of the inputs; without text, that nothing is."""
        return self.statistics or HeadStatistics.unseen(heads.key_KDE.shape[2])

    def known_text(self, method: str) -> StudentOnText:
        """Raises Refusal where there is none."""
        if self.text is None:
            raise Refusal(
                f"method = {method}: fits the student to what it computes on text, and there is none. Give --calibration "
                f"or --calibration-tokens (calibration= in Python)."
            )
        return self.text

    def groups(self, heads: AttentionWeights) -> list[slice]:
        """The KV heads that become one, for each of those that the layer shall have."""
        size = heads.num_key_value_heads // self.num_key_value_heads
        return [slice(start, start + size) for start in range(0, heads.num_key_value_heads, size)]


def method_kind(name: str) -> str:
    """Raises Refusal for an unknown method, TypeError for one whose `kind` is not a kind."""
    kind = METHODS.get(name).kind
    if kind not in KINDS:
        raise TypeError(f"conversion method '{name}': kind = {kind!r}. Use one of {', '.join(KINDS)}.")
    return kind
