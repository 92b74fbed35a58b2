"""Every recall task by its contract, and the scores of models whose answers are known."""

import random
from functools import cache
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig

from hf_gqa.evaluate.quality.bootstrap import Bootstrap
from hf_gqa.evaluate.retrieval import RETRIEVAL, piece_ids
from hf_gqa.evaluate.tasks.recall import answer_scores, last_logits, lengths, lengths_left_out, prompts_of, recall
from hf_gqa.refusal import Refusal

from .tiny_donors import VOCAB_SIZE, tiny_donor
from .tiny_tokenizer import SPACE, letter_tokenizer


DONOR = Path(__file__).parent.parent / "examples/donor"
DEPTHS = (0.0, 0.3, 1.0)


@cache
def tokenizer(kind: str):
    return AutoTokenizer.from_pretrained(DONOR) if kind == "bpe" else letter_tokenizer()


kinds = pytest.mark.parametrize(
    "kind",
    [
        pytest.param("bpe", marks=pytest.mark.skipif(not DONOR.is_dir(), reason="needs the checkout's examples")),
        "letters",
    ],
)
tasks = pytest.mark.parametrize("task", RETRIEVAL.names())


class Reader(nn.Module):
    """Continues as the longest earlier repetition of what was read last continued: perfect recall."""

    device = torch.device("cpu")

    def forward(self, tokens_BT, use_cache):
        logits_BTV = torch.zeros(*tokens_BT.shape, 3000)
        for row, tokens in enumerate(tokens_BT.tolist()):
            for end in range(len(tokens) - 8, len(tokens) + 1):
                logits_BTV[row, end - 1, self.next(tokens[:end])] = 10.0
        return SimpleNamespace(logits=logits_BTV)

    def next(self, tokens: list[int]) -> int:
        def repeated(place: int) -> int:
            size = 0
            while size < place and tokens[place - 1 - size] == tokens[-1 - size]:
                size += 1
            return size

        return tokens[max(range(1, len(tokens)), key=repeated)]


class Forgetful(Reader):
    def next(self, tokens: list[int]) -> int:
        return 0


def found_at(context: list[int], answer: list[int]) -> list[int]:
    return [place for place in range(len(context)) if context[place : place + len(answer)] == answer]


@kinds
@tasks
@pytest.mark.parametrize("context_tokens", [192, 301])
def test_a_prompt_is_exactly_as_long_as_asked_and_says_the_answer_once(task, kind, context_tokens):
    places = []
    for depth in DEPTHS:
        context, answer = RETRIEVAL.get(task)(tokenizer(kind), context_tokens, depth, Random("x"))
        assert len(context) + len(answer) == context_tokens
        assert context[0] == 0 and 0 not in context[1:] + answer
        (place,) = found_at(context, answer)
        places.append(place / context_tokens)
    assert places == sorted(places) and places[0] < 0.3 and places[2] > 0.6 and places[2] - places[0] > 0.45


@kinds
@tasks
def test_a_prompt_that_does_not_fit_is_not_written(task, kind):
    fitting = [RETRIEVAL.get(task)(tokenizer(kind), tokens, 0.5, Random("x")) is not None for tokens in range(1, 192)]
    assert not fitting[0] and fitting[-1] and fitting == sorted(fitting)


@tasks
def test_prompts_depend_on_seed_task_and_length_alone(task):
    state = random.getstate()
    wanted = prompts_of(task, tokenizer("letters"), 192, 5, seed=0)
    random.seed(7)
    torch.manual_seed(7)
    middle = random.getstate()
    assert prompts_of(task, tokenizer("letters"), 192, 5, seed=0) == wanted
    assert random.getstate() == middle
    random.setstate(state)
    other = prompts_of(task, tokenizer("letters"), 192, 5, seed=1)
    assert all(one != another for one, another in zip(wanted, other, strict=True))


@kinds
@tasks
def test_prompts_can_be_answered_by_what_they_say(task, kind):
    prompts = prompts_of(task, tokenizer(kind), 192, 9, seed=0)
    right, loss = answer_scores(Reader(), prompts, batch_size=4)
    assert right.all() and loss.max() < 2
    assert not answer_scores(Forgetful(), prompts, batch_size=4)[0].any()


def test_pieces_are_what_they_are_inside_a_text():
    letters = tokenizer("letters")
    assert letters.convert_ids_to_tokens(piece_ids(letters, "\n12:")) == ["\n", "1", "2", ":"]
    assert letters.convert_ids_to_tokens(piece_ids(letters, " 34")) == [SPACE, "3", "4"]


def test_right_is_what_greedy_decoding_writes():
    model, prompts, right = tiny_donor("llama"), [], []
    drawn = torch.randint(3, VOCAB_SIZE, (12, 30), generator=torch.Generator().manual_seed(0))
    for sample in range(12):
        answer_tokens = 1 + sample % 5
        context = drawn[sample, answer_tokens:]
        greedy = GenerationConfig(do_sample=False, max_new_tokens=answer_tokens, min_new_tokens=answer_tokens)
        answer = model.generate(context.unsqueeze(0), generation_config=greedy)[0, len(context) :].tolist()
        if sample % 2:
            answer[sample % answer_tokens] = (answer[sample % answer_tokens] + 1) % VOCAB_SIZE
        prompts.append((context.tolist(), answer))
        right.append(sample % 2 == 0)
    assert answer_scores(model, prompts, batch_size=5)[0].tolist() == right


