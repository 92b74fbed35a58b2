"""What the blocks of the installed transformers hand to an attention: the one place that knows their names.

transformers renames these keywords now and then (in 5.24 `past_key_values` became `cache`). Python would not notice:
`**kwargs` takes a keyword of any name, and attention that never sees its cache decodes wrongly without an error. So the
names are read from the signature of the native attention when our class is made, what cannot be found there is refused,
and the first forward that has a cache is checked.
"""

import inspect
import threading

import torch
import transformers
from transformers import Cache, EncoderDecoderCache
from transformers.utils import logging


try:
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    PAGED_IN_ATTENTION = "kwargs" in inspect.signature(PagedAttentionCache.update).parameters
except ImportError:  # moved by a later release: then such a cache fails where it is updated
    PagedAttentionCache, PAGED_IN_ATTENTION = (), False

VERSION = "0.2.0"  # of the hf_gqa that this code belongs to
TESTED_WITH = ("5.4.0", "5.24.0")  # oldest and newest transformers that this code was tested with
# Our name of what is handed over -> what native attentions have called it.
NATIVE_NAMES = {
    "attention_mask": ("attention_mask", "mask"),
    "cache": ("cache", "past_key_values", "past_key_value", "layer_past"),
    "key_value_states": ("key_value_states", "encoder_hidden_states"),
}
NOT_NEEDED = {"use_cache", "output_attentions", "position_ids", "cache_position", "hidden_states", "self"}
logger = logging.get_logger("transformers.hf_gqa")
_before = threading.local()  # lengths of the cache at the start of the guarded forward that this thread is in


def tested_with() -> dict:
    """What a bundle's config.json says of its code, under the key `hf_gqa`."""
    return {"version": VERSION, "transformers": list(TESTED_WITH)}


def is_tested(version: str) -> bool:
    """Whether a release of transformers is in the range; a later patch of the newest release is."""
    oldest, newest = (_release(edge) for edge in TESTED_WITH)
    return oldest <= _release(version) and _release(version)[:2] <= newest[:2]


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version: 5, 24 and 0 of 5.24.0.dev0."""
    numbers = []
    for part in version.split(".")[:3]:
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def warn_if_untested() -> None:
    """Once in a process."""
    if not is_tested(transformers.__version__):
        logger.warning_once(
            f"This model's code is of hf_gqa {VERSION}, tested with transformers {TESTED_WITH[0]} to {TESTED_WITH[1]}; "
            f"{transformers.__version__} is installed. A newer hf_gqa may have tested it: hf-gqa refresh FOLDER renews the "
            f"code."
        )


def argument_named(function, names: tuple[str, ...]) -> str | None:
    """The first of the names that is one of the function's arguments."""
    parameters = inspect.signature(function).parameters
    return next((name for name in names if name in parameters), None)


def cache_argument(function) -> str:
    """What a model, or another function of transformers, calls the argument that takes its cache.

    Raises:
        ImportError: it takes none under a name that is known.
    """
    name = argument_named(function, NATIVE_NAMES["cache"])
    if name is None:
        raise ImportError(
            f"{function.__qualname__} of transformers {transformers.__version__} takes no cache under a name that hf_gqa "
            f"{VERSION} knows ({', '.join(NATIVE_NAMES['cache'])}). {_cure()}"
        )
    return name


def with_cache(model: torch.nn.Module, cache) -> dict:
    """The keywords by which a model reads this cache and fills it."""
    return {cache_argument(model.forward): cache, "use_cache": True}


class NativeCall:
    """First mixin of our attention classes: takes what native blocks hand over and calls `compute` with it, in our names.

    The arguments of `compute`, in whichever of the class's mixins it is written, are what the attention needs, whether
    they have defaults or not: the native attention must take each of them.
    """

    makes_itself = frozenset()  # arguments of `compute` that no block of the family hands over

    def __init_subclass__(cls, **options):
        """Read the native signature.

        Raises:
            ImportError: the native attention takes something that is needed under no name that is known.
        """
        super().__init_subclass__(**options)
        native = next(c for c in cls.__mro__ if not issubclass(c, NativeCall) and "forward" in vars(c))
        needed = _arguments_of(cls, "compute") - {"shared_states"} - cls.makes_itself
        needed -= {"cache"} if cls.donor_layout.bidirectional else set()
        needed -= {"position_embeddings"} if cls.donor_layout.rotary is None else set()
        known = {name: (name,) for name in sorted(needed)} | NATIVE_NAMES
        known["position_embeddings"] = cls.donor_layout.position_names
        cls.handed_over = {name: argument_named(native.forward, known[name]) for name in sorted(needed)}
        missing = {name: known[name] for name, found in cls.handed_over.items() if found is None}
        parameters = list(inspect.signature(native.forward).parameters)
        if missing:
            raise ImportError(_unknown_call(cls, native, missing, parameters))
        cls.native_order = parameters[2:]  # after self and hidden_states
        cls.unknown = frozenset(cls.native_order) - NOT_NEEDED - set(cls.handed_over.values()) - {"kwargs", "args"}

    def forward(self, hidden_states, *positional, **handed):
        if positional:
            handed |= dict(zip(self.native_order, positional, strict=False))
        for name, native in self.handed_over.items():
            value = handed.pop(native, None)
            if value is not None:  # a paged cache is `cache`, and before 5.24 beside it `past_key_values` is None
                handed[name] = value
        for name, value in handed.items():
            if isinstance(value, Cache) and name not in self.handed_over:
                raise ValueError(f"{self._where()} was handed a cache as {name!r}, which it does not use. {_cure()}")
            if name in self.unknown and value is not None and value is not False:
                raise ValueError(
                    f"{self._where()} was handed {name!r}, which hf_gqa {VERSION} does not know. {_cure()}"
                )
        return self.compute(hidden_states, **handed)

    def _where(self) -> str:
        return f"{type(self).__name__} of layer {getattr(self, 'layer_idx', '?')}"


