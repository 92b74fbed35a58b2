"""What the models write, for a reader who wants to see it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...convert.student import open_student
from ..inputs.documents import Documents
from ..inputs.opened import Pair
from ..inputs.padding import evenly_spread
from ..report import Continuation


PROMPTS, PROMPT_TOKENS = 3, 24


def prompts_from(documents: Documents, tokenizer: PreTrainedTokenizerBase, context_tokens: int) -> list[str]:
    """The first words of some windows of the text, evenly spread."""
    windows = list(documents.windows(context_tokens, context_tokens))
    chosen = [windows[number] for number in evenly_spread(len(windows), PROMPTS)]
    return [tokenizer.decode(window.tokens[1 : PROMPT_TOKENS + 1], skip_special_tokens=True) for window in chosen]


def continuations(
    pair: Pair, prompts: Sequence[str], new_tokens: int, converted: str | Path | None
) -> tuple[Continuation, ...]:
    """By greedy decoding, so that the same models say the same twice."""
    before = None
    if converted is not None:
        model = open_student(converted, pair.student.dtype).model.eval().to(pair.student.device)
        before = [_continue(model, pair.tokenizer, prompt, new_tokens) for prompt in prompts]
    return tuple(
        Continuation(
            prompt=prompt,
            donor=_continue(pair.donor, pair.tokenizer, prompt, new_tokens),
            student=_continue(pair.student, pair.tokenizer, prompt, new_tokens),
            converted=before[number] if before else None,
        )
        for number, prompt in enumerate(prompts)
    )


@torch.inference_mode()
def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int) -> str:
    read = tokenizer(prompt, return_tensors="pt").to(model.device)
    fill = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    written = model.generate(
        input_ids=read["input_ids"],
        attention_mask=read["attention_mask"],
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=fill,
    )
    return tokenizer.decode(written[0, read["input_ids"].shape[1] :], skip_special_tokens=True)
