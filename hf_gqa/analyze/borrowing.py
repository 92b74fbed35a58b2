"""What it costs when layers borrow from others: the donor runs with borrowed tensors in place of its own.

Nothing is converted for it: a borrower's attention is called with tensors that an earlier layer was called with.

Shapes: N rows, T tokens of a row, B rows of a batch, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from ..evaluate.quality.token_scores import compare
from ..evaluating import evaluating
from ..refusal import Refusal
from ..runtime.attention_layout import AttentionLayout
from .attention_calls import AttentionCall, attention_mixed_by


Owners = Mapping[int, int]  # borrower -> the earlier layer that it borrows from


def echo(borrower: AttentionCall, owner: AttentionCall) -> AttentionCall:
    """The owner's attention matrix over the borrower's own values."""
    return replace(owner, value=borrower.value)


def cross_layer_kv(borrower: AttentionCall, owner: AttentionCall) -> AttentionCall:
    """The borrower's own queries over the owner's keys and values."""
    return replace(borrower, key=owner.key, value=owner.value)


BORROWED = {"echo": echo, "cross_layer_kv": cross_layer_kv}  # by sharing pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """Some layers that borrow.

    Args:
        pattern: one of `BORROWED`.
        owners: borrower -> owner; empty: the donor as it is.
    """

    pattern: str
    owners: Owners


@dataclass(frozen=True, slots=True, kw_only=True)
class RowScores:
    """Sums over the predicted tokens of each row, in nats.

    Args:
        tokens: predicted in each row.
        loss_N: the model's loss. kl_N: from the donor's distribution to the model's. agrees_N: tokens for which both
            find the same one likeliest.
    """

    tokens: int
    loss_N: np.ndarray
    kl_N: np.ndarray
    agrees_N: np.ndarray

    @property
    def kl(self) -> float:
        return float(self.kl_N.mean() / self.tokens)

    @property
    def loss(self) -> float:
        return float(self.loss_N.mean() / self.tokens)

    @property
    def top1_agreement(self) -> float:
        return float(self.agrees_N.mean() / self.tokens)


@torch.inference_mode()
def measure_sharings(
    model: PreTrainedModel,
    layout: AttentionLayout,
    tokens_NT: torch.Tensor,
    sharings: Sequence[Sharing],
    batch_size: int,
    seen: Callable[[int], object] = lambda rows: None,
) -> list[RowScores]:
    """Scores of each sharing on the same rows; the donor runs once for each batch, and then each sharing.

    Args:
        tokens_NT: rows in which each token attends to those before it.
        seen: told of the rows of each batch, once for each sharing.

    Raises:
        Refusal: a model that does not call its attention through transformers' AttentionInterface, or NaN or Inf.
    """
    found: list[list[np.ndarray]] = [[] for _ in sharings]
    calls: dict[int, AttentionCall] = {}
    owners, borrowed = {}, BORROWED["echo"]

    def mix(layer_idx: int, call: AttentionCall) -> torch.Tensor:
        if layer_idx in owners.values():
            calls[layer_idx] = call
        owner = owners.get(layer_idx)
        return (call if owner is None else borrowed(call, calls[owner])).mixed()

    with evaluating(model), attention_mixed_by(model, layout, mix):
        for tokens_BT in tokens_NT.split(batch_size):
            tokens_BT = tokens_BT.to(model.device)
            owners = {}
            donor_BTV = model(tokens_BT, use_cache=False).logits
            for sharing, rows in zip(sharings, found, strict=True):
                owners, borrowed = sharing.owners, BORROWED[sharing.pattern]
                shared_BTV = model(tokens_BT, use_cache=False).logits if owners else donor_BTV
                rows.append(_scores_of_rows(donor_BTV, shared_BTV, tokens_BT))
                calls.clear()
                seen(len(tokens_BT))
    return [_joined(rows, tokens_NT.shape[1] - 1) for rows in found]


def _scores_of_rows(donor_BTV: torch.Tensor, model_BTV: torch.Tensor, tokens_BT: torch.Tensor) -> np.ndarray:
    """`[3, B]`: loss, KL and agreement, summed over the tokens of each row."""
    before = (logits_BTV[:, :-1].flatten(0, 1) for logits_BTV in (donor_BTV, model_BTV))
    _, loss, kl, agrees = compare(*before, tokens_BT[:, 1:].flatten())
    return np.stack([values.reshape(len(tokens_BT), -1).sum(1) for values in (loss, kl, agrees)])


def _joined(rows: list[np.ndarray], tokens: int) -> RowScores:
    loss_N, kl_N, agrees_N = np.concatenate(rows, axis=1)
    if not (np.isfinite(loss_N).all() and np.isfinite(kl_N).all()):
        raise Refusal("analyze: the donor's predictions are NaN or Inf. Use --dtype float32, or check the donor.")
    return RowScores(tokens=tokens, loss_N=loss_N, kl_N=kl_N, agrees_N=agrees_N)
