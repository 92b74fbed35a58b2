"""Compare what each layer of student and teacher puts out; give the student's attention the teacher's inputs.

Shapes: `B` batch, `S` sequence, `E` hidden, `L` layers.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from ..convert.layouts import layout_of
from ..refusal import Refusal
from ..runtime.planned_model import SharedStates


class LayerOutputs:
    """Hooks that keep, while recording, what each attention module or layer of one model takes in and puts out.

    They go through the wrapped model's own forward pass, so data parallel and sharded wrappers see nothing unusual.
    Recomputation of checkpointed layers happens in the backward pass, when nothing is recorded; inputs that were
    replaced then are replaced again, for they stay until the next forward pass.
    """

    def __init__(self, model: PreTrainedModel):
        layout = layout_of(model.config.model_type, "layer matching")
        if not layout.passes_keywords or layout.ties_layers:
            how = "at several depths" if layout.ties_layers else "in a way of their own"
            raise Refusal(
                f"layer matching: the blocks of a {layout.model_type} call their attention {how}, so that what it puts out "
                f"cannot be compared. Use the objective kl or cross_entropy."
            )
        self.attention, self.hidden, self.attention_inputs = {}, {}, {}
        self.attention_modules: dict[int, nn.Module] = {}
        self.forced_inputs: dict[int, torch.Tensor] = {}
        self.recording = False
        base = self.base = model.base_model
        for layer_idx in range(model.config.num_hidden_layers):
            path = layout.attention.format(layer_idx=layer_idx)
            attention = self.attention_modules[layer_idx] = base.get_submodule(path)
            attention.register_forward_pre_hook(self._before_attention(layer_idx), with_kwargs=True)
            attention.register_forward_hook(self._after(self.attention, layer_idx))
            layer = base.get_submodule(re.match(rf".*?\b{layer_idx}\b", path)[0])
            layer.register_forward_hook(self._after(self.hidden, layer_idx))

    def run_attention(self, inputs: dict[int, tuple]) -> None:
        """Each attention module alone, on the teacher's arguments for it: all that a teacher-forced pass can teach.

        It skips the feed-forward layers and the head of `recorded(inputs)`, and the wrappers around the model.
        """
        self.forced_inputs = {}
        shared = {"shared_states": SharedStates()} if getattr(self.base, "lends", False) else {}
        for layer_idx, (args, kwargs) in inputs.items():
            output = self.attention_modules[layer_idx](*args, **kwargs, **shared)
            self.attention[layer_idx] = output[0] if isinstance(output, tuple) else output

    def set_dropout(self, on: bool) -> None:
        """Of the attention modules; a teacher that drops nothing cannot be matched by a student that does.

        It stays so until the next forward pass, for checkpointed layers are computed again in the backward pass.
        """
        for attention in self.attention_modules.values():
            attention.train(on)

    @contextmanager
    def recorded(self, forced_inputs: dict[int, tuple] | None = None) -> Iterator[None]:
        """Record one forward pass, in which attention modules take the hidden states of `forced_inputs` instead.

        Args:
            forced_inputs: by layer, the (args, kwargs) that `attention_inputs` of the teacher holds.
        """
        for kept in (self.attention, self.hidden, self.attention_inputs):
            kept.clear()
        self.forced_inputs = forced_inputs or {}
        self.recording = True
        try:
            yield
        finally:
            self.recording = False

    def _before_attention(self, layer_idx: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict):
            if self.recording:
                self.attention_inputs[layer_idx] = args, kwargs
            if layer_idx not in self.forced_inputs:
                return None
            teacher_args, teacher_kwargs = self.forced_inputs[layer_idx]
            if args:
                return (teacher_args[0].to(args[0]), *args[1:]), kwargs
            forced = teacher_kwargs["hidden_states"].to(kwargs["hidden_states"])
            return args, kwargs | {"hidden_states": forced}

        return hook

    def _after(self, kept: dict[int, torch.Tensor], layer_idx: int):
        def hook(module: nn.Module, args: tuple, output):
            if self.recording:
                kept[layer_idx] = output[0] if isinstance(output, tuple) else output

        return hook


def relative_error(
    student: dict[int, torch.Tensor], teacher: dict[int, torch.Tensor], counts_BS: torch.Tensor
) -> torch.Tensor:
    """Squared error of each token over the teacher's mean square there, averaged over layers, summed over tokens.

    Scaled token by token, so that it does not depend on how a batch is split.

    Args:
        student, teacher: outputs `[B, S, E]` by layer.
        counts_BS: bool; which tokens count.
    """
    total = torch.zeros((), device=counts_BS.device)
    for layer_idx, target_BSE in teacher.items():
        target_BSE = target_BSE.float().to(counts_BS.device)
        error_BS = (student[layer_idx].float() - target_BSE).square().mean(-1)
        scale_BS = target_BSE.square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
        total = total + (error_BS / scale_BS).masked_fill(~counts_BS, 0).sum()
    return total / len(teacher)
