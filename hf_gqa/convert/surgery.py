"""Donor tensors in, student tensors out, one donor shard at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from ..refusal import Refusal
from ..weights.attention_weights import AttentionWeights
from ..weights.head_statistics import HeadStatistics
from ..weights.head_tensors import head_tensor_names, read_heads, write_heads
from .donor import Donor
from .layer_conversion import converted_layer
from .layer_sharing import borrowed_pattern, check_readers, lent_heads, mean, tied_parameters
from .plan import ConversionPlan
from .target import Target


def converted_shards(
    donor: Donor,
    plan: ConversionPlan,
    target: Target,
    progress: Callable[[int], object] = lambda read_bytes: None,
    statistics: Sequence[HeadStatistics] | None = None,
    converted: Mapping[int, AttentionWeights] | None = None,
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield, for each shard of the donor, its file name and the student's tensors that belong into it.

    Tensors that a method leaves alone, and those outside attention, are the donor's own memory. A layer spread over
    shards is converted once, at the first of them, and kept until the last has been written.

    A shard is checked for NaN and Inf when the caller asks for the next one: writing pages out that were read through
    the mapping before took two to five times as long (measured with benchmarks/convert.py), so the check comes second.
    What was yielded counts only once the iteration has ended.

    Args:
        progress: called with the bytes of each donor tensor that has been dealt with.
        statistics: of each layer's inputs, for the methods.
        converted: layers whose heads have been through the methods already.

    Raises:
        Refusal: a tensor holds NaN or Inf.
    """
    surgery = _Surgery(donor, plan, target, statistics, converted or {})
    for file, stored in donor.tensors.shards.items():
        names = [name for name in stored if name not in donor.dropped]
        tensors = {}
        for name in names:
            tensors.update(surgery.student_tensors(name))
        if tensors:  # a shard may hold nothing but what is fused into tensors of another
            yield file, tensors
        del tensors
        for name in names:
            _check_finite(donor, name)
            progress(donor.tensors.size_bytes(name))
    missed = set(range(len(target.rows))) - surgery.waiting.keys()
    assert not missed and not any(surgery.waiting.values()), f"layers {missed} passed through unconverted"


def layer_heads(donor: Donor) -> Iterator[tuple[int, AttentionWeights]]:
    """Yield the number of each row and the heads that it is about, as the donor has them."""
    names = {name for shard in donor.tensors.shards.values() for name in shard}
    places = head_tensors(donor)
    for row_idx, path in sorted({places[name] for name in names & places.keys()}):
        yield row_idx, _read_row(donor, row_idx, path, names)


def head_tensors(donor: Donor) -> dict[str, tuple[int, str]]:
    """Full name of every tensor that can hold heads -> (number of its row, path of its attention)."""
    paths = (lambda path: [path]) if donor.composite is None else donor.composite.stored_paths
    return {
        f"{prefix}{path}.{name.format(head=head)}": (row_idx, f"{prefix}{path}")
        for row_idx, site in enumerate(donor.sites)
        for path in paths(site.path)
        for prefix in ("", f"{donor.model_class.base_model_prefix}.")
        for name in head_tensor_names(donor.layout)
        for head in range(site.num_attention_heads if "{head}" in name else 1)
    }


def head_bytes(donor: Donor) -> int:
    """Of all tensors that hold heads."""
    places = head_tensors(donor)
    stored = (name for shard in donor.tensors.shards.values() for name in shard)
    return sum(donor.tensors.size_bytes(name) for name in stored if name in places)


def _read_row(donor: Donor, row_idx: int, attention: str, names: set[str]) -> AttentionWeights:
    def get(name: str) -> torch.Tensor | None:
        full = f"{attention}.{name}"
        return donor.tensors.get(full) if full in names else None

    site = donor.sites[row_idx]
    return read_heads(donor.layout, get, site.num_attention_heads, site.head_dim)


def _check_finite(donor: Donor, name: str) -> None:
    """NaN and Inf survive summation, so one cheap pass clears all but the sums that overflow."""
    tensor = donor.tensors.get(name)
    if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        bad = (~torch.isfinite(tensor)).sum().item()
        raise Refusal(
            f"{donor.folder or donor.name}: '{name}' holds {bad} NaN or Inf of {tensor.numel()} values. "
            f"The donor is damaged: download it again, or find the training step that broke it."
        )


class _Surgery:
    """Which student tensors take the place of which donor tensor."""

    def __init__(
        self,
        donor: Donor,
        plan: ConversionPlan,
        target: Target,
        statistics: Sequence[HeadStatistics] | None,
        converted: Mapping[int, AttentionWeights],
    ):
        self.donor, self.plan, self.target = donor, plan, target
        self.statistics, self.converted = statistics, converted
        self.names = {name for names in donor.tensors.shards.values() for name in names}
        self.places = head_tensors(donor)
        self.prefix = f"{donor.model_class.base_model_prefix}."
        self.borrowed = borrowed_pattern(target.rows, target.layout)
        self.tied = tied_parameters(target)
        self.attention = dict(map(self.places.get, self.names & self.places.keys()))
        self.waiting: dict[int, dict[str, torch.Tensor]] = {}  # converted tensors whose place has not come yet

    def student_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """A student tensor stands where the donor has one of its name, else where its layer begins."""
        if name not in self.places:
            if self.gone(name):
                return {}
            return {self.student_name(name): self.target.passed_through(name, self.passed_through(name))}
        row_idx, attention = self.places[name]
        begins = row_idx not in self.waiting
        if begins:
            self.waiting[row_idx] = self.converted_row(row_idx, attention)
        waiting = self.waiting[row_idx]
        here = [new for new in waiting if new == name or (begins and new not in self.names)]
        return {new: waiting.pop(new) for new in here}

    def student_name(self, name: str) -> str:
        """Of a tensor outside attention: as our own class calls it, or as native checkpoints store it."""
        family = self.donor.family
        if self.target.export == "bundle":
            return family.own_name(name)
        return family.stored_names.get(name, name)

    def converted_row(self, row_idx: int, attention: str) -> dict[str, torch.Tensor]:
        heads = self.converted.get(row_idx)
        if heads is None:
            statistics = None if self.statistics is None else self.statistics[row_idx]
            own = lent_heads(self.donor_heads, self.target.rows, row_idx, self.plan.shared_init)
            wanted = self.target.rows[row_idx].num_key_value_heads
            heads = converted_layer(self.donor, self.plan, own, row_idx, wanted, statistics)
            check_readers(self.plan, self.target.rows, row_idx, own, heads)
        written = write_heads(self.target.layout, heads)
        named = {f"{attention}.{name}": tensor for name, tensor in written.items()}
        return {name: tensor for name, tensor in named.items() if not self.gone(name)}

    def gone(self, name: str) -> bool:
        """Whether the student has no such tensor, for its layer borrows what it computed, or is tied to another's."""
        below_base = name.removeprefix(self.prefix)
        return below_base in self.tied or self.borrowed.match(below_base) is not None

    def passed_through(self, name: str) -> torch.Tensor:
        """A tensor outside attention, or the mean over the layers that will be tied to it."""
        prefix, below_base = ("", name) if not name.startswith(self.prefix) else (self.prefix, name[len(self.prefix) :])
        tied = [prefix + other for other, lender in self.tied.items() if lender == below_base]
        if self.plan.shared_init != "mean" or not tied:
            return self.donor.tensors.get(name)
        return mean([self.donor.tensors.get(member) for member in (name, *tied)])

    def donor_heads(self, row_idx: int) -> AttentionWeights:
        return _read_row(self.donor, row_idx, self.attention[row_idx], self.names)