def _arguments_of(cls: type, method: str) -> set[str]:
    """Names of the arguments that any class of the hierarchy takes by name in this method."""
    found = set()
    for base in cls.__mro__:
        if method in vars(base):
            parameters = inspect.signature(vars(base)[method]).parameters.values()
            found |= {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
    return found - {"self", "hidden_states"}


def _unknown_call(cls: type, native: type, missing: dict[str, tuple[str, ...]], parameters: list[str]) -> str:
    known = "; ".join(f"{name}: {', '.join(names)}" for name, names in missing.items())
    return (
        f"{cls.__name__}: {native.__name__} of transformers {transformers.__version__} does not take what hf_gqa {VERSION} "
        f"needs, under no name that it knows ({known}). Its arguments are {', '.join(parameters[1:])}. The model would compute "
        f"wrongly without an error. {_cure()}"
    )


def _cure() -> str:
    return (
        f"Install transformers {TESTED_WITH[0]} to {TESTED_WITH[1]} ({transformers.__version__} is here), or a newer hf_gqa and "
        f"run hf-gqa refresh on the model's folder."
    )


def is_paged(value) -> bool:
    """Whether it is the cache of transformers' continuous batching, which is no `Cache`."""
    return isinstance(value, PagedAttentionCache)


def update_paged(cache, key, value, layer_idx: int, handed: dict):
    """Keys and values with the earlier ones of their sequences, as transformers' continuous batching keeps them.

    Args:
        handed: the keywords for the attention function. In releases whose cache takes them it is updated here and changes
            them; in older ones the attention function finds it among them and updates it.
    """
    if PAGED_IN_ATTENTION:
        return cache.update(key, value, layer_idx, kwargs=handed)
    handed["cache"] = cache
    return key, value


def guard_cache(stack: torch.nn.Module, layers: dict[int, int]) -> None:
    """Check the first forward of a stack of blocks that has a cache: it must grow by the tokens that were given.

    Outside of compilation, and not while the stack is cut short (`assistant_early_exit` lowers `num_hidden_layers` for a
    while). After that forward the check is gone.

    Args:
        stack: the module that hands its cache to its blocks.
        layers: those that keep keys and values, and their KV heads; nothing is checked without any.
    """
    if layers:
        stack.guarded_layers, stack.guarded_depth = layers, stack.config.num_hidden_layers
        stack.guards = (
            stack.register_forward_pre_hook(_remember_lengths, with_kwargs=True),
            stack.register_forward_hook(_check_growth, with_kwargs=True),
        )


def _remember_lengths(stack, args, kwargs) -> None:
    if not torch.compiler.is_compiling():
        cache = cache_in((*args, *kwargs.values()))
        if cache is not None:
            _check_heads(cache, stack.guarded_layers)
        _before.lengths = [0] * len(stack.guarded_layers) if cache is None else _lengths(cache, stack.guarded_layers)


def _check_growth(stack, args, kwargs, output) -> None:
    if torch.compiler.is_compiling():
        return
    before, unused = vars(_before).pop("lengths", None), stack.training or kwargs.get("use_cache", True) is False
    outputs = tuple(output.values()) if isinstance(output, dict) else output
    cache = cache_in((*args, *kwargs.values(), *(outputs if isinstance(outputs, tuple) else ())))
    # a cache that is handed over need not be used in training, or against use_cache
    if cache is None or before is None or unused or stack.config.num_hidden_layers != stack.guarded_depth:
        return
    after, tokens = _lengths(cache, stack.guarded_layers), outputs[0].shape[1]
    stalled = [
        f"{layer_idx} ({old} to {new})"
        for layer_idx, old, new in zip(stack.guarded_layers, before, after, strict=True)
        if new - old != tokens
    ]
    if stalled:
        raise RuntimeError(
            f"{type(stack).__name__}: its cache did not grow by the {tokens} tokens it was given in layers "
            f"{', '.join(stalled)}, so that what is decoded with it would be wrong. {_cure()}"
        )
    for handle in stack.guards:
        handle.remove()


def cache_in(values) -> Cache | None:
    """The first that is a cache, such as of a model's output's values; None without one."""
    return next((value for value in values if isinstance(value, Cache)), None)


def _lengths(cache: Cache, layers: dict[int, int]) -> list[int]:
    return [int(_of_decoder(cache).get_seq_length(layer_idx)) for layer_idx in layers]


def _check_heads(cache: Cache, layers: dict[int, int]) -> None:
    """Refuse a cache that somebody filled with one number of heads for all layers, such as peft for a prefix."""
    for layer_idx, heads in layers.items():
        kept = _of_decoder(cache).layers[layer_idx : layer_idx + 1]
        keys = getattr(kept[0], "keys", None) if kept else None
        if isinstance(keys, torch.Tensor) and keys.dim() == 4 and keys.shape[1] != heads:
            raise ValueError(
                f"the cache holds {keys.shape[1]} KV heads for layer {layer_idx}, which has {heads}. A prefix (peft's prefix "
                f"tuning) has one number for all layers: train a LoRA instead, or convert with one number of KV heads."
            )


def _of_decoder(cache: Cache) -> Cache:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
