"""Bytes of KV cache: from the configuration, and from the cache that a model really fills, for every class of cache."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import (
    Cache,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
    cache_utils,
)
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from ..refusal import Refusal
from ..runtime.layer_plan import LayerPlan
from ..runtime.native_call import with_cache
from .families import is_encoder


GROUP_ELEMENTS, GROUP_BITS = 64, 4  # of quantized caches, unless transformers is told otherwise
# Of each layer: KV heads cached, or heads of keys and of values where they differ.
Heads = Sequence[int | tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheClass:
    """One way in which transformers keeps keys and values.

    Args:
        make: (configuration, tokens it will hold) -> an empty cache.
        kept_tokens: (tokens, sliding window of a layer or None) -> tokens that the layer keeps, or has room for.
        tensor_bytes: (elements of a layer's keys, or of its values; their dtype) -> bytes in which they are kept.
        missing: () -> what is not installed, or None.
        group_elements: what a number of elements must be a multiple of.
        quantizes: whether it keeps fewer bits than the model computes, and takes no sliding windows.
        offloads: whether layers wait on the host for their turn on a GPU.
    """

    make: Callable[[PretrainedConfig, int], Cache]
    kept_tokens: Callable[[int, int | None], int]
    tensor_bytes: Callable[[int, torch.dtype], int] = lambda elements, dtype: elements * dtype.itemsize
    missing: Callable[[], str | None] = lambda: None
    group_elements: int = 1
    quantizes: bool = False
    offloads: bool = False


def _all_tokens(tokens: int, window: int | None) -> int:
    return tokens


def _window_less_one(tokens: int, window: int | None) -> int:
    """The token that comes next is the last of its window."""
    return tokens if window is None else min(tokens, window - 1)


def _whole_window(tokens: int, window: int | None) -> int:
    return tokens if window is None else min(tokens, window)


def _grouped_bytes(elements: int, dtype: torch.dtype) -> int:
    """Bits of the elements, and a scale and a zero point for each group."""
    return elements * GROUP_BITS // 8 + 2 * (elements // GROUP_ELEMENTS) * dtype.itemsize


def _quantized(backend: str, **fields) -> CacheClass:
    return CacheClass(
        make=lambda config, tokens: QuantizedCache(backend, config), kept_tokens=_all_tokens, quantizes=True, **fields
    )


_grouped = partial(_quantized, tensor_bytes=_grouped_bytes)

CACHE_CLASSES = {
    "dynamic": CacheClass(make=lambda config, tokens: DynamicCache(config=config), kept_tokens=_window_less_one),
    "dynamic_unwindowed": CacheClass(make=lambda config, tokens: DynamicCache(), kept_tokens=_all_tokens),
    "static": CacheClass(
        make=lambda config, tokens: StaticCache(config=config, max_cache_len=tokens), kept_tokens=_whole_window
    ),
    "offloaded": CacheClass(
        make=lambda config, tokens: DynamicCache(config=config, offloading=True),
        kept_tokens=_window_less_one,
        offloads=True,
    ),
    "offloaded_static": CacheClass(
        make=lambda config, tokens: StaticCache(config=config, max_cache_len=tokens, offloading=True),
        kept_tokens=_whole_window,
        offloads=True,
    ),
    "quantized_fp8": _quantized(
        "fp8",
        tensor_bytes=lambda elements, dtype: elements + torch.float32.itemsize,  # one scale for all of them
        missing=lambda: None if hasattr(cache_utils, "Fp8QuantizedLayer") else "a newer transformers",
    ),
    "quantized_quanto": _grouped(
        "quanto",
        group_elements=2 * GROUP_ELEMENTS,  # it packs groups in pairs
        missing=lambda: None if is_optimum_quanto_available() else "optimum-quanto",
    ),
    "quantized_hqq": _grouped(
        "hqq", group_elements=GROUP_ELEMENTS, missing=lambda: None if is_hqq_available() else "hqq"
    ),
}


def cache_bytes_per_token_computed(config: PretrainedConfig, num_key_value_heads: Heads, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers, while it is inside every layer's window; nothing for an encoder.

    Args:
        config: gives `head_dim`, or `hidden_size` and `num_attention_heads`.
        num_key_value_heads: that each layer caches.
        dtype: of the cache.
    """
    return 0 if is_encoder(config.model_type) else key_value_bytes_per_token(config, num_key_value_heads, dtype)


def key_value_bytes_per_token(config: PretrainedConfig, num_key_value_heads: Heads, dtype: torch.dtype) -> int:
    """Keys and values that are computed for one token in all layers, kept or not."""
    return sum(map(sum, map(_keys_and_values, num_key_value_heads))) * _head_dim(config) * dtype.itemsize


def cache_bytes_per_token_beyond_window(
    config: PretrainedConfig, num_key_value_heads: Heads, dtype: torch.dtype
) -> int:
    """The same for a token beyond the sliding window: only layers that attend to everything keep growing."""
    windows = layer_windows(config, len(num_key_value_heads))
    full = [heads for heads, window in zip(num_key_value_heads, windows, strict=True) if window is None]
    return cache_bytes_per_token_computed(config, full, dtype)


def cache_bytes_computed(
    config: PretrainedConfig,
    num_key_value_heads: Heads,
    dtype: torch.dtype,
    cache_class: str,
    num_tokens: int,
    batch_size: int = 1,
) -> int:
    """All that a cache of this class keeps after a prompt of `num_tokens` for each of `batch_size` sequences.

    A static cache has room for `num_tokens` then. What quantized caches keep of tokens that they decode, until they
    quantize them too, is not counted.

    Raises:
        Refusal: `cache_class` is unknown.
    """
    kind, total = _known(cache_class), 0
    for heads, window in zip(num_key_value_heads, layer_windows(config, len(num_key_value_heads)), strict=True):
        for cached in _keys_and_values(heads):
            if cached:
                elements = batch_size * cached * _head_dim(config) * kind.kept_tokens(num_tokens, window)
                total += kind.tensor_bytes(elements, dtype)
    return total


def cache_class_obstacle(
    cache_class: str, config: PretrainedConfig, num_tokens: int, device: torch.device
) -> str | None:
    """Why a model of this configuration cannot fill a cache of this class here; None if it can."""
    kind, heads = _known(cache_class), key_value_heads(config)
    windows = layer_windows(config, len(heads))
    if kind.missing():
        return f"needs {kind.missing()}, which is not installed"
    if kind.offloads and device.type != "cuda":
        return f"moves layers between the host and a GPU, and the model is on {device.type}"
    if cache_class == "offloaded_static" and all(windows):
        return "moves layers without a sliding window only, and there is none"
    if kind.quantizes and any(windows):
        return "keeps no sliding windows"
    if kind.quantizes and cached_heads(config) != heads:
        return "keeps keys and values of every layer, and here layers borrow them"
    if any(n * _head_dim(config) * num_tokens % kind.group_elements for n in heads):
        return f"needs a multiple of {kind.group_elements} elements, which {num_tokens} tokens do not give"
    return None


def cache_bytes_by_class(model: PreTrainedModel, num_tokens: int) -> dict[str, float]:
    """Bytes per token that the model keeps of `num_tokens` tokens, for every class without a `cache_class_obstacle`."""
    usable = [c for c in CACHE_CLASSES if cache_class_obstacle(c, model.config, num_tokens, model.device) is None]
    return {name: _measured(model, name, num_tokens) / num_tokens for name in usable}


def cache_bytes_per_token_measured(model: PreTrainedModel, num_tokens: int = 8) -> float:
    """Fill a DynamicCache with `num_tokens` tokens and count the bytes of its tensors.

    Beyond a sliding window these are views of what was read in one piece, which the next token lets go of.
    """
    return _measured(model, "dynamic", num_tokens) / num_tokens


def key_value_heads(config: PretrainedConfig) -> list[int] | None:
    """KV heads of each layer as any decoder's configuration says; None where it says nothing about heads."""
    if getattr(config, "layer_plan", None) is not None:
        return heads_of_layers(config, [row["num_key_value_heads"] for row in config.layer_plan])
    repeats_first = getattr(config, "new_decoder_architecture", False)  # a native Falcon caches what it has repeated
    one = getattr(config, "multi_query", False) and not repeats_first
    default = 1 if one else getattr(config, "num_attention_heads", None)
    said = None if hasattr(config, "multi_query") else getattr(config, "num_key_value_heads", None)
    heads = said or default  # GPT-BigCode says a number too, which need not agree with its switch
    return None if heads is None else [heads] * config.num_hidden_layers


def heads_of_layers(config: PretrainedConfig, heads: list[int]) -> list[int]:
    """Of each layer, from those of each attention: an ALBERT's layers compute with the attention of their group."""
    groups = getattr(config, "num_hidden_groups", None)
    if groups is None:
        return heads
    layers_of_group = config.num_hidden_layers / groups
    return [heads[int(layer_idx / layers_of_group)] for layer_idx in range(config.num_hidden_layers)]


def cached_heads(config: PretrainedConfig) -> Heads | None:
    """KV heads that each layer caches; `key_value_heads` but for layers that borrow what others cache."""
    heads = key_value_heads(config)
    rows = getattr(config, "layer_plan", None)
    return heads if rows is None else cached_heads_of(LayerPlan.from_dict(row) for row in rows)


def read_heads(config: PretrainedConfig) -> Heads | None:
    """KV heads that each layer reads of the cache while a token is decoded, whoever cached them.

    A layer that borrows an attention matrix reads values only; borrowed keys and values are read again.
    """
    heads = key_value_heads(config)
    rows = getattr(config, "layer_plan", None) or [{}] * len(heads or [])
    return heads and [n if row.get("query_from") is None else (0, n) for n, row in zip(heads, rows, strict=True)]


def cached_heads_of(rows: Iterable[LayerPlan]) -> Heads:
    cached = [
        tuple(row.num_key_value_heads if lender is None else 0 for lender in (row.key_from, row.value_from))
        for row in rows
    ]
    return [keys if keys == values else (keys, values) for keys, values in cached]


def layer_windows(config: PretrainedConfig, num_layers: int) -> list[int | None]:
    """Tokens that each layer attends to, its own included; None where it attends to everything."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * num_layers
    return [None if kind == "full_attention" else window for kind in types]


@torch.no_grad()
def _measured(model: PreTrainedModel, cache_class: str, num_tokens: int) -> int:
    cache = CACHE_CLASSES[cache_class].make(model.config, num_tokens)
    tokens = torch.zeros(1, num_tokens, dtype=torch.long, device=model.device)
    model(tokens, **with_cache(model, cache))
    return bytes_of_layers(cache.layers)


def bytes_of_layers(layers) -> int:
    """That the layers of a cache keep in tensors."""
    stored = [tensor for layer in layers for tensor in _stored_tensors(layer)]
    return sum(tensor.numel() * tensor.element_size() for tensor in stored)


def _stored_tensors(layer) -> Iterator[torch.Tensor]:
    """What a layer of a cache keeps: its keys and values, and what became of them where it quantizes."""
    for name in ("keys", "values", "_quantized_keys", "_quantized_values"):
        yield from _inner_tensors(getattr(layer, name, None))


def _inner_tensors(value) -> Iterator[torch.Tensor]:
    """Of tensors made of tensors, and of containers."""
    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        value = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _inner_tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _inner_tensors(item)


def _keys_and_values(heads: int | tuple[int, int]) -> tuple[int, int]:
    return heads if isinstance(heads, tuple) else (heads, heads)


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _known(cache_class: str) -> CacheClass:
    if cache_class not in CACHE_CLASSES:
        raise Refusal(f"cache class '{cache_class}' is unknown. Known: {', '.join(CACHE_CLASSES)}.")
    return CACHE_CLASSES[cache_class]
