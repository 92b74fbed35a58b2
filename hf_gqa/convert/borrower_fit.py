"""Fit borrowers to what is lent to them, from the bottom up, while donor and student read the same text.

What is lent stays as it is. Of a borrower, groups of query heads, with their own values and output blocks, change places, so
that each reads the lent head that serves it best; queries are fitted to the lent keys, and the output projection to what the
heads then put out. That heads of neighbouring layers are in no common order is what LISA found (Mu et al. 2024, arXiv 2408.01890).

Shapes: B rows, L tokens of a row, N tokens, H query heads, K KV heads, G = H/K, D head_dim, E hidden.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from ..progress_bar import progress_bar
from ..weights.assignment import cheapest_assignment
from ..weights.attention_weights import AttentionWeights
from ..weights.lent_keys import LentKeys, LentMoments
from ..weights.output_moments import OutputMomentSum, explained_power, fitted_output
from ..weights.query_fit import AttentionRows, fitted_queries
from ..weights.rotation import rotation_of
from .assembled import assembled_student
from .donor import Donor, donor_from_model
from .layer_conversion import SCORED_TOKENS, converted_layer
from .layer_run import Batches, LayerRun, put_owned_heads
from .plan import ConversionPlan
from .surgery import layer_heads
from .target import Target, choose_target


OUTPUT_RIDGE, QUERY_RIDGE, ITERATIONS, ALIKE_FRACTION = 1e-3, 1e-4, 8, 0.5


def fitted_borrowers(
    donor: Donor, model: PreTrainedModel, plan: ConversionPlan, target: Target, tokens_NL: torch.Tensor
) -> dict[int, AttentionWeights]:
    """The heads of every layer that borrows queries, keys or values.

    Args:
        model: the donor loaded; a whole student is held beside it.
        tokens_NL: rows to fit on.
    """
    begins = replace(plan, shared_init="own")
    loaded = donor_from_model(model)  # some are stored under names that no class has
    student = assembled_student(loaded, begins, choose_target(loaded, begins), {}, model.dtype, None)
    fit = BorrowerFit(donor, model, student, target, tokens_NL)
    found = {}
    with progress_bar("Fitting", len(target.rows), "layer") as bar:
        for layer_idx, own in layer_heads(donor):
            row = target.rows[layer_idx]
            heads = fit.layer(layer_idx, own, converted_layer(donor, plan, own, layer_idx, row.num_key_value_heads))
            if row.borrows_states:
                found[layer_idx] = heads
            bar.update()
    return found


@dataclass(slots=True)
class _Wanted:
    """What the donor computes in one layer, batch by batch.

    Args:
        inputs: of the attention. mixed: what its output projection reads; both only of the batches that are scored.
        targets: what the student's attention should put out, to make up for errors from below too.
    """

    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    mixed: dict[int, torch.Tensor] = field(default_factory=dict)
    targets: Batches = field(default_factory=list)


class BorrowerFit:
    """Donor and student side by side, one layer of each at a time."""

    def __init__(
        self,
        donor: Donor,
        model: PreTrainedModel,
        student: PreTrainedModel,
        target: Target,
        tokens_NL: torch.Tensor,
    ):
        self.donor, self.rows, self.layout = donor, target.rows, target.layout
        self.donor_run = LayerRun(model, donor.layout, tokens_NL)
        self.student_run = LayerRun(student, target.layout, tokens_NL)
        self.donor_hidden: Batches = self.donor_run.embedded
        self.student_hidden: Batches = self.student_run.embedded
        batches = len(self.donor_hidden)
        self.picked = range(0, batches, max(1, -(-tokens_NL.numel() // SCORED_TOKENS)))
        self.lenders: dict[int, tuple[AttentionWeights, dict[int, torch.Tensor]]] = {}

    def layer(self, layer_idx: int, own: AttentionWeights, heads: AttentionWeights) -> AttentionWeights:
        """Fit the next layer, if it borrows, and go past it.

        Args:
            own: as the donor has them. heads: with the student's number of KV heads.
        """
        wanted = self._run_donor(layer_idx)
        layer = self.student_run.layer(layer_idx)
        if self.rows[layer_idx].borrows_states:
            heads = self._fitted(layer_idx, layer, own, heads, wanted)
            self._put(layer_idx, layer, heads)
        inputs = {}

        def keep(number: int, seen: dict) -> None:
            if number in self.picked:
                inputs[number] = seen["inputs"]

        self.student_hidden = self.student_run.outputs(layer_idx, layer, self.student_hidden, keep)
        self._keep_what_is_lent(layer_idx, heads, inputs)
        return heads

    def _run_donor(self, layer_idx: int) -> _Wanted:
        wanted = _Wanted()
        normed = self.donor.layout.output_normed

        def keep(number: int, seen: dict) -> None:
            drift = 0 if normed else self.donor_hidden[number] - self.student_hidden[number]
            wanted.targets.append(seen["output"] + drift)
            if number in self.picked:
                wanted.inputs[number], wanted.mixed[number] = seen["inputs"], seen["mixed"]

        layer = self.donor_run.layer(layer_idx)
        self.donor_hidden = self.donor_run.outputs(layer_idx, layer, self.donor_hidden, keep)
        return wanted

    def _fitted(
        self, layer_idx: int, layer: nn.Module, own: AttentionWeights, heads: AttentionWeights, wanted: _Wanted
    ) -> AttentionWeights:
        lent_keys = self._lent_keys(layer_idx, own, wanted)

        def placed(order: list[int]) -> AttentionWeights:
            moved = heads.reordered(order)
            return moved if lent_keys is None else lent_keys.queries_for(moved, order)

        order = list(range(heads.num_key_value_heads))
        if not self.donor.has_head_positions:
            order = self._best_order(layer_idx, layer, placed, own, wanted)
        fitted = placed(order)
        if lent_keys is not None:
            fitted = self._with_fitted_queries(layer_idx, layer, own, fitted, order, wanted)
        self._put(layer_idx, layer, fitted)
        total = OutputMomentSum(fitted.output_EHD[0].numel(), len(fitted.output_EHD))

        def add(number: int, seen: dict) -> None:
            total.add(seen["mixed"].flatten(0, 1), wanted.targets[number].flatten(0, 1))

        self.student_run.outputs(layer_idx, layer, self.student_hidden, add)
        return fitted_output(fitted, total.moments(), OUTPUT_RIDGE)

    def _lent_keys(self, layer_idx: int, own: AttentionWeights, wanted: _Wanted) -> LentKeys | None:
        """None where there are none for own queries, or where norms or other rotations defeat linear maps."""
        row = self.rows[layer_idx]
        if row.key_from is None or row.query_from is not None or self.donor.has_head_norms:
            return None
        rotation = self._rotation(layer_idx)
        if rotation != self._rotation(row.key_from):
            return None
        lender, lent = self.lenders[row.key_from]
        own_NE, lent_NE = (
            torch.cat([inputs[number].flatten(0, 1) for number in self.picked]) for inputs in (wanted.inputs, lent)
        )
        return LentKeys(own, lender, LentMoments.of(own_NE, lent_NE), rotation)

    def _best_order(
        self, layer_idx: int, layer: nn.Module, placed, own: AttentionWeights, wanted: _Wanted
    ) -> list[int]:
        """Which group of query heads stands at each place, tried out: turned once around, every group meets every lent head.

        What a group is worth at a place is how much of what it gave in the donor a least-squares fit of its output block
        brings back.
        """
        groups = self.rows[layer_idx].num_key_value_heads
        output_EHD = own.output_EHD.float()
        said = [[0.0] * groups for _ in range(groups)]  # [group][place]
        for turn in range(groups):
            order = [(place + turn) % groups for place in range(groups)]
            heads = placed(order)
            self._put(layer_idx, layer, heads)
            totals = [OutputMomentSum(heads.output_EHD[0].numel() // groups, len(output_EHD)) for _ in order]

            def add(number: int, seen: dict, order=order, totals=totals) -> None:
                mixed = seen["mixed"].flatten(0, 1).unflatten(1, (groups, -1))
                gave = wanted.mixed[number].flatten(0, 1).unflatten(1, (groups, -1))
                for place, group in enumerate(order):
                    block_EG = output_EHD.flatten(1).unflatten(1, (groups, -1))[:, group]
                    totals[place].add(mixed[:, place], gave[:, group] @ block_EG.T)

            self.student_run.outputs(layer_idx, layer, self.student_hidden, add, self.picked)
            for place, group in enumerate(order):
                said[group][place] = explained_power(totals[place].moments(), OUTPUT_RIDGE)
        places = cheapest_assignment([[-power for power in powers] for powers in said])
        return [places.index(place) for place in range(groups)]

    def _with_fitted_queries(
        self,
        layer_idx: int,
        layer: nn.Module,
        own: AttentionWeights,
        heads: AttentionWeights,
        order: list[int],
        wanted: _Wanted,
    ) -> AttentionWeights:
        inputs = {}
        self.student_run.outputs(
            layer_idx,
            layer,
            self.student_hidden,
            lambda number, seen: inputs.update({number: seen["inputs"]}),
            self.picked,
        )
        lender, lent = self.lenders[self.rows[layer_idx].key_from]
        donor_layer = self.donor_run.layer(layer_idx)
        rows = [
            AttentionRows(
                donor_BLE=wanted.inputs[number],
                student_BLE=inputs[number],
                lender_BLE=lent[number],
                **self.donor_run.attention_arguments(layer_idx, donor_layer, number, self._rotation(layer_idx)),
            )
            for number in self.picked
        ]
        copies = own.num_attention_heads // own.num_key_value_heads
        members = own.num_attention_heads // len(order)
        whole = own.map_key_value(lambda tensor_K: tensor_K.repeat_interleave(copies, dim=0))
        whole = whole.reordered([group * members + member for group in order for member in range(members)])
        reading = replace(heads, key_KDE=lender.key_KDE, key_bias_KD=lender.key_bias_KD)
        query_HDE, query_bias_HD = fitted_queries(reading, whole, rows, ITERATIONS, QUERY_RIDGE, ALIKE_FRACTION)
        return replace(heads, query_HDE=query_HDE, query_bias_HD=query_bias_HD)

    def _rotation(self, layer_idx: int):
        return rotation_of(self.donor.layout, self.donor.config, self.donor.head_dim, layer_idx)

    def _put(self, layer_idx: int, layer: nn.Module, heads: AttentionWeights) -> None:
        put_owned_heads(self.layout, self.student_run.attention_in(layer, layer_idx), heads)

    def _keep_what_is_lent(self, layer_idx: int, heads: AttentionWeights, inputs: dict[int, torch.Tensor]) -> None:
        """For layers above that borrow, and no longer."""
        later = self.rows[layer_idx + 1 :]
        if any(row.key_from == layer_idx for row in later):
            self.lenders[layer_idx] = heads, inputs
        for lender in [n for n in self.lenders if all(row.key_from != n for row in later)]:
            del self.lenders[lender]
        used = {getattr(row, column) for row in later for column in ("query_from", "key_from", "value_from")}
        for args in self.student_run.arguments:
            states = args[layer_idx][1].get("shared_states", {})
            for name in [name for name in states if int(name.rpartition(".")[2]) not in used]:
                del states[name]
