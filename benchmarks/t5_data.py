"""The text of the T5 benchmark: two tasks on the SciTLDR corpus, with a tokenizer made from its training part.

`restore` gives a sentence of an abstract of which some words are masked and wants the whole sentence; `tldr` gives an
abstract and wants its one-sentence summary. The first teaches cross-attention to copy, the second is what T5 is used for.
"""

import json
import random
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast


VOCAB_SIZE = 1024
MASK, SUMMARISE = "<mask>", "<tldr>"
MOST_SOURCE_TOKENS, MOST_TARGET_TOKENS = 48, 40
MASKED_FRACTION = 0.2
RESTORED_FRACTION = 0.875  # of the examples


class Corpus:
    """Pairs of texts (source, target) by task; `dev` is never trained on."""

    def __init__(self, folder: Path):
        self.folder = folder

    def records(self, split: str) -> list[dict]:
        lines = (self.folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Byte-level BPE of the training part."""
        texts = [text for record in self.records("train") for text in [*record["source"], *record["target"]]]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=VOCAB_SIZE,
                special_tokens=["<pad>", "</s>", MASK, SUMMARISE],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")

    def pairs(self, split: str, task: str, seed: int = 0) -> list[tuple[str, str]]:
        """All pairs of a task; with `restore`, each sentence with words masked by this seed."""
        draw = random.Random(seed)
        if task == "tldr":
            return [(SUMMARISE + " ".join(r["source"]), t) for r in self.records(split) for t in r["target"]]
        sentences = [s for r in self.records(split) for s in r["source"] if 5 <= len(s.split()) <= 20]
        return [(masked(sentence, draw), sentence) for sentence in sentences]

    def encoded(self, pair: tuple[str, str]) -> dict[str, list[int]]:
        source, target = pair
        wanted = {"truncation": True, "return_token_type_ids": False}
        found = self.tokenizer(source, max_length=MOST_SOURCE_TOKENS, **wanted)
        return found | {"labels": self.tokenizer(target, max_length=MOST_TARGET_TOKENS, **wanted)["input_ids"]}


def masked(sentence: str, draw: random.Random) -> str:
    return " ".join(MASK if draw.random() < MASKED_FRACTION else word for word in sentence.split())


class TrainingPairs(Dataset):
    """`count` examples of both tasks in their order, each run of `batch_size` of one task, so that little is padded.

    The same index gives the same example, and no two passes over the corpus the same masks.
    """

    def __init__(self, corpus: Corpus, count: int, batch_size: int, seed: int):
        self.corpus, self.count, self.batch_size, self.seed = corpus, count, batch_size, seed
        self.summaries = corpus.pairs("train", "tldr")
        self.sentences = [target for _, target in corpus.pairs("train", "restore")]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        batch = random.Random(f"{self.seed} {index // self.batch_size}")
        draw = random.Random(f"{self.seed} example {index}")
        if batch.random() < RESTORED_FRACTION:
            sentence = draw.choice(self.sentences)
            return self.corpus.encoded((masked(sentence, draw), sentence))
        return self.corpus.encoded(draw.choice(self.summaries))
