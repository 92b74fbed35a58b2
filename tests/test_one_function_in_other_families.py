"""A trained Llama rewritten as other families that can compute the same function: all convert to the same logits.

What a family has and a Llama has not must be zero, one, or switched off. That leaves out families whose norms or blocks are of
another kind: docs/families.md says which.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_gqa import convert

from .conformance import assert_close_for_float32
from .tiny_donors import tiny_donor


DONOR = Path(__file__).parent.parent / "examples/donor"
State = dict[str, torch.Tensor]


def as_it_is(state: State) -> State:
    return state


def fused_as_in_phi3(state: State) -> State:
    """Queries, keys and values in one projection, gate and up in another."""
    fused = dict(state)
    for name in [name for name in state if name.endswith(("q_proj.weight", "gate_proj.weight"))]:
        parts = ("q_proj", "k_proj", "v_proj") if "q_proj" in name else ("gate_proj", "up_proj")
        whole = name.replace(parts[0], "qkv_proj" if "q_proj" in name else "gate_up_proj")
        fused[whole] = torch.cat([fused.pop(name.replace(parts[0], part)) for part in parts])
    return fused


def less_one_as_in_gemma(state: State) -> State:
    """Gemma's norms add one to their weights, and it multiplies embeddings by the root of their width, here 16."""
    norms = {name: tensor - 1 for name, tensor in state.items() if "norm" in name}
    return state | norms | {"model.embed_tokens.weight": state["model.embed_tokens.weight"] / 16}


def one_expert_as_in_mixtral(state: State) -> State:
    """A router with one expert always gives it the weight one."""
    found = {name: tensor for name, tensor in state.items() if ".mlp." not in name}
    for name in [name for name in state if name.endswith("gate_proj.weight")]:
        gate, up, down = (state[name.replace("gate_proj", part)] for part in ("gate_proj", "up_proj", "down_proj"))
        experts = name.replace("gate_proj.weight", "experts")
        found |= {f"{experts}.gate_up_proj": torch.cat([gate, up])[None], f"{experts}.down_proj": down[None]}
    return found


def mirrored_as_in_stablelm(state: State) -> State:
    """StableLM centres what it norms: a stream [x, -x] is centred, and its variance is the mean square of x.

    It then has twice the width, so twice the heads: each Llama head twice, side by side, both read with half the weight.
    """
    found = {}
    for name, tensor in state.items():
        if "norm" in name:
            found[name] = tensor.repeat(2)
        elif "embed_tokens" in name:
            found[name] = torch.cat([tensor, -tensor], dim=1)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            read = tensor if "down" in name else in_heads(tensor.t() / 2).t()
            found[name] = torch.cat([read, -read])
        else:
            asked = in_heads(tensor) if "self_attn" in name else tensor
            found[name] = torch.cat([asked, torch.zeros_like(asked)], dim=1)
    return found


def in_heads(rows: torch.Tensor) -> torch.Tensor:
    """Each head's 32 rows twice."""
    return rows.unflatten(0, (-1, 32)).repeat_interleave(2, dim=0).flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """What of a configuration differs from the Llama's, and how its tensors are rewritten."""

    changes: dict = field(default_factory=dict)
    rewritten: Callable[[State], State] = as_it_is


CARRIERS = {
    "mistral": Carrier(changes={"sliding_window": None}),
    "qwen2": Carrier(changes={"use_sliding_window": False}),
    "granite": Carrier(changes={"attention_multiplier": 32**-0.5}),
    "smollm3": Carrier(changes={"no_rope_layers": [1] * 6, "use_sliding_window": False, "pad_token_id": 0}),
    "phi3": Carrier(changes={"pad_token_id": 0}, rewritten=fused_as_in_phi3),
    "gemma": Carrier(changes={"tie_word_embeddings": False}, rewritten=less_one_as_in_gemma),
    "mixtral": Carrier(
        changes={"sliding_window": None, "num_local_experts": 1, "num_experts_per_tok": 1},
        rewritten=one_expert_as_in_mixtral,
    ),
    "stablelm": Carrier(
        changes={
            "hidden_size": 512,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "layer_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            "tie_word_embeddings": False,
        },
        rewritten=mirrored_as_in_stablelm,
    ),
}


def rewritten(llama: LlamaForCausalLM, model_type: str):
    """The same function as a model of another family."""
    kept = ("architectures", "model_type", "transformers_version", "auto_map")
    settings = {name: value for name, value in llama.config.to_dict().items() if name not in kept}
    other_class, carrier = type(tiny_donor(model_type)), CARRIERS[model_type]
    other = other_class(other_class.config_class(**settings | carrier.changes)).eval()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in other.state_dict().items()}
    other.load_state_dict(zeros | carrier.rewritten(llama.state_dict()))
    return other


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(DONOR, dtype=torch.float32).eval()


@pytest.mark.skipif(not DONOR.is_dir(), reason="the tests run without the checkout's examples")
@pytest.mark.parametrize("model_type, groups", [(name, 1 + turn % 2) for turn, name in enumerate(CARRIERS)])
def test_one_function_in_another_family_converts_to_the_same_logits(llama, model_type, groups):
    other = rewritten(llama, model_type)
    text = json.dumps(LlamaConfig().to_dict()).encode()[:96]
    tokens = torch.tensor([list(text)]).remainder(llama.config.vocab_size)
    students = [convert(model, num_key_value_heads=groups) for model in (llama, other)]
    assert [student.config.model_type for student in students] == ["llama", model_type]
    for one, another in ((llama, other), students):
        with torch.no_grad():
            assert_close_for_float32(another(tokens).logits, one(tokens).logits)
