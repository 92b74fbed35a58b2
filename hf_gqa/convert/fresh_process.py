"""Run by `verify` in a process of its own, by its path: load a student as a user without hf_gqa would.

Imports nothing of hf_gqa and makes it impossible to import. Argument: a JSON object with `folder`, `trust_remote_code`,
`dtype`, `model_class`, `logits_file` and `key_weights`: of an encoder, which has no cache to look into, the names of its
keys' weights below the base model, layer by layer. Prints one JSON object as its last line.
"""

import inspect
import json
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin


STEPS = 3  # tokens that are decoded one by one


def main(
    folder: str, trust_remote_code: bool, dtype: str, model_class: str, logits_file: str, key_weights: list[str] | None
) -> dict:
    transformers.utils.logging.disable_progress_bar()
    native = getattr(transformers, model_class, None)
    _, has_head, head = model_class.rpartition("For")
    loader = native or (getattr(transformers, f"AutoModelFor{head}") if has_head else AutoModel)
    model, loading = loader.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        output_loading_info=True,
        **({"trust_remote_code": trust_remote_code} if native is None else {}),
    )
    model.eval()
    inputs, caches = probe_inputs(model.config), empty_caches(model.config) if key_weights is None else []
    cache = EncoderDecoderCache(*caches) if len(caches) == 2 else next(iter(caches), None)
    cached = {} if cache is None else {cache_argument(model): cache, "use_cache": True}
    with torch.no_grad():
        output = body(model)(**inputs, **cached)
    first = first_output(output)
    save_file({"logits": first.contiguous()}, logits_file)
    return {
        "class": type(model).__name__,
        "config_class": type(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)).__name__,
        "missing_keys": sorted(loading["missing_keys"]),
        "unexpected_keys": sorted(loading["unexpected_keys"]),
        "mismatched_keys": sorted(str(key) for key in loading["mismatched_keys"]),
        "heads": heads_in_weights(model, key_weights)
        if cache is None
        else [[cached_heads(kept) for kept in (layer.keys, layer.values)] for c in caches for layer in c.layers],
        "cached_attentions": sum(len(c.layers) for c in caches) if len(caches) == 2 else None,
        "finite": bool(torch.isfinite(first).all()),
        "generated_tokens": generated_tokens(model, inputs),
        "cached_steps": {} if cache is None else cached_steps(model, inputs),
    }


def cache_argument(model) -> str:
    """What the installed transformers calls the argument of a model that takes its cache."""
    known = ("cache", "past_key_values")
    return next(name for name in known if name in inspect.signature(body(model).forward).parameters)


def cached_steps(model, inputs: dict) -> dict[str, float | str]:
    """Of each attention implementation what `cached_against_whole` finds, or why it cannot be had."""
    own, found = model.config._attn_implementation, {}
    for name in dict.fromkeys((own, "sdpa", "eager")):
        try:
            model.set_attn_implementation(name)
        except ValueError as error:  # a class of transformers that has no such implementation
            found[name] = str(error).splitlines()[0]
            continue
        found[name] = cached_against_whole(model, inputs)
    model.set_attn_implementation(own)
    return found


@torch.no_grad()
def cached_against_whole(model, inputs: dict) -> float:
    """How far the logits of a prompt and of tokens after it, one by one from the cache, are from those of one forward.

    Returns:
        The largest difference, in parts of the largest logit (of 1, if that is smaller).
    """
    told = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    inputs = inputs | {told: without_padding(inputs[told], model.config.get_text_config())}
    whole = first_output(body(model)(**inputs, use_cache=False))
    caches = empty_caches(model.config)
    cached = {cache_argument(model): EncoderDecoderCache(*caches) if len(caches) == 2 else caches[0], "use_cache": True}
    tokens, steps, done = inputs[told], [], 0
    for length in (tokens.shape[1] - STEPS, *[1] * STEPS):
        part = inputs | {told: tokens[:, done : done + length]}
        if told == "input_ids":
            part["attention_mask"] = inputs["attention_mask"][:, : done + length]
        steps.append(first_output(body(model)(**part, **cached)))
        done += length
    difference = (torch.cat(steps, dim=1) - whole).abs()
    if told == "input_ids":  # what is padded means nothing
        difference = difference[inputs["attention_mask"].bool()]
    return (difference.max() / whole.abs().max().clamp(min=1)).item()


def without_padding(tokens: torch.Tensor, config) -> torch.Tensor:
    """With another token for each that pads: M2M-100 gives those no position, and counts a chunk's from its own tokens."""
    padding = getattr(config, "pad_token_id", None)
    return tokens if padding is None else tokens.masked_fill(tokens == padding, (padding + 1) % config.vocab_size)


def first_output(output) -> torch.Tensor:
    return (output.logits if "logits" in output else output.last_hidden_state).float()


def heads_in_weights(model, key_weights: list[str]) -> list[int]:
    """KV heads of each layer; a fused projection has the query heads' rows before those of keys and of values."""
    query_heads = model.config.num_attention_heads
    head_dim = model.config.hidden_size // query_heads
    stored = model.base_model.state_dict()
    heads = [len(stored[name]) // head_dim for name in key_weights]
    return [(count - query_heads) // 2 if count > query_heads else count for count in heads]


def empty_caches(config) -> list[DynamicCache]:
    """One for a decoder; with an encoder one for each kind of its attentions, self and cross."""
    return [DynamicCache(config=config) for _ in range(2 if config.is_encoder_decoder else 1)]


def generated_tokens(model, inputs: dict) -> int | None:
    """How many of four were generated, by the plain loop, which Whisper wraps into one of its own; None if it cannot."""
    if not model.can_generate():
        return None
    asked = {name: tensor[:1] for name, tensor in inputs.items() if name != "decoder_input_ids"}
    given = 1 if model.config.is_encoder_decoder else asked["input_ids"].shape[1]
    wanted = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    return GenerationMixin.generate(model, **asked, **wanted).shape[1] - given


def body(model):
    """What is compared: the whole of a language model, the model below any other head."""
    return model if model.can_generate() else model.base_model


def cached_heads(kept: torch.Tensor | None) -> int:
    """Heads of a cache's keys or values; a layer that borrows has none, or some without numbers."""
    return 0 if kept is None or not kept.shape[-1] else kept.shape[1]


def probe_inputs(config) -> dict[str, torch.Tensor]:
    """What a model of this configuration reads: an encoder and its decoder the same tokens, or the encoder sound."""
    tokens, mask = probe(config.get_text_config().vocab_size)
    if not config.is_encoder_decoder:
        return {"input_ids": tokens, "attention_mask": mask}
    if hasattr(config, "num_mel_bins"):  # which is never padded
        shape = (len(tokens), config.num_mel_bins, 2 * config.max_source_positions)
        sound = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return {"input_features": sound, "decoder_input_ids": tokens}
    return {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": tokens}


def probe(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeded tokens `[2, 24]` and their mask; the second row is left-padded by 7."""
    tokens = torch.randint(vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    return tokens, mask


if __name__ == "__main__":
    sys.modules["hf_gqa"] = None  # any import of it now raises ImportError
    print(json.dumps(main(**json.loads(sys.argv[1]))))
