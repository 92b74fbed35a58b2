"""transformers renames what it hands to an attention: known names are found, unknown ones refused, nothing is swallowed."""

import inspect
import json
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, EncoderDecoderCache, StaticCache

import hf_gqa
from hf_gqa import Refusal, convert
from hf_gqa.convert.decoding import check_decoding
from hf_gqa.convert.families import FAMILIES, load_family
from hf_gqa.convert.fresh_process import probe
from hf_gqa.runtime import native_call
from hf_gqa.runtime.native_call import NativeCall, cache_argument, with_cache

from . import warm_process
from .seq2seq_donors import encoder_inputs, seq2seq_donor
from .tiny_donors import ALL_MODEL_TYPES, MODEL_TYPES, SEQ2SEQ_TYPES, VOCAB_SIZE, tiny_donor, tokens_and_mask


LATER = "key_value_store"  # what "the next release" calls the cache
EVERY_FAMILY = [*ALL_MODEL_TYPES, *SEQ2SEQ_TYPES]


def bundle(model_type: str, **plan):
    return convert(tiny_donor(model_type), export="bundle", **{"num_key_value_heads": 2} | plan).eval()


def with_renamed(native: type, argument: str) -> type:
    """The native class as a release would have it that calls an argument of `forward` something else."""

    def forward(self, *args, **kwargs):
        return native.forward(self, *args, **kwargs)

    signature = inspect.signature(native.forward)
    forward.__signature__ = signature.replace(
        parameters=[p.replace(name=LATER) if p.name == argument else p for p in signature.parameters.values()]
    )
    return type(native.__name__, (native,), {"forward": forward})


def of_next_release(model_type: str, argument: str) -> type:
    """Our attention class of a family, made again on a native class whose `argument` (our name) has another name."""
    ours = load_family(model_type).base_class.attention_class
    natives = [c for c in ours.__bases__ if not issubclass(c, NativeCall)]
    renamed = with_renamed(natives[-1], ours.handed_over[argument])
    bases = tuple(renamed if base is natives[-1] else base for base in ours.__bases__)
    return type(ours.__name__, bases, dict(vars(ours)))


@pytest.mark.parametrize("model_type", EVERY_FAMILY)
def test_every_argument_that_is_needed_must_have_a_known_name(model_type):
    needed = load_family(model_type).base_class.attention_class.handed_over
    bidirectional = load_family(model_type).donor_layout.bidirectional
    assert {"attention_mask"} | ({"cache"} - ({"cache"} if bidirectional else set())) <= set(needed)
    for argument in needed:
        with pytest.raises(ImportError) as refusal:
            of_next_release(model_type, argument)
        said = str(refusal.value)
        assert LATER in said and f"transformers {transformers.__version__}" in said and "hf-gqa refresh" in said
        assert re.search(rf"\({argument}: ", said) and f"hf_gqa {hf_gqa.__version__}" in said


def test_argument_that_is_new_and_not_needed_is_no_reason_to_refuse_a_class_but_is_never_ignored():
    ours = load_family("llama").base_class.attention_class
    native = ours.__bases__[-1]

    class Grown(native):
        def forward(self, hidden_states, position_embeddings, attention_mask=None, cache=None, sinks=None, **kwargs):
            pass

    grown = type("Grown", (*ours.__bases__[:-1], Grown), dict(vars(ours)))
    attention = grown(bundle("llama").config, 0)
    given = torch.zeros(1, 2, 32), (torch.ones(1, 2, 8), torch.zeros(1, 2, 8))
    assert attention(*given, sinks=None)[0].shape == (1, 2, 32)
    with pytest.raises(ValueError, match=r"layer 0 was handed 'sinks', which hf_gqa .* does not know\. Install"):
        attention(*given, sinks=torch.ones(4))


