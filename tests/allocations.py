"""Every tensor that is made while a model runs."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Every tensor that an operation makes, those within its inputs' memory aside: `[(operation, shape)]`."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        known = {each.untyped_storage().data_ptr() for each in inputs}
        for each in tree_leaves(output):
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in known:
                self.seen.append((str(function), tuple(each.shape)))
        return output


def expanded(seen, batch: int, heads: int, keys: int, head_dim: int) -> list:
    """What has as many numbers as keys or values would have after repetition, or more."""
    return [one for one in seen if torch.Size(one[1]).numel() >= batch * heads * keys * head_dim]
