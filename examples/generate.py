"""Generate with few KV heads: attention that keeps them few, and a cache that is allocated once instead of copied at every token.

Run: `python examples/generate.py [DONOR] [NUM_KEY_VALUE_HEADS] [PROMPT]`. Offline, on a CPU, in seconds.
"""

import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gqa import convert, use_grouped_attention


TOKENS = 64
CACHES = {"growing": {}, "static": {"cache_implementation": "static"}}  # what `generate` is told


def main(
    donor_name: str = str(Path(__file__).parent / "donor"),
    num_key_value_heads: str = "2",
    prompt: str = "Once upon a time there was a",
) -> None:
    donor = AutoModelForCausalLM.from_pretrained(donor_name)
    tokenizer = AutoTokenizer.from_pretrained(donor_name)
    student = convert(donor, num_key_value_heads=int(num_key_value_heads), method="group,fold")
    use_grouped_attention(student)

    read = tokenizer([prompt] * 8, return_tensors="pt", return_token_type_ids=False)
    written = set()
    for name, model in {"donor": donor, "student": student}.items():
        for cache, options in CACHES.items():
            seconds, text = generate(model, tokenizer, read, options)
            written.add((name, text))
            print(f"{name}, {cache} cache: {8 * TOKENS / seconds:,.0f} tokens/s, 8 at once")
    print(f"both caches write the same: {len(written) == 2}")
    for name, text in sorted(written):
        print(f"{name} (untrained)" if name == "student" else name, text, sep=": ")


@torch.inference_mode()
def generate(model, tokenizer, read, options: dict) -> tuple[float, str]:
    """(seconds of the faster of two runs, what is written first)."""
    taken = []
    for _ in range(2):
        begun = time.perf_counter()
        tokens = model.generate(
            **read, **options, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, disable_compile=True
        )
        taken.append(time.perf_counter() - begun)
    return min(taken), tokenizer.decode(tokens[0], skip_special_tokens=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
