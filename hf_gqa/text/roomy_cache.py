"""A cache with room for all that will be sampled; the growing one copies everything it holds for every token."""

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """What `DynamicLayer` holds, bit for bit, as views of tensors with room for `length` tokens."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add `[batch, KV heads, new tokens, head_dim]` and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = [
                states.new_empty(*states.shape[:-2], self.length, states.shape[-1])
                for states in (key_states, value_states)
            ]
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[..., begin:end, :] = states
        self.keys, self.values = (room[..., :end, :] for room in self.room)
        return self.keys, self.values


def roomy_cache(config: PreTrainedConfig, length: int) -> DynamicCache:
    """The cache that `generate` would make; layers with a sliding window are bounded by that and stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