def test_family_that_is_refused_leaves_the_others_alone(monkeypatch):
    from transformers.models.qwen3 import modeling_qwen3

    monkeypatch.delitem(sys.modules, "hf_gqa.runtime.modeling_gqa_qwen3", raising=False)
    renamed = with_renamed(modeling_qwen3.Qwen3Attention, cache_argument(modeling_qwen3.Qwen3Attention.forward))
    monkeypatch.setattr(modeling_qwen3, "Qwen3Attention", renamed)
    with pytest.raises(
        Refusal, match=r"^family 'qwen3' cannot be imported: GQAQwen3Attention: Qwen3Attention of transf"
    ):
        FAMILIES.module("qwen3")
    assert FAMILIES.module("llama")


LOADED_LATER = """
import inspect, sys
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

signature = inspect.signature(LlamaAttention.forward)
names = {"cache": sys.argv[2], "past_key_values": sys.argv[2]}
LlamaAttention.forward.__signature__ = signature.replace(
    parameters=[p.replace(name=names.get(p.name, p.name)) for p in signature.parameters.values()]
)
AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


def test_bundle_is_refused_when_its_code_is_imported(tmp_path):
    bundle("llama").save_pretrained(tmp_path / "published")
    done = warm_process.run(
        ["-c", LOADED_LATER, str(tmp_path / "published"), LATER], tmp_path, HF_MODULES_CACHE=str(tmp_path)
    )
    assert done.returncode and re.search(rf"ImportError: GQALlamaAttention: .* does not take .*{LATER}", done.stderr)


def test_cache_under_another_name_is_not_swallowed():
    attention = bundle("llama").model.layers[0].self_attn
    given = torch.zeros(1, 2, 32), (torch.ones(1, 2, 8), torch.zeros(1, 2, 8))
    with pytest.raises(ValueError, match=rf"layer 0 was handed a cache as '{LATER}', which it does not use\. Install"):
        attention(*given, **{LATER: DynamicCache()})


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_encoder_takes_no_cache(model_type, name):
    layout = load_family(model_type).donor_layout
    attention = bundle(model_type).base_model.get_submodule(layout.mixing_module(0))
    with pytest.raises(ValueError, match=rf"was handed a cache as '{name}', which it does not use"):
        attention(torch.zeros(1, 2, 32), attention_mask=None, **{name: DynamicCache()})


def drop_cache(monkeypatch, model_type: str, layers: tuple[int, ...] = (0, 1)) -> None:
    """What **kwargs did: the attention never sees its cache."""
    ours = load_family(model_type).base_class.attention_class
    compute = ours.compute

    def without(self, hidden_states, cache=None, **handed):
        kept = {} if self.layer_idx in layers else {"cache": cache}
        return compute(self, hidden_states, **kept, **handed)

    monkeypatch.setattr(ours, "compute", without)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_first_forward_notices_that_the_cache_does_not_grow(monkeypatch, model_type):
    student, (tokens, mask) = bundle(model_type), tokens_and_mask()
    drop_cache(monkeypatch, model_type)
    with pytest.raises(
        RuntimeError, match=rf"did not grow by the {tokens.shape[1]} tokens .* 0 \(0 to 0\), 1 \(0 to 0\)"
    ):
        student(tokens, attention_mask=mask, **with_cache(student, DynamicCache(config=student.config)))


@pytest.mark.parametrize("model_type", SEQ2SEQ_TYPES)
def test_first_forward_of_an_encoder_decoder_notices_it_too(monkeypatch, model_type):
    donor = seq2seq_donor(model_type)
    student = convert(donor, export="bundle", num_key_value_heads=2).eval()
    drop_cache(monkeypatch, model_type)
    with pytest.raises(RuntimeError, match=r"did not grow by the 5 tokens"):
        caches = EncoderDecoderCache(DynamicCache(), DynamicCache())
        tokens = torch.ones(2, 5, dtype=torch.long)
        student(**encoder_inputs(student), decoder_input_ids=tokens, **with_cache(student, caches))


@pytest.mark.parametrize("how", ["dynamic", "static", "own", "one layer", "generate"])
def test_any_cache_is_checked(monkeypatch, how):
    student, (tokens, mask) = bundle("llama"), tokens_and_mask()
    caches = {"static": StaticCache(config=student.config, max_cache_len=40)}
    cached = with_cache(student, caches.get(how, DynamicCache(config=student.config)))
    drop_cache(monkeypatch, "llama", layers=(1,) if how == "one layer" else (0, 1))
    said = r"LlamaModel: its cache did not grow by .* would be wrong\. Install"
    if how == "static":  # older releases make a mask of its length, which does not fit
        said = rf"{said}|must match the size of tensor"
    with pytest.raises(RuntimeError, match=said):
        if how == "own":
            student(tokens, attention_mask=mask, use_cache=True)
        elif how == "generate":
            student.generate(tokens, attention_mask=mask, max_new_tokens=2, pad_token_id=0)
        else:
            student(tokens, **cached)


@pytest.mark.parametrize("plan", [{}, {"sharing": "cross_layer_kv", "shared_layers": (1,)}])
def test_after_the_first_cache_the_check_is_gone(plan):
    student, (tokens, mask) = bundle("llama", **plan), tokens_and_mask()
    student(tokens, attention_mask=mask, use_cache=False)
    assert student.model._forward_hooks
    student(tokens, attention_mask=mask, use_cache=True)
    assert not student.model._forward_hooks


def test_before_anything_expensive_a_model_that_decodes_wrongly_is_refused(monkeypatch):
    student = bundle("llama")
    check_decoding(student, "mine")
    student(tokens_and_mask()[0], use_cache=True)  # after which the guard is gone
    drop_cache(monkeypatch, "llama")
    with pytest.raises(Refusal, match=r"^mine: what it decodes .* differs from one forward by .* hf-gqa refresh"):
        check_decoding(student, "mine")
    with pytest.raises(Refusal, match=r"^mine: cannot decode from its cache \(.* did not grow by"):
        check_decoding(bundle("llama"), "mine")


@pytest.mark.skipif("m2m_100" not in SEQ2SEQ_TYPES, reason="this transformers cannot configure it")
def test_padding_among_the_tokens_is_no_wrong_decoding():
    """M2M-100 gives padding no position, and counts a chunk's positions from the tokens of that chunk."""
    padding = int(probe(VOCAB_SIZE)[0][0, 3])
    donor = seq2seq_donor("m2m_100", pad_token_id=padding, max_position_embeddings=128)
    check_decoding(convert(donor, export="bundle", num_key_value_heads=2).eval(), "mine")


