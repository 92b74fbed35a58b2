"""How fast an encoder-decoder reads a source and decodes, and what the bytes that its decoder moves would allow."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PretrainedConfig, PreTrainedModel

from ...refusal import Refusal
from ...runtime.native_call import with_cache
from .seq2seq_cache import cache_bytes_of_a_token
from .speed import FEWEST_REPETITIONS, Decoding, Timing, now


@torch.inference_mode()
def read_source_and_decode(
    model: PreTrainedModel, tokens: torch.Tensor, decode_tokens: int
) -> tuple[torch.Tensor, Timing]:
    """Greedy decoding as `generate` does it, without what `generate` does besides.

    Args:
        tokens: sources `[B, S]` without padding.
        decode_tokens: steps of one token after the first.

    Returns:
        The answers `[B, 1 + decode_tokens]`, and how long they took; the first token takes the encoder's time too.
    """
    cached = with_cache(model, EncoderDecoderCache(DynamicCache(), DynamicCache()))
    token, answer = tokens.new_full((len(tokens), 1), start_token(model)), []

    def step(token: torch.Tensor, encoded) -> torch.Tensor:
        logits = model(encoder_outputs=encoded, decoder_input_ids=token, **cached).logits
        answer.append(logits[:, -1:].float().argmax(dim=-1))
        return answer[-1]

    started = now(model.device)
    encoded = model.get_encoder()(input_ids=tokens, return_dict=True)
    token = step(token, encoded)
    first = now(model.device)
    for _ in range(decode_tokens):
        token = step(token, encoded)
    timing = Timing(first_token_seconds=first - started, decode_seconds=now(model.device) - first)
    return torch.cat(answer, dim=1), timing


def start_token(model: PreTrainedModel) -> int:
    """With which the decoder begins."""
    found = [
        getattr(config, name, None)
        for config in (model.generation_config, model.config)
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    ]
    return next((token for token in found if isinstance(token, int)), 0)


@torch.inference_mode()
def step_weight_bytes(model: PreTrainedModel, batch_size: int) -> int:
    """Bytes of the weights that one step of decoding computes with, found by doing one.

    The encoder, and the projections of what it says, are not among them: those are done once. Embeddings that are only
    looked up give one row for each sequence; tied to the head they are read in full.
    """
    source = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    token = source.new_full((1, 1), start_token(model))
    encoded = model.get_encoder()(input_ids=source, return_dict=True)
    cached = with_cache(model, EncoderDecoderCache(DynamicCache(), DynamicCache()))
    model(encoder_outputs=encoded, decoder_input_ids=token, **cached)
    used: dict[int, nn.Module] = {}
    hooks = [
        module.register_forward_hook(lambda module, *_: used.update({id(module): module}))
        for module in model.modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    try:
        model(encoder_outputs=encoded, decoder_input_ids=token, **cached)
    finally:
        for hook in hooks:
            hook.remove()
    in_full, rows = {}, {}
    for module in used.values():
        kind = rows if isinstance(module, nn.Embedding) else in_full
        kind.update({id(parameter): parameter for parameter in module.parameters(recurse=False)})
    moved = sum(parameter.numel() * parameter.element_size() for parameter in in_full.values())
    looked_up = [parameter for number, parameter in rows.items() if number not in in_full]
    return moved + sum(batch_size * parameter.shape[1] * parameter.element_size() for parameter in looked_up)


def allowed_speedup(
    donor: PreTrainedModel, student: PreTrainedModel, batch_size: int, source_tokens: int, decode_tokens: int
) -> float:
    """Bytes that the donor's decoder moves in all timed steps over the student's, were nothing else to take time."""
    moved = []
    for model in (donor, student):
        own, cross = cache_bytes_of_a_token(model.config, model.dtype)
        steps = decode_tokens * (step_weight_bytes(model, batch_size) + batch_size * cross * source_tokens)
        decoded = sum(range(2, decode_tokens + 2))  # that each step attends to, itself included
        moved.append(steps + batch_size * own * decoded)
    return moved[0] / moved[1]


def check_seq2seq_speed(
    donor: PreTrainedModel,
    student: PreTrainedModel,
    batch_sizes: Sequence[int],
    source_lengths: Sequence[int],
    decode_tokens: int,
    repetitions: int,
) -> None:
    """Raises Refusal for too few repetitions, or more tokens than the models have positions for."""
    if repetitions < FEWEST_REPETITIONS:
        raise Refusal(f"speed: repetitions = {repetitions} are too few for a median. Use {FEWEST_REPETITIONS} or more.")
    limits = zip(position_limits(donor.config), position_limits(student.config), strict=True)
    asked = (("source", max(source_lengths)), ("target", decode_tokens + 1))
    for (what, tokens), both in zip(asked, limits, strict=True):
        limit = min((each for each in both if each is not None), default=None)
        if limit is not None and tokens > limit:
            raise Refusal(
                f"speed: a {what} of {tokens:,} tokens is more than the {limit:,} positions of the models. Use fewer."
            )


def position_limits(config: PretrainedConfig) -> tuple[int | None, int | None]:
    """Tokens of (source, target) that a model has positions for; None where positions are relative, without an end."""
    either = getattr(config, "max_position_embeddings", None)
    return tuple(getattr(config, f"max_{which}_position_embeddings", either) for which in ("encoder", "decoder"))


SEQ2SEQ_DECODING = Decoding(run=read_source_and_decode, allowed_speedup=allowed_speedup, check=check_seq2seq_speed)
