"""How fast an encoder reads whole sequences, donor and student by turns in one process."""

from collections.abc import Callable, Sequence
from statistics import median

import torch
from transformers import PreTrainedModel

from ..report import EncodingSpeed
from .speed import now, timed_pairs


def measure_encoding_speed(
    donor: PreTrainedModel,
    student: PreTrainedModel,
    *,
    batch_sizes: Sequence[int],
    context_lengths: Sequence[int],
    repetitions: int,
    seed: int,
    progress: Callable[[str], object] = lambda point: None,
) -> tuple[tuple[EncodingSpeed, ...], tuple[str, ...]]:
    """One forward pass over random sequences, for every batch size and length; one pair before the first warms up.

    Returns:
        The points, and notes about those that were left out because memory ran out.
    """
    points, notes = [], []
    for batch_size in batch_sizes:
        for length in context_lengths:
            where = f"batch {batch_size} x length {length}"
            progress(where)
            pairs = timed_pairs((donor, student), (batch_size, length), forward_seconds, repetitions, seed)
            if pairs is None:
                notes.append(f"Speed at {where} was not measured: memory ran out.")
                continue
            speedups = [theirs / ours for theirs, ours in pairs]
            points.append(
                EncodingSpeed(
                    batch_size=batch_size,
                    length_tokens=length,
                    repetitions=len(pairs),
                    donor_sequences_per_second=median(batch_size / theirs for theirs, _ in pairs),
                    student_sequences_per_second=median(batch_size / ours for _, ours in pairs),
                    speedup=median(speedups),
                    speedup_low=min(speedups),
                    speedup_high=max(speedups),
                )
            )
    return tuple(points), tuple(notes)


@torch.inference_mode()
def forward_seconds(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    started = now(model.device)
    model(input_ids=tokens)
    return now(model.device) - started
