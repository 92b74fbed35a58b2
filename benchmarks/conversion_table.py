"""Write benchmarks/results/conversion.md of what benchmarks/conversion.py measured. Run: `python benchmarks/conversion_table.py`."""

import json
from pathlib import Path


RESULTS = Path(__file__).parent / "results"
DONORS = {
    "prose": "prose-mha (Llama, RoPE, 8 KV heads)",
    "gptstories": "gptstories-280k-mha (GPT-2, learned positions, 8 KV heads)",
    "prose_gqa": "prose-mha converted to 4 KV heads, as a grouped donor (Llama, RoPE)",
    "gptstories_gqa": "gptstories-280k-mha converted to 4 KV heads, as a grouped donor (a bundle of GPT-2)",
}
PER_LAYER = " (per layer)"
ABOUT = """\
# Conversion without training

Written by benchmarks/conversion_table.py of conversion_*.jsonl, which benchmarks/conversion.py measured: loss in nats per token, KL to
the donor (95% interval by bootstrap over windows) and top-1 agreement right after conversion, float32, CPU. *Undone* is the share of
what mean pooling adds to the donor's loss. Seconds are in the files; the machine was shared.

**Which text.** Calibration rows are training text. While the methods were being written, every n-th window of the held-out text was
looked at; the numbers here are of windows between those, by which nothing about conversion was chosen. What the calibration text alone
chooses, of which `--method auto` keeps an eighth back, is below each table.

`weights alone`: without calibration; all others are calibrated, though some have no use for it. `per layer`: the cache of as many
heads in every layer, given to the layers that lose most (an average may be no number of heads). Keys and values of different counts,
and whole projections of low rank, are simulated in the donor's class; no stock class holds them.
"""


def read(donor: str) -> list[dict]:
    file = RESULTS / f"conversion_{donor}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def table(results: list[dict]) -> list[str]:
    """Of seed 0, the best last within each number of heads; other seeds' KL beside."""
    lines = ["| KV heads | method | loss | KL | other seeds' KL | top-1 | undone |", "|---|---|---|---|---|---|---|"]
    pooled = {one["num_key_value_heads"]: one for one in results if one["method"] == "mean_pool"}
    of_seed_0 = [one for one in results if one["seed"] == 0]
    for found in sorted(of_seed_0, key=lambda one: (-one["num_key_value_heads"], -one["kl"])):
        mean, undone = pooled.get(found["num_key_value_heads"]), ""
        if mean is not None:
            undone = f"{1 - (found['loss'] - found['donor_loss']) / (mean['loss'] - mean['donor_loss']):.1%}"
        same = ("method", "num_key_value_heads")
        others = [f"{o['kl']:.3f}" for o in results if o["seed"] and all(o[key] == found[key] for key in same)]
        low, high = found["kl_interval"]
        lines.append(
            f"| {found['num_key_value_heads']} | {found['method']} | {found['loss']:.3f} | {found['kl']:.3f} "
            f"({low:.3f}-{high:.3f}) | {', '.join(others)} | {found['top1_agreement']:.1%} | {undone} |"
        )
    return lines


def budgets(results: list[dict]) -> list[str]:
    """Uniform heads against the same cache spent by layer."""
    kl = {(one["method"], one["num_key_value_heads"]): one for one in results if one["seed"] == 0}
    pairs = [(key, kl.get((key[0].removesuffix(PER_LAYER), key[1]))) for key in kl if key[0].endswith(PER_LAYER)]
    if not any(uniform for _, uniform in pairs):
        return []
    lines = [
        "",
        "The same cache, uniform or by layer:",
        "",
        "| KV heads | method | uniform KL | per layer KL | heads |",
    ]
    lines.append("|---|---|---|---|---|")
    for key, uniform in sorted(pairs, key=lambda pair: -pair[0][1]):
        if uniform is None:
            continue
        plan = kl[key]["plan"]
        heads = [row["num_key_value_heads"] for row in plan["layer_plan"]] if "layer_plan" in plan else ["uniform"]
        lines.append(
            f"| {key[1]} | {key[0].removesuffix(PER_LAYER)} | {uniform['kl']:.3f} | {kl[key]['kl']:.3f} | "
            f"{', '.join(map(str, heads))} |"
        )
    return lines


def choices(trials: list[dict]) -> list[str]:
    """What `--method auto` found on the calibration rows that it kept back."""
    if not trials:
        return []
    lines = [
        "",
        "By the calibration text alone (KL there, on rows that the trial was not calibrated on; the first is chosen):",
        "",
    ]
    for found in sorted(trials, key=lambda one: -one["num_key_value_heads"]):
        tried = [f"{','.join(t['method'])} {t['kl']:.3f}" for t in found["trials"] if t["kl"] is not None]
        lines.append(f"- to {found['num_key_value_heads']} KV heads: {'; '.join(tried)}")
    return lines


def section(donor: str) -> list[str]:
    found = read(donor)
    results, trials = ([one for one in found if ("trials" in one) == chosen] for chosen in (False, True))
    if not results:
        return []
    first = results[0]
    about = (
        f"Donor {first['donor_loss']:.3f} nats per token on {first['held_out_tokens']:,} held-out tokens; calibrated on "
        f"{first['calibration_tokens']:,} tokens of training text, other rows for each seed."
    )
    return ["", f"## {DONORS[donor]}", "", about, "", *table(results), *budgets(results), *choices(trials)]


def main() -> None:
    lines = [line for donor in DONORS for line in section(donor)]
    (RESULTS / "conversion.md").write_text(ABOUT + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
