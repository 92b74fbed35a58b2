"""The similarity of attention against the matrices that eager attention returns, and what it holds at once."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_gqa import Refusal
from hf_gqa.analyze.attention_calls import AttentionCall, attention_mixed_by
from hf_gqa.analyze.similarity import attention_similarity, cosines, probabilities
from hf_gqa.convert.donor import donor_from_model
from hf_gqa.runtime.grouped_attention import NAME, explicit, grouped_sdpa

from .tiny_donors import tiny_donor


def samples(count: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, 99, (count, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def slow_similarity(model, tokens_NT: torch.Tensor) -> torch.Tensor:
    """From whole matrices of all layers."""
    model.set_attn_implementation("eager")
    found = []
    for tokens_T in tokens_NT:
        attentions = model(tokens_T[None], output_attentions=True, use_cache=False).attentions
        flat = torch.stack([matrix.flatten().double() for matrix in attentions])
        flat = flat / flat.norm(dim=1, keepdim=True)
        found.append(flat @ flat.T)
    return torch.stack(found).mean(0)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"num_key_value_heads": 2, "num_hidden_layers": 3}),
        ("gpt2", {"num_hidden_layers": 3, "scale_attn_by_inverse_layer_idx": True}),
        ("gemma3_text", {}),  # sliding and full, norms of queries and keys
        ("qwen2", {}),
    ],
)
@pytest.mark.parametrize("block_elements", [1, 300, 1 << 20])
def test_similarity_is_that_of_the_whole_matrices(model_type, changes, block_elements):
    model, tokens_NT = tiny_donor(model_type, **changes), samples(3, 17)
    before = model.config._attn_implementation
    found = attention_similarity(model, donor_from_model(model).layout, tokens_NT, block_elements=block_elements)
    assert model.config._attn_implementation == before and ALL_ATTENTION_FUNCTIONS[NAME] is grouped_sdpa
    torch.testing.assert_close(found, slow_similarity(model, tokens_NT), atol=1e-5, rtol=1e-5)
    assert (found.diagonal() - 1).abs().max() < 1e-9 and found[0, 1] < 0.99


@pytest.mark.parametrize("extras", [{}, {"softcap": 2.0}, {"s_aux": torch.randn(4)}, {"bias": True}, {"mask": True}])
def test_probabilities_are_those_that_mix_values(extras):
    """With the unit matrix for values, what attention puts out is its matrix."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    bias = torch.randn(1, 4, 6, 6) if extras.get("bias") else None
    mask = torch.rand(1, 1, 6, 6).ge(0.3) | torch.eye(6, dtype=torch.bool) if extras.get("mask") else None
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    options = {"scaling": 0.4, "position_bias": bias, **{k: extras[k] for k in ("softcap", "s_aux") if k in extras}}
    call = AttentionCall(
        module=torch.nn.Identity(), query=query, key=key, value=key, attention_mask=mask, options=options
    )
    allowed = causal if mask is None else mask
    if bias is not None:  # explicit takes one mask: the sum of both
        allowed = torch.where(allowed, bias, torch.finfo(torch.float32).min)
    unit = torch.eye(6).expand(1, 2, 6, 6)
    wanted = explicit(query, key, unit, allowed, 0.4, 0.0, extras.get("softcap"), extras.get("s_aux"))
    for head in range(4):
        found = torch.cat([probabilities(call, head, slice(0, 4)), probabilities(call, head, slice(4, 8))])
        torch.testing.assert_close(found, wanted[0, head])


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at once; views of those from before count for nothing."""

    def __init__(self, before: list[torch.Tensor]):
        super().__init__()
        self.live, self.most, self.known = 0, 0, {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        size = storage.nbytes()
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def calls_of(layers: int, heads: int, tokens: int) -> list[AttentionCall]:
    tensors = [torch.randn(3, 1, heads, tokens, 8) for _ in range(layers)]
    module = torch.nn.Identity()
    return [
        AttentionCall(module=module, query=q, key=k, value=v, attention_mask=None, options={}) for q, k, v in tensors
    ]


def test_all_matrices_are_never_held_at_once():
    layers, heads, tokens, block_elements = 6, 8, 128, 6 * 128 * 16
    calls = calls_of(layers, heads, tokens)
    whole_bytes = layers * heads * tokens * tokens * 4
    before = [call.query for call in calls]  # keys and values lie in the same storage
    with LiveBytes(before) as small:
        found = cosines(calls, block_elements)
    with LiveBytes(before) as large:
        wanted = cosines(calls, layers * tokens * tokens)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    causal_masks = layers * tokens * tokens
    assert block_elements * 4 <= small.most < 4 * block_elements * 4 + causal_masks < whole_bytes / 10
    assert large.most > 4 * small.most  # what is counted is what grows with the block


def test_attention_is_given_back_when_something_fails():
    model = tiny_donor("llama")
    before = model.config._attn_implementation

    def fail(layer_idx, call):
        raise RuntimeError("on purpose")

    layout = donor_from_model(model).layout
    with pytest.raises(RuntimeError, match="on purpose"), attention_mixed_by(model, layout, fail):
        model(samples(1, 4))
    assert model.config._attn_implementation == before and ALL_ATTENTION_FUNCTIONS[NAME] is grouped_sdpa


@torch.no_grad()
def test_other_models_are_not_touched():
    model, other = tiny_donor("llama"), tiny_donor("llama", seed=1)
    other.set_attn_implementation(NAME)
    wanted = other(samples(1, 4)).logits
    with attention_mixed_by(model, donor_from_model(model).layout, lambda layer_idx, call: call.mixed() * 0):
        assert torch.equal(other(samples(1, 4)).logits, wanted)


def test_layers_that_cannot_be_heard_are_refused():
    """One that computes its attention by itself would seem to borrow for nothing."""
    model = tiny_donor("llama")
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **kwargs: (attention.o_proj(hidden_states), None)
    with pytest.raises(Refusal, match=r"layers 1 do not call their attention through transformers' AttentionInterface"):
        attention_similarity(model, donor_from_model(model).layout, samples(1, 4))
    assert ALL_ATTENTION_FUNCTIONS[NAME] is grouped_sdpa


def test_families_outside_the_interface_are_refused():
    model = tiny_donor("bloom")
    with pytest.raises(Refusal, match="does not call its attention through transformers' AttentionInterface"):
        attention_similarity(model, donor_from_model(model).layout, samples(1, 4))