def test_decoding_is_checked_in_double_precision_too():
    check_decoding(bundle("llama").double(), "mine")


def test_model_with_fewer_positions_than_are_tried_is_refused_with_one_message():
    student = convert(tiny_donor("opt", max_position_embeddings=16), export="bundle", num_key_value_heads=2)
    with pytest.raises(Refusal, match=r"^mine: cannot decode from its cache \(index out of range"):
        check_decoding(student.eval(), "mine")


def test_a_bundle_says_what_it_was_tested_with(tmp_path):
    """Also after three hops of loading and saving."""
    expected = {"version": hf_gqa.__version__, "transformers": list(native_call.TESTED_WITH)}
    model = bundle("llama")
    for hop in range(3):
        model.save_pretrained(tmp_path / str(hop))
        assert json.loads((tmp_path / str(hop) / "config.json").read_text())["hf_gqa"] == expected
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(hop))
    assert "hf_gqa" not in convert(tiny_donor("llama"), num_key_value_heads=2).config.to_dict()


@pytest.mark.parametrize(
    ("version", "tested"),
    [("5.4.0", True), ("5.3.1", False), ("5.24.0", True), ("5.24.7", True), ("5.25.0.dev0", False), ("6.0.0", False)],
)
def test_which_releases_are_in_the_range(monkeypatch, version, tested):
    monkeypatch.setattr(native_call, "TESTED_WITH", ("5.4.0", "5.24.0"))
    assert native_call.is_tested(version) == tested


