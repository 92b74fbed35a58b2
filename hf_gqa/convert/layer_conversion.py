"""One layer's heads through a plan's methods, and all layers' in order where a method must see the student compute.

Shapes: N rows, L tokens of a row, B rows of a batch, E hidden.
"""

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..methods import METHODS, MethodContext, StudentOnText, method_kind
from ..weights.attention_weights import AttentionWeights
from ..weights.head_statistics import HeadStatistics
from ..weights.output_moments import OutputMoments, OutputMomentSum
from ..weights.query_fit import AttentionRows
from ..weights.rotation import rotation_of
from .donor import Donor
from .layer_run import Batches, LayerRun
from .plan import ConversionPlan


SCORED_TOKENS = 16_384


def converted_layer(
    donor: Donor,
    plan: ConversionPlan,
    heads: AttentionWeights,
    layer_idx: int,
    num_key_value_heads: int,
    statistics: HeadStatistics | None = None,
    text: StudentOnText | None = None,
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
            initializer_range=_initializer_range(donor.config),
            rotation=rotation_of(donor.layout, donor.config, donor.head_dim, layer_idx),
            head_norms=donor.has_head_norms,
            statistics=statistics,
            before=before,
            text=text,
        )
        changed = METHODS.get(name)(heads, layer)
        if method_kind(name) == "rearrange":
            before = changed
        heads = changed
    return heads


def _initializer_range(config: PretrainedConfig) -> float:
    """Standard deviation of key and value projections before training; families say it in three ways."""
    for field in ("initializer_range", "init_std"):
        if getattr(config, field, None) is not None:
            return getattr(config, field)
    return config.initializer_factor * config.hidden_size**-0.5


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
        text = _LayerOnText(self.donor, self.run, layer_idx, self.donor_hidden, self.student_hidden)
        converted = converted_layer(self.donor, plan, heads, layer_idx, num_key_value_heads, statistics, text)
        self.donor_hidden = text.donor_outputs
        self.student_hidden = self.run.outputs(layer_idx, self.run.layer(layer_idx, converted), self.student_hidden)
        return converted


class _LayerOnText:
    """`StudentOnText` for one layer; the donor's side of it is computed at once."""

    def __init__(self, donor: Donor, run: LayerRun, layer_idx: int, donor_hidden: Batches, student_hidden: Batches):
        self.donor, self.run, self.layer_idx, self.student_hidden = donor, run, layer_idx, student_hidden
        self.own_layer = run.layer(layer_idx)
        self.donor_inputs: Batches = []
        self.targets: Batches = []

        def keep(number: int, seen: dict) -> None:
            drift = 0 if donor.layout.output_normed else donor_hidden[number] - student_hidden[number]
            self.donor_inputs.append(seen["inputs"])
            self.targets.append(seen["output"] + drift)

        self.donor_outputs = run.outputs(layer_idx, self.own_layer, donor_hidden, keep)

    def output_moments(self, heads: AttentionWeights) -> OutputMoments:
        total = OutputMomentSum(heads.output_EHD[0].numel(), heads.output_EHD.shape[0])

        def add(number: int, seen: dict) -> None:
            total.add(seen["mixed"].flatten(0, 1), self.targets[number].flatten(0, 1))

        self.run.outputs(self.layer_idx, self.run.layer(self.layer_idx, heads), self.student_hidden, add)
        return total.moments()

    def attention_rows(self) -> list[AttentionRows]:
        """Of `SCORED_TOKENS` at most, from all over the text: scores take the square of a row's length."""
        batches = len(self.student_hidden)
        every = max(1, -(-batches * self.student_hidden[0][..., 0].numel() // SCORED_TOKENS))
        picked = range(0, batches, every)
        inputs: Batches = []
        self.run.outputs(
            self.layer_idx,
            self.own_layer,
            self.student_hidden,
            lambda _, seen: inputs.append(seen["inputs"]),
            picked,
        )
        donor = self.donor
        rotation = rotation_of(donor.layout, donor.config, donor.head_dim, self.layer_idx)
        return [
            AttentionRows(
                donor_BLE=self.donor_inputs[number],
                student_BLE=student_BLE,
                **self.run.attention_arguments(self.layer_idx, number, rotation),
            )
            for number, student_BLE in zip(picked, inputs, strict=True)
        ]
