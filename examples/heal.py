"""From donor to healed student on disk, with nothing but this folder: the donor writes the text it is taught with.

Run: `python examples/heal.py [BUDGET_TOKENS] [NUM_KEY_VALUE_HEADS]`. Offline; some minutes on two CPU cores. Writes ./students.
"""

import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_gqa import convert_checkpoint
from hf_gqa.uptrain import UptrainRecipe, uptrain


DONOR = Path(__file__).parent / "donor"
PROMPTS = ("Once upon a time there was a", "The king said to his daughter,", "It was a dark night, and the captain")


def continuations(folder: Path) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    written = []
    for prompt in PROMPTS:
        torch.manual_seed(0)
        tokens = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(**tokens, max_new_tokens=40, do_sample=True, temperature=0.7, top_k=40, pad_token_id=0)
        written.append(" ".join(tokenizer.decode(output[0], skip_special_tokens=True).split()))
    return written


def main(budget_tokens: str = "163840", num_key_value_heads: str = "2") -> None:
    logging.disable_progress_bar()
    student, healed = Path("students/converted"), Path("students/healed")
    convert_checkpoint(DONOR, student, num_key_value_heads=int(num_key_value_heads), overwrite=True)
    recipe = UptrainRecipe(
        teacher=str(DONOR),
        sample_from_teacher=True,
        budget_tokens=int(budget_tokens),
        sequence_length=256,
    )
    begun = time.perf_counter()
    result = uptrain(student, healed, recipe, overwrite=True)
    seconds = time.perf_counter() - begun
    print(f"{result.tokens_seen:,} tokens, {seconds:.0f} s of sampling and training, {torch.get_num_threads()} threads")
    before, after = result.before, result.after
    print(
        f"held-out loss: donor {after['eval_teacher_loss']:.3f}, student {before['eval_loss']:.3f} -> {after['eval_loss']:.3f}"
    )
    print(f"gap closed: {after['eval_gap_closed_fraction']:.1%}, KL to the donor {after['eval_kl_nats_per_token']:.4f}")
    for name, folder in (("donor", DONOR), ("student", student), ("healed", healed)):
        print(f"\n{name}:")
        for text in continuations(folder):
            print(f"  {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