def test_outside_the_range_it_warns_once(monkeypatch):
    said, asked = [], []
    monkeypatch.setattr(native_call.logger, "warning_once", said.append)  # which says the same words once
    native_call.warn_if_untested()
    assert said == []
    monkeypatch.setattr(native_call, "transformers", SimpleNamespace(__version__="9.9.9"))
    native_call.warn_if_untested()
    native_call.warn_if_untested()
    assert len(set(said)) == 1 and "9.9.9 is installed" in said[0] and "hf-gqa refresh FOLDER" in said[0]
    planned = next(c for c in type(bundle("llama").config).__mro__ if c.__name__ == "PlannedConfig")
    monkeypatch.setitem(planned.__post_init__.__globals__, "warn_if_untested", lambda: asked.append(True))
    bundle("llama")
    assert asked


old_name = pytest.mark.filterwarnings("ignore:.*past_key_values.* is deprecated")


@old_name
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_cache_under_its_name_of_older_releases_is_the_same_cache(model_type):
    """transformers 5.24 takes `past_key_values` for `cache`; what is left-padded shows a mask that was made without it."""
    base, (tokens, mask) = bundle(model_type).base_model, tokens_and_mask()
    cache = DynamicCache(config=base.config)
    with torch.no_grad():
        whole = base(tokens, attention_mask=mask, use_cache=False)[0]
        base(tokens[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, use_cache=True)
        last = base(tokens[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True)[0]
    torch.testing.assert_close(last, whole[:, -1:], atol=1e-4, rtol=1e-4)


@old_name
@pytest.mark.parametrize("model_type", ["falcon", "mpt"])
def test_static_cache_under_its_name_of_older_releases_is_the_same_cache(model_type):
    changes = {"alibi": True} if model_type == "falcon" else {}
    base = convert(tiny_donor(model_type, **changes), export="bundle", num_key_value_heads=2).eval().base_model
    cache, (tokens, mask) = StaticCache(config=base.config, max_cache_len=40), tokens_and_mask()
    with torch.no_grad():
        whole = base(tokens, attention_mask=mask, use_cache=False)[0]
        cached = base(tokens, attention_mask=mask, past_key_values=cache, use_cache=True)[0]
    torch.testing.assert_close(cached[mask.bool()], whole[mask.bool()], atol=1e-4, rtol=1e-4)


def test_early_exit_is_no_cache_that_does_not_grow():
    """Self-speculative decoding runs the first layers alone; the first whole forward is checked all the same."""
    student, (tokens, _) = bundle("llama"), tokens_and_mask(batch=1)
    wanted = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    whole = student.generate(tokens, use_cache=False, **wanted)
    student = bundle("llama")
    assert torch.equal(student.generate(tokens, assistant_early_exit=1, **wanted), whole)
    assert not student.model._forward_hooks


def test_first_forwards_of_several_threads_are_told_apart():
    """One fills a fresh cache while another reads a filled one."""
    student, (tokens, _) = bundle("llama"), tokens_and_mask()
    filled, entered, done = DynamicCache(config=student.config), threading.Event(), threading.Event()
    bundle("llama")(tokens, **with_cache(student, filled))

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            entered.set()
            done.wait(timeout=60)

    student.model.norm.register_forward_hook(wait)
    with ThreadPoolExecutor() as pool:
        other = pool.submit(student, tokens, **with_cache(student, DynamicCache(config=student.config)))
        entered.wait(timeout=60)
        student(tokens[:, :3], **with_cache(student, filled) | {"use_cache": False})
        done.set()
        assert other.result().logits.shape[1] == tokens.shape[1]
    assert not student.model._forward_hooks
