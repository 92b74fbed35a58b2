"""Streaming: converting on disk holds little anonymous memory beyond one shard's changed tensors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


CHILD = """
import json, sys, threading, time
import hf_gqa

def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

hf_gqa.open_donor(sys.argv[1])  # imports what it needs
baseline, peak, done = anonymous_bytes(), [0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous_bytes())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
hf_gqa.convert_checkpoint(sys.argv[1], sys.argv[2], num_key_value_heads=int(sys.argv[3]), method=sys.argv[4])
done.set()
watcher.join()
print(json.dumps(peak[0] - baseline))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize(("heads", "method", "donor_heads"), [(2, "mean_pool", 16), (16, "expand", 2)])
def test_peak_anonymous_memory(tmp_path, heads, method, donor_heads):
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=donor_heads,
        vocab_size=8192,
    )
    donor = LlamaForCausalLM(config).to(torch.bfloat16)
    donor.save_pretrained(tmp_path / "donor", max_shard_size="60MB")
    shards = [path.stat().st_size for path in (tmp_path / "donor").glob("*.safetensors")]
    assert len(shards) >= 6
    arguments = [str(tmp_path / "donor"), str(tmp_path / "student"), str(heads), method]
    run = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) <= 2 * max(shards), f"shards up to {max(shards):,} of {sum(shards):,} bytes in all"