def test_loss_is_that_of_the_answer_alone():
    model, prompts = tiny_donor("qwen3"), [([5, 6, 7, 8, 9, 10], [11, 12]), ([13, 14, 15, 16, 17], [18, 19, 20])]
    expected = []
    for context, answer in prompts:
        labels = torch.tensor([[-100] * len(context) + answer])
        expected.append(len(answer) * model(torch.tensor([context + answer]), labels=labels).loss.item())
    assert answer_scores(model, prompts, batch_size=8)[1] == pytest.approx(expected, abs=1e-5)
    assert answer_scores(model, prompts, batch_size=1)[1] == pytest.approx(expected, abs=1e-5)


def test_leaving_out_logits_changes_no_number():
    class Whole(nn.Module):
        def forward(self, tokens_BT, use_cache):
            return model(tokens_BT, use_cache=use_cache)

    model, tokens = tiny_donor("gpt2"), torch.randint(3, VOCAB_SIZE, (3, 40))
    torch.testing.assert_close(last_logits(model, tokens, 4), last_logits(Whole(), tokens, 4), atol=1e-5, rtol=1e-5)


def test_recall_compares_donor_and_student_on_the_same_prompts():
    donor, student = (tiny_donor("llama", seed=seed, max_position_embeddings=192) for seed in (0, 1))
    seen, arguments = [], {"longest_context_tokens": 192, "samples": 9, "bootstrap": Bootstrap(resamples=200)}
    found = recall(donor, student, tokenizer("letters"), **arguments, progress=seen.append)
    assert found == recall(donor, student, tokenizer("letters"), **arguments)
    assert len(seen) == len(found) and set(seen) == {9}
    assert {(row.task, row.context_tokens) for row in found} >= {("repeated_tokens", n) for n in (64, 128, 192)}
    for row in found:
        prompts = prompts_of(row.task, tokenizer("letters"), row.context_tokens, 9, seed=0)
        tokens = sum(len(answer) for _, answer in prompts)
        losses = [answer_scores(model, prompts, 8)[1].sum() / tokens for model in (donor, student)]
        assert [row.donor_answer_loss_nats_per_token, row.student_answer_loss_nats_per_token] == pytest.approx(losses)
        assert row.difference.value == pytest.approx(losses[1] - losses[0])
        assert row.difference.low < row.difference.value < row.difference.high
    assert lengths_left_out(found, 192) == ("Recall task 'passkey' was not measured in 64 tokens.",)


def test_a_model_against_itself_differs_by_exactly_nothing():
    model = tiny_donor("llama")
    (row,) = recall(
        model, model, tokenizer("letters"),
        longest_context_tokens=64, samples=8, bootstrap=Bootstrap(), tasks=["repeated_tokens"],
    )  # fmt: skip
    assert (row.difference.value, row.difference.low, row.difference.high) == (0, 0, 0)


def test_a_reader_remembers_and_a_forgetful_one_does_not():
    for row in recall(
        Reader(), Forgetful(), tokenizer("letters"),
        longest_context_tokens=128, samples=4, batch_size=3, bootstrap=Bootstrap(),
    ):  # fmt: skip
        assert (row.donor_accuracy_fraction, row.student_accuracy_fraction) == (1, 0)
        assert row.difference is None  # four samples say nothing about an interval


@pytest.mark.parametrize(
    ("longest", "expected"),
    [(20, [20]), (64, [64]), (100, [64, 100]), (256, [64, 128, 256]), (300, [64, 128, 256, 300])],
)
def test_lengths_end_with_the_longest(longest, expected):
    assert lengths(longest) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "recall: samples = 0, at least 1 is needed. Give another, or leave retrieval out."),
        ({"longest_context_tokens": 0}, "recall: longest_context_tokens = 0, at least 1 is needed. "),
        ({"tasks": ["paskey"]}, "recall task 'paskey' is unknown. Did you mean 'passkey'? Known: key_value, "),
    ],
)
def test_bad_input(changes, message):
    arguments = {"longest_context_tokens": 64, "bootstrap": Bootstrap(), **changes}
    with pytest.raises(Refusal) as error:
        recall(Reader(), Reader(), tokenizer("letters"), **arguments)
    assert str(error.value).startswith(message)


def test_a_task_that_writes_another_length_is_its_authors_mistake(monkeypatch):
    monkeypatch.setattr(RETRIEVAL, "get", lambda name: lambda *arguments: ([1, 2], [3]))
    with pytest.raises(TypeError, match=r"^recall task 'short': 2 \+ 1 tokens, asked for 64. Fill it up.$"):
        prompts_of("short", tokenizer("letters"), 64, 1, seed=0)
