"""Run a donor's layers one at a time on rows of tokens, with its own heads or with others in their place.

Shapes: N rows, L tokens of a row, B rows of a batch, E hidden.
"""

import copy
import re
from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from ..refusal import Refusal
from ..runtime.attention_layout import AttentionLayout
from ..weights.attention_weights import AttentionWeights
from ..weights.head_tensors import read_heads, write_heads
from ..weights.rotation import Rotation, turns
from .stored_model import StoredModel


Batches = list[torch.Tensor]


class LayerRun:
    """A donor's layers in float32, one copied at a time; between layers, only the rows' hidden states are kept.

    Args:
        model: the donor, untouched: loaded, or stored, of which then no more has values than the copied layer.
        tokens_NL: rows to run on.
        batch_size: rows at once.

    Attributes:
        embedded: what the first layer reads, batch by batch.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel | StoredModel,
        layout: AttentionLayout,
        tokens_NL: torch.Tensor,
        batch_size: int = 8,
    ):
        self.model, self.base, self.layout = model, model.base_model, layout
        self.layers_path = re.match(r"(.*?)\.\{layer_idx\}", layout.attention)[1]
        layers = self.base.get_submodule(self.layers_path)
        recorders = nn.ModuleList(_Recorder(layer) for layer in layers)
        around = self._copied(self.base, "", {id(layers): recorders})
        device = next(around.parameters()).device
        self.embedded: Batches = []
        self.arguments: list[list[tuple[tuple, dict]]] = []
        for rows_BL in tokens_NL.split(batch_size):
            around(rows_BL.to(device), use_cache=False)
            self.embedded.append(recorders[0].hidden_states)
            self.arguments.append([recorder.arguments for recorder in recorders])

    def _copied(self, part: nn.Module, path: str, instead: dict | None = None) -> nn.Module:
        copied = copy.deepcopy(part, instead)
        if isinstance(self.model, StoredModel):
            self.model.fill(copied, path)
        return copied.float().eval()

    def layer(self, layer_idx: int) -> nn.Module:
        """A copy of one layer."""
        path = f"{self.layers_path}.{layer_idx}"
        return self._copied(self.base.get_submodule(path), path)

    def put_heads(self, layer_idx: int, layer: nn.Module, heads: AttentionWeights) -> None:
        """Overwrite the heads of a copied layer."""
        put_heads(self.layout, self.attention_in(layer, layer_idx), heads)

    def attention_in(self, layer: nn.Module, layer_idx: int) -> nn.Module:
        return layer.get_submodule(self.layout.attention.format(layer_idx=layer_idx).split(f".{layer_idx}.", 1)[1])

    @torch.no_grad()
    def outputs(
        self,
        layer_idx: int,
        layer: nn.Module,
        inputs: Batches,
        tap: Callable[[int, dict], object] | None = None,
        picked: Iterable[int] | None = None,
    ) -> Batches:
        """What the layer makes of each batch.

        Args:
            tap: told of each batch's number and `inputs` (of the attention), `mixed` (what its output projection
                reads) and `output` (of the attention), each `[B, L, ...]`.
            picked: numbers of the batches to run; by default all.
        """
        seen = {}
        attention = self.attention_in(layer, layer_idx)
        output = attention.get_submodule(self.layout.output)

        def before(module, args, kwargs):
            seen["inputs"] = args[0] if args else kwargs["hidden_states"]

        def mixed(module, args):
            seen["mixed"] = args[0]

        def after(module, args, found):
            seen["output"] = found

        hooks = [
            attention.register_forward_pre_hook(before, with_kwargs=True),
            output.register_forward_pre_hook(mixed),
            output.register_forward_hook(after),
        ]
        found = []
        for number in range(len(inputs)) if picked is None else picked:
            args, kwargs = self.arguments[number][layer_idx]
            made = layer(inputs[number], *args, **kwargs)
            found.append(made[0] if isinstance(made, tuple) else made)
            if tap is not None:
                tap(number, seen)
        for hook in hooks:
            hook.remove()
        return found

    def attention_arguments(self, layer_idx: int, layer: nn.Module, number: int, rotation: Rotation | None) -> dict:
        """What `AttentionRows` says of a copied layer's attention in one batch, besides its inputs.

        Raises:
            Refusal: the attention adds or multiplies something that is not known here.
        """
        args, kwargs = self.arguments[number][layer_idx]
        attention = self.attention_in(layer, layer_idx)
        attention = attention.get_submodule(self.layout.inner) if self.layout.inner else attention
        turn_BLP = None if rotation is None else self._turns_of(attention, kwargs, rotation)
        mask_BHLS = _mask_of(attention, [*args, kwargs.get("attention_mask")], self.embedded[number])
        return {
            "mask_BHLS": mask_BHLS,
            "scaling": _scaling_of(attention, kwargs),
            "rotation": rotation,
            "turn_BLP": turn_BLP,
        }

    def _turns_of(self, attention: nn.Module, kwargs: dict, rotation: Rotation) -> torch.Tensor:
        """From the cosines and sines that the layer is given, or that its attention keeps."""
        given = kwargs.get("position_embeddings")
        if given is None and hasattr(attention, "embed_positions") and kwargs.get("position_ids") is not None:
            table, positions = attention.embed_positions, kwargs["position_ids"]  # GPT-J, CodeGen before 5.24
            given = table.to(positions.device)[positions].chunk(2, dim=-1)
        if isinstance(given, tuple):
            cos, sin = reversed(given) if self.layout.sine_first else given
            return turns(cos, sin, rotation.dims // 2)
        raise Refusal(
            f"method: {type(attention).__name__} does not show by which angles it rotates, and a fit of its queries needs "
            f"them. Leave refit_queries out."
        )


def put_heads(layout: AttentionLayout, attention: nn.Module, heads: AttentionWeights) -> None:
    """Overwrite an attention's heads; fewer KV heads are repeated until there are as many as it has."""
    own = read_heads(layout, dict(attention.named_parameters()).get, *heads.query_HDE.shape[:2])
    copies = own.num_key_value_heads // heads.num_key_value_heads
    repeated = heads.map_key_value(lambda tensor_K: tensor_K.repeat_interleave(copies, dim=0))
    for name, tensor in write_heads(layout, repeated).items():
        attention.get_parameter(name).data.copy_(tensor)


