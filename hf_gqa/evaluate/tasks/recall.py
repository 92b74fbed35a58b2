"""What was said once in a context and is asked for at its end, by the length of the context: donor against student.

Heads that were merged lose recall first, and the mean loss over a text hides it.

`S` samples, `B` prompts of a batch, `T` positions, `A` tokens of the longest answer, `V` vocabulary.
"""

import inspect
from collections.abc import Callable, Sequence
from random import Random

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...refusal import Refusal
from ..quality.bootstrap import Bootstrap
from ..report import Retrieval
from ..retrieval import RETRIEVAL, Prompt


SHORTEST_CONTEXT_TOKENS = 64


def recall(
    donor: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest_context_tokens: int,
    samples: int = 32,
    seed: int = 0,
    batch_size: int = 8,
    bootstrap: Bootstrap,
    tasks: Sequence[str] | None = None,
    progress: Callable[[int], object] = lambda prompts: None,
) -> tuple[Retrieval, ...]:
    """Both models answer the same prompts, in one forward pass each.

    An answer is right if each of its tokens is the likeliest after the context and the answer before it: exactly the
    prompts for which greedy decoding writes the answer.

    Args:
        longest_context_tokens: prompt and answer together; the shorter lengths are the powers of two from 64 on.
        samples: prompts of each task and length; what is asked for stands at evenly spread depths.
        seed: with the task and the length, it decides every prompt.
        batch_size: changes no prompt, only rounding.
        tasks: files in `retrieval/`; None: all.
        progress: told of the prompts that were answered since.

    Returns:
        One for each task and length that the task fits into; `lengths_left_out` says which are missing.

    Raises:
        Refusal: an unknown task, no samples, no length.
    """
    for name, value in (("samples", samples), ("longest_context_tokens", longest_context_tokens)):
        if value < 1:
            raise Refusal(f"recall: {name} = {value}, at least 1 is needed. Give another, or leave retrieval out.")
    found = []
    for task in RETRIEVAL.names() if tasks is None else tasks:
        for context_tokens in lengths(longest_context_tokens):
            prompts = prompts_of(task, tokenizer, context_tokens, samples, seed)
            if prompts is not None:
                theirs, ours = (answer_scores(model, prompts, batch_size) for model in (donor, student))
                found.append(_compare(task, context_tokens, prompts, theirs, ours, bootstrap))
                progress(samples)
    return tuple(found)


def lengths(longest_context_tokens: int) -> list[int]:
    """Powers of two from 64, and the longest itself."""
    found, length = [], SHORTEST_CONTEXT_TOKENS
    while length < longest_context_tokens:
        found.append(length)
        length *= 2
    return [*found, longest_context_tokens]


def lengths_left_out(
    retrieval: Sequence[Retrieval], longest_context_tokens: int, tasks: Sequence[str] | None = None
) -> tuple[str, ...]:
    """A sentence for each of the tasks that `recall` was asked for and that does not fit into all lengths."""
    notes = []
    for task in RETRIEVAL.names() if tasks is None else tasks:
        measured = {found.context_tokens for found in retrieval if found.task == task}
        missing = [str(length) for length in lengths(longest_context_tokens) if length not in measured]
        if missing:
            notes.append(f"Recall task '{task}' was not measured in {', '.join(missing)} tokens.")
    return tuple(notes)


def prompts_of(
    task: str, tokenizer: PreTrainedTokenizerBase, context_tokens: int, samples: int, seed: int
) -> list[Prompt] | None:
    """All of one length, answer included, so that none is padded; None where the task does not fit.

    Raises:
        Refusal: an unknown task.
        TypeError: a plug-in whose prompts have another length.
    """
    write, prompts = RETRIEVAL.get(task), []
    for sample in range(samples):
        depth_fraction = sample / (samples - 1) if samples > 1 else 0.5
        random = Random(f"{seed} {task} {context_tokens} {sample}")
        prompt = write(tokenizer, context_tokens, depth_fraction, random)
        if prompt is None:
            return None
        context, answer = prompt
        if not answer or len(context) + len(answer) != context_tokens:
            raise TypeError(
                f"recall task '{task}': {len(context)} + {len(answer)} tokens, asked for {context_tokens}. Fill it up."
            )
        prompts.append(prompt)
    return prompts


@torch.inference_mode()
def answer_scores(model: PreTrainedModel, prompts: list[Prompt], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(whether the whole answer is right, its loss in nats summed over its tokens), both of shape S."""
    right_S, loss_S = [], []
    for begin in range(0, len(prompts), batch_size):
        batch = prompts[begin : begin + batch_size]
        tokens_BT = torch.tensor([[*context, *answer] for context, answer in batch], device=model.device)
        longest = max(len(answer) for _, answer in batch)
        logits_BAV = last_logits(model, tokens_BT[:, :-1], longest).float()
        for (_, answer), logits_AV, tokens_T in zip(batch, logits_BAV, tokens_BT, strict=True):
            wanted_A, logits_AV = tokens_T[-len(answer) :], logits_AV[-len(answer) :]
            logs_A = logits_AV.log_softmax(-1).gather(-1, wanted_A.unsqueeze(-1))
            right_S.append(bool((logits_AV.argmax(-1) == wanted_A).all()))
            loss_S.append(-float(logs_A.double().sum()))
    return np.array(right_S), np.array(loss_S)


def last_logits(model: PreTrainedModel, tokens_BT: torch.Tensor, positions: int) -> torch.Tensor:
    """Of the last positions; models that can leave out the others do."""
    keep = {"logits_to_keep": positions} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(tokens_BT, use_cache=False, **keep).logits[:, -positions:]


def _compare(task: str, context_tokens: int, prompts: list[Prompt], theirs, ours, bootstrap: Bootstrap) -> Retrieval:
    (donor_right_S, donor_loss_S), (student_right_S, student_loss_S) = theirs, ours
    tokens_S = np.array([len(answer) for _, answer in prompts])
    return Retrieval(
        task=task,
        context_tokens=context_tokens,
        samples=len(prompts),
        donor_accuracy_fraction=float(donor_right_S.mean()),
        student_accuracy_fraction=float(student_right_S.mean()),
        donor_answer_loss_nats_per_token=float(donor_loss_S.sum() / tokens_S.sum()),
        student_answer_loss_nats_per_token=float(student_loss_S.sum() / tokens_S.sum()),
        difference=bootstrap.interval(student_loss_S - donor_loss_S, tokens_S),
    )
