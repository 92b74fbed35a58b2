"""Convert a loaded model: one line between `from_pretrained` and your own code.

Run: `python examples/convert_in_memory.py [DONOR] [NUM_KEY_VALUE_HEADS]`. Offline, on a CPU, in seconds.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gqa import convert


def main(donor_name: str = str(Path(__file__).parent / "donor"), num_key_value_heads: str = "2") -> None:
    donor = AutoModelForCausalLM.from_pretrained(donor_name)
    tokenizer = AutoTokenizer.from_pretrained(donor_name)

    student = convert(donor, num_key_value_heads=int(num_key_value_heads), method="mean_pool")

    tokens = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        distance = (student(**tokens).logits - donor(**tokens).logits).abs().max().item()
    print(f"{type(donor).__name__}, {donor.num_parameters():,} parameters")
    print(f"-> {type(student).__name__}, {student.num_parameters():,} parameters")
    print(f"largest change of a logit before any uptraining: {distance:.3g}")

    # From here on it is a model like any other: train it with any Trainer, save it, push it.
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            same = torch.equal(student(**tokens).logits, again(**tokens).logits)
    print(f"saved and loaded again: the same logits: {same}")


if __name__ == "__main__":
    main(*sys.argv[1:])
