"""One layer's heads through a plan's methods, and all layers' in order where a method must see the student compute.

Shapes: N rows, L tokens of a row, B rows of a batch, E hidden.
"""

from collections.abc import Callable

from transformers import PretrainedConfig

from ..methods import METHODS, MethodContext, StudentOnText, method_kind
from ..weights.attention_weights import AttentionWeights
from ..weights.head_statistics import HeadStatistics, MomentSum
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
    """Layers converted from the bottom up while donor and student run side by side, one layer at a time for both."""

    def __init__(self, donor: Donor, run: LayerRun):
        self.donor, self.run = donor, run
        self.donor_hidden: Batches = self.run.embedded
        self.student_hidden: Batches = self.run.embedded

    def layer(
        self,
        plan: ConversionPlan,
        heads: AttentionWeights,
        layer_idx: int,
        num_key_value_heads: int,
        statistics: HeadStatistics | None = None,
    ) -> AttentionWeights:
        """Convert the next layer and go past it; statistics that were not gathered before are now."""
        moments = MomentSum(self.donor_hidden[0].shape[-1]) if statistics is None else None
        text = _LayerOnText(self.donor, self.run, layer_idx, self.donor_hidden, self.student_hidden, moments)
        statistics = statistics or moments.statistics()
        converted = converted_layer(self.donor, plan, heads, layer_idx, num_key_value_heads, statistics, text)
        self.donor_hidden = text.donor_outputs
        self.student_hidden = text.student_outputs(converted)
        return converted


class _LayerOnText:
    """`StudentOnText` for one layer, of which there is one copy; the donor's side of it is computed at once.

    Args:
        moments: what to add the donor's inputs to.
    """

    def __init__(
        self,
        donor: Donor,
        run: LayerRun,
        layer_idx: int,
        donor_hidden: Batches,
        student_hidden: Batches,
        moments: MomentSum | None,
    ):
        self.donor, self.run, self.layer_idx, self.student_hidden = donor, run, layer_idx, student_hidden
        self.layer = run.layer(layer_idx)
        self.donor_inputs: Batches = []
        self.targets: Batches = []

        def keep(number: int, seen: dict) -> None:
            drift = 0 if donor.layout.output_normed else donor_hidden[number] - student_hidden[number]
            self.donor_inputs.append(seen["inputs"])
            self.targets.append(seen["output"] + drift)
            if moments is not None:
                moments.add(seen["inputs"].flatten(0, 1))

        self.donor_outputs = run.outputs(layer_idx, self.layer, donor_hidden, keep)

    def student_outputs(self, heads: AttentionWeights, tap: Callable[[int, dict], object] | None = None) -> Batches:
        """What the layer makes of the student's hidden states with these heads, which stay in it."""
        self.run.put_heads(self.layer_idx, self.layer, heads)
        return self.run.outputs(self.layer_idx, self.layer, self.student_hidden, tap)

    def output_moments(self, heads: AttentionWeights) -> OutputMoments:
        total = OutputMomentSum(heads.output_EHD[0].numel(), heads.output_EHD.shape[0])
        self.student_outputs(
            heads,
            lambda number, seen: total.add(seen["mixed"].flatten(0, 1), self.targets[number].flatten(0, 1)),
        )
        return total.moments()

    def attention_rows(self) -> list[AttentionRows]:
        """Of `SCORED_TOKENS` at most, from all over the text: scores take the square of a row's length."""
        batches = len(self.student_hidden)
        every = max(1, -(-batches * self.student_hidden[0][..., 0].numel() // SCORED_TOKENS))
        picked = range(0, batches, every)
        inputs: Batches = []  # of the attention, which no heads of its own change
        self.run.outputs(
            self.layer_idx, self.layer, self.student_hidden, lambda _, seen: inputs.append(seen["inputs"]), picked
        )
        donor = self.donor
        rotation = rotation_of(donor.layout, donor.config, donor.head_dim, self.layer_idx)
        return [
            AttentionRows(
                donor_BLE=self.donor_inputs[number],
                student_BLE=student_BLE,
                **self.run.attention_arguments(self.layer_idx, self.layer, number, rotation),
            )
            for number, student_BLE in zip(picked, inputs, strict=True)
        ]
