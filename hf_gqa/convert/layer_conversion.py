"""One layer's heads through a plan's methods, and all layers' in order where a method must see the student compute.

Shapes: N rows, L tokens of a row, B rows of a batch, E hidden.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ..methods import METHODS, MethodContext, method_kind
from ..weights.attention_weights import AttentionWeights
from ..weights.head_statistics import HeadStatistics
from ..weights.output_moments import OutputMoments, OutputMomentSum
from .donor import Donor
from .layer_run import Batches, LayerRun
from .plan import ConversionPlan


def converted_layer(
    donor: Donor,
    plan: ConversionPlan,
    heads: AttentionWeights,
    layer_idx: int,
    num_key_value_heads: int,
    statistics: HeadStatistics | None = None,
    observe: Callable[[AttentionWeights], OutputMoments] | None = None,
) -> AttentionWeights:
    """The layer's heads as the plan wants them; untouched where their number is already right."""
    if heads.num_key_value_heads == num_key_value_heads:
        return heads
    before = heads
    for name in plan.method:
        layer = MethodContext(
            layer_idx=layer_idx,
            num_key_value_heads=num_key_value_heads,
            seed=plan.seed,
            initializer_range=donor.config.initializer_range,
            rotary=donor.layout.rotary,
            head_norms=donor.layout.query_norm is not None,
            statistics=statistics,
            before=before,
            observe=observe,
        )
        changed = METHODS.get(name)(heads, layer)
        if method_kind(name) == "rearrange":
            before = changed
        heads = changed
    return heads


class SequentialConversion:
    """Layers converted from the bottom up while donor and student run side by side, one layer of each at a time."""

    def __init__(self, donor: Donor, model: PreTrainedModel, tokens_NL: torch.Tensor):
        self.donor = donor
        self.run = LayerRun(model, donor.layout, tokens_NL)
        self.donor_hidden: Batches = self.run.embedded
        self.student_hidden: Batches = self.run.embedded

    def layer(
        self,
        plan: ConversionPlan,
        heads: AttentionWeights,
        layer_idx: int,
        num_key_value_heads: int,
        statistics: HeadStatistics,
    ) -> AttentionWeights:
        """Convert the next layer and go past it."""
        targets: Batches = []

        def keep(number: int, seen: dict) -> None:
            drift = 0 if self.donor.layout.output_normed else self.donor_hidden[number] - self.student_hidden[number]
            targets.append(seen["output"] + drift)

        donor_hidden = self.run.outputs(layer_idx, self.run.layer(layer_idx), self.donor_hidden, keep)

        def observe(changed: AttentionWeights) -> OutputMoments:
            total = OutputMomentSum(changed.output_EHD[0].numel(), changed.output_EHD.shape[0])

            def add(number: int, seen: dict) -> None:
                total.add(seen["mixed"].flatten(0, 1), targets[number].flatten(0, 1))

            self.run.outputs(layer_idx, self.run.layer(layer_idx, changed), self.student_hidden, add)
            return total.moments()

        converted = converted_layer(self.donor, plan, heads, layer_idx, num_key_value_heads, statistics, observe)
        student_layer = self.run.layer(layer_idx, converted)
        self.student_hidden = self.run.outputs(layer_idx, student_layer, self.student_hidden)
        self.donor_hidden = donor_hidden
        return converted
