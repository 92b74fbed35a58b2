"""The main job on real donors and real text, where they lie beside the checkout."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gqa import convert_checkpoint, open_donor, verify
from hf_gqa.convert.cache_bytes import cache_bytes_per_token_measured


DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
# text, and the loss that the donor had on these windows; they start anywhere, which costs the story model a little
DONORS = {
    "prose-mha": ("prose-heldout/heldout.txt", 3.5),
    "gptstories-280k-mha": ("tinystories-1000/train_900.txt", 2.0),
}
pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no real donors: {DATA.parent.name}/data is not beside the checkout"
)


def windows(name: str, tokenizer) -> torch.Tensor:
    """32 windows of 256 tokens, spread evenly over the donor's text."""
    text = (DATA / "corpora" / DONORS[name][0]).read_text(encoding="utf-8")
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    every = tokens[: len(tokens) // 256 * 256].view(-1, 256)
    return every[torch.linspace(0, len(every) - 1, 32).long()]


def loss(model, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        return model(tokens, labels=tokens).loss.item()


@pytest.mark.slow
@pytest.mark.parametrize("name", DONORS)
def test_main_road(name, tmp_path):
    folder = DATA / "donors" / name
    donor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = windows(name, AutoTokenizer.from_pretrained(folder))
    donor_loss, expected = loss(donor, tokens), DONORS[name][1]
    assert abs(donor_loss - expected) < 0.15, (
        "not what its makers report, so the text or the donor is not what we think"
    )

    losses = {}
    for heads in (8, 4, 2, 1):
        output = tmp_path / f"{name}-{heads}"
        manifest = convert_checkpoint(folder, output, num_key_value_heads=heads, method="mean_pool")
        assert manifest.export == ("bundle" if name.startswith("gpt") and heads in (4, 2) else "native")
        student = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
        losses[heads] = loss(student, tokens)
        assert cache_bytes_per_token_measured(student) == cache_bytes_per_token_measured(donor) * heads / 8
    assert losses[8] == donor_loss
    # These donors' heads are not redundant: mean pooling hurts an untrained student, and must not look free.
    assert all(losses[heads] > donor_loss + 0.5 for heads in (4, 2, 1)), losses


@pytest.mark.usefixtures("warm_verification")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "heads"), [("prose-mha", 2), ("gptstories-280k-mha", 2), ("gptstories-280k-mha", 1)])
def test_verify_passes(name, heads, tmp_path):
    convert_checkpoint(DATA / "donors" / name, tmp_path / "student", num_key_value_heads=heads)
    checks = verify(tmp_path / "student", open_donor(DATA / "donors" / name))
    assert all(check.passed for check in checks), checks
