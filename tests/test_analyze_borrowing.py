"""What borrowing costs, tried on the donor, is what the converted student does; prices are those of the real student."""

import pytest
import torch

from hf_gqa import Refusal, convert
from hf_gqa.analyze.borrowing import BORROWED, Sharing, measure_sharings
from hf_gqa.analyze.prices import PriceList
from hf_gqa.analyze.solver import nearest_owners
from hf_gqa.convert.cache_bytes import cache_bytes_per_token_measured
from hf_gqa.convert.donor import donor_from_model

from .tiny_donors import tiny_donor


DONORS = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "qwen2": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen3": {"layer_types": ["full_attention"] * 4},
}


def donor_of(model_type: str):
    return tiny_donor(model_type, num_hidden_layers=4, **DONORS[model_type])


def kinds_of(model) -> list[str]:
    return getattr(model.config, "layer_types", None) or ["attention"] * 4


def rows(count: int = 3, tokens: int = 15) -> torch.Tensor:
    return torch.randint(3, 99, (count, tokens), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("pattern", BORROWED)
@pytest.mark.parametrize("model_type", DONORS)
def test_measured_on_the_donor_is_what_the_student_does(model_type, pattern):
    model, tokens_NT = donor_of(model_type), rows()
    owners = nearest_owners([2, 3], kinds_of(model))
    found = measure_sharings(
        model, donor_from_model(model).layout, tokens_NT, [Sharing(pattern=pattern, owners=owners)], batch_size=2
    )[0]
    student = convert(model, sharing=pattern, shared_layers=[2, 3])
    theirs, ours = (m(tokens_NT, use_cache=False).logits[:, :-1].log_softmax(-1) for m in (model, student))
    kl_N = (theirs.exp() * (theirs - ours)).sum((1, 2))
    loss_N = -ours.gather(-1, tokens_NT[:, 1:, None]).sum((1, 2))
    torch.testing.assert_close(torch.from_numpy(found.kl_N).float(), kl_N, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(found.loss_N).float(), loss_N, rtol=1e-4, atol=1e-4)
    agrees_N = (theirs.argmax(-1) == ours.argmax(-1)).sum(1)
    assert torch.equal(torch.from_numpy(found.agrees_N).long(), agrees_N)
    assert found.kl > 1e-4 and found.tokens == 14


def test_nothing_borrowed_costs_nothing_and_each_sharing_is_its_own():
    model, tokens_NT = donor_of("llama"), rows()
    layout = donor_from_model(model).layout
    one, two = (Sharing(pattern="echo", owners=owners) for owners in ({2: 1}, {3: 0}))
    nothing = Sharing(pattern="echo", owners={})
    free, *found = measure_sharings(model, layout, tokens_NT, [nothing, one, two], batch_size=2)
    assert free.kl == 0 and free.top1_agreement == 1
    alone = [measure_sharings(model, layout, tokens_NT, [sharing], batch_size=2)[0].kl for sharing in (one, two)]
    assert [scores.kl for scores in found] == alone and len(set(alone)) == 2


def test_numbers_that_are_none_are_refused():
    model = donor_of("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(Refusal, match=r"predictions are NaN or Inf\. Use --dtype float32, or check the donor\."):
        measure_sharings(
            model, donor_from_model(model).layout, rows(), [Sharing(pattern="echo", owners={1: 0})], batch_size=2
        )


@pytest.mark.parametrize("pattern", BORROWED)
@pytest.mark.parametrize("model_type", DONORS)
@pytest.mark.parametrize("heads", [None, 1])
def test_prices_are_those_of_the_real_student(model_type, pattern, heads):
    model = donor_of(model_type)
    prices = PriceList(donor_from_model(model), model, heads)
    student = convert(model, sharing=pattern, shared_layers=[2, 3], num_key_value_heads=heads)
    price = prices.of_sharing(pattern, nearest_owners([2, 3], kinds_of(model)))
    assert price.parameters == sum(parameter.numel() for parameter in student.parameters())
    assert price.cache_bytes_per_token == cache_bytes_per_token_measured(student, num_tokens=4)
    for budget in ("cache_bytes_per_token", "parameters"):
        saved = prices.saved(pattern, budget)
        whole = getattr(prices.of_sharing(pattern, {}), budget)
        assert whole - saved[2] - saved[3] == getattr(price, budget)
        assert prices.to_save(pattern, budget, getattr(price, budget)) == saved[2] + saved[3]
    assert prices.saved(pattern, "shared_layers") == [1] * 4 and prices.to_save(pattern, "shared_layers", 2) == 2