def put_owned_heads(layout: AttentionLayout, attention: nn.Module, heads: AttentionWeights) -> None:
    """Overwrite those of the heads' tensors that an attention has; it may borrow the others."""
    owned = dict(attention.named_parameters())
    for name, tensor in write_heads(layout, heads).items():
        if name in owned:
            owned[name].data.copy_(tensor)


def _scaling_of(attention: nn.Module, kwargs: dict) -> float:
    for added in ("alibi", "position_bias"):
        if kwargs.get(added) is not None:
            raise Refusal(
                f"method: {type(attention).__name__} adds '{added}' to its scores, which a fit of its queries does not "
                f"know. Leave refit_queries out."
            )
    if hasattr(attention, "scaling"):
        return attention.scaling
    if hasattr(attention, "scale_attn"):  # GPT-J, CodeGen
        return 1.0 / float(attention.scale_attn)
    if hasattr(attention, "deterministic_flash_attn"):  # ModernBERT
        return attention.head_dim**-0.5
    raise Refusal(
        f"method: {type(attention).__name__} does not show how it scales its scores, and a fit of its queries needs to "
        f"know. Leave refit_queries out."
    )


def _mask_of(attention: nn.Module, candidates: list, inputs_BLE: torch.Tensor) -> torch.Tensor:
    """Additive; masks of transformers are additive where they are not boolean."""
    length = inputs_BLE.shape[1]
    mask = torch.zeros(1, 1, length, length, device=inputs_BLE.device)
    if getattr(attention, "is_causal", True):
        mask = mask.masked_fill(torch.ones_like(mask, dtype=torch.bool).triu(1), -torch.inf)
    if getattr(attention, "attention_type", None) == "local":  # GPT-Neo narrows the mask inside its attention
        mask = mask.masked_fill(torch.ones_like(mask, dtype=torch.bool).tril(-attention.config.window_size), -torch.inf)
    for given in candidates:
        if isinstance(given, torch.Tensor) and given.dim() == 4:
            mask = mask.masked_fill(~given, -torch.inf) if given.dtype == torch.bool else mask + given
    return mask


class _Recorder(nn.Module):
    """Stands in for a layer: keeps what it is called with, and computes nothing."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        if hasattr(layer, "attention_type"):  # by which ModernBERT chooses a layer's mask and rotation
            self.attention_type = layer.attention_type

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        self.hidden_states, self.arguments = hidden_states.detach(), (args, kwargs)
        return hidden_states[None] if hidden_states.dim() == 3 else hidden_states  # some models go on with its [0]
