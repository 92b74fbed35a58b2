"""Donor and student on the same tokens: the loss of each, and how far their predictions are apart.

`B` windows of a batch, `T` positions, `N` scored tokens, `V` vocabulary.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from ...refusal import Refusal
from ..inputs.windows import Window, batches


ELEMENTS_AT_ONCE = 1 << 24
IGNORED = -100  # what transformers takes for no label
ABSURD_LOSS = 700  # whose exponential is no number any more


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """Of every scored token, in nats; fp32 log-softmax whatever the models compute in.

    Args:
        window_N: number of the window it was scored in.
        context_N: tokens before it.
        kl_N: forward KL from the donor's distribution to the student's.
        agrees_N: whether both find the same token likeliest.
    """

    window_N: np.ndarray
    context_N: np.ndarray
    donor_loss_N: np.ndarray
    student_loss_N: np.ndarray
    kl_N: np.ndarray
    agrees_N: np.ndarray

    def __len__(self) -> int:
        return len(self.window_N)

    @property
    def windows(self) -> int:
        return int(self.window_N.max()) + 1

    def by_window(self, values_N: np.ndarray) -> np.ndarray:
        """Sums over the tokens of each window."""
        return np.bincount(self.window_N, weights=values_N, minlength=self.windows)

    def where(self, chosen_N: np.ndarray) -> "TokenScores":
        """Some of the tokens, their windows numbered afresh."""
        kept = {name: getattr(self, name)[chosen_N] for name in TokenScores.__dataclass_fields__}
        kept["window_N"] = np.unique(kept["window_N"], return_inverse=True)[1]
        return TokenScores(**kept)


@torch.inference_mode()
def score(
    donor: PreTrainedModel,
    student: PreTrainedModel,
    windows: Iterable[Window],
    batch_size: int,
    seen: Callable[[int], object] = lambda tokens: None,
) -> TokenScores:
    """Both models read every window; a model scored against itself has KL 0, exactly.

    Args:
        donor, student: of one vocabulary, on one device.
        batch_size: windows at once.
        seen: told of the tokens scored in each batch.

    Raises:
        Refusal: a loss that is NaN or Inf.
    """
    parts = []
    for batch in batches(windows, batch_size):
        tokens_BT, mask_BT, scored_BT = _padded([window for _, window in batch], donor.device)
        read = {"attention_mask": mask_BT[:, :-1], "use_cache": False}
        theirs, ours = (model(tokens_BT[:, :-1], **read).logits for model in (donor, student))
        found = compare(theirs[scored_BT], ours[scored_BT], tokens_BT[:, 1:][scored_BT])
        numbers = np.repeat([number for number, _ in batch], [window.scored for _, window in batch])
        parts.append([numbers, np.concatenate([window.contexts for _, window in batch]), *found])
        seen(len(numbers))
    scores = collected(parts)
    check_finite(scores)
    return scores


def collected(parts: list[list[np.ndarray]]) -> TokenScores:
    """Of batches, each as [windows, contexts, donor's losses, student's losses, KL, agreement]."""
    names = ("window_N", "context_N", "donor_loss_N", "student_loss_N", "kl_N", "agrees_N")
    return TokenScores(**dict(zip(names, map(np.concatenate, zip(*parts, strict=True)), strict=True)))


def _padded(windows: list[Window], device: torch.device):
    """(tokens, attention mask, which predictions are scored); padded on the right, where causal models do not look."""
    longest = max(len(window.tokens) for window in windows)
    tokens_BT = torch.zeros(len(windows), longest, dtype=torch.long)
    mask_BT = torch.zeros_like(tokens_BT)
    scored_BT = torch.zeros(len(windows), longest - 1, dtype=torch.bool)
    for row, window in enumerate(windows):
        length = len(window.tokens)
        tokens_BT[row, :length] = torch.tensor(window.tokens)
        mask_BT[row, :length] = 1
        scored_BT[row, length - 1 - window.scored : length - 1] = True
    return tokens_BT.to(device), mask_BT.to(device), scored_BT.to(device)


def compare(donor_NV: torch.Tensor, student_NV: torch.Tensor, token_N: torch.Tensor) -> list[np.ndarray]:
    """[donor's loss, student's loss, KL, agreement] of each token; in parts, for N x V may be large."""
    rows = max(1, ELEMENTS_AT_ONCE // donor_NV.shape[-1])
    parts = zip(donor_NV.split(rows), student_NV.split(rows), token_N.split(rows), strict=True)
    found = [_compare_part(*part) for part in parts]
    return [torch.cat(values).cpu().numpy() for values in zip(*found, strict=True)]


def _compare_part(donor_nV: torch.Tensor, student_nV: torch.Tensor, token_n: torch.Tensor):
    theirs_nV, ours_nV = donor_nV.float().log_softmax(-1), student_nV.float().log_softmax(-1)
    losses = [-logs.gather(-1, token_n.unsqueeze(-1)).squeeze(-1).double() for logs in (theirs_nV, ours_nV)]
    kl_n = (theirs_nV.exp() * (theirs_nV - ours_nV)).sum(-1, dtype=torch.float64)
    return *losses, kl_n, (donor_nV.argmax(-1) == student_nV.argmax(-1)).double()


def check_finite(scores: TokenScores) -> None:
    for name, losses_N in (("donor", scores.donor_loss_N), ("student", scores.student_loss_N)):
        broken = int((~(losses_N < ABSURD_LOSS)).sum())  # also NaN
        if broken:
            raise Refusal(
                f"{name}: its loss is NaN, Inf or beyond {ABSURD_LOSS} nats on {broken:,} of {len(losses_N):,} tokens. Check it with hf-gqa verify."
            )
