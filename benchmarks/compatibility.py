"""Which releases of transformers load, run and decode our students rightly: docs/compatibility.md, every cell measured.

Run: `python benchmarks/compatibility.py [--releases 5.4,5.24] [--output benchmarks/results/compatibility.json]`, in the environment
of `make demo`. Students are made here, by the transformers that is here. Then an environment is made for the newest patch of every
minor release that pyproject.toml claims (pip's own resolution; torch and whatever else transformers does not need are those of this
environment), and in each:

- every student is loaded without hf_gqa, as `verify` does it (hf_gqa/convert/fresh_process.py): its logits are compared with those here,
  three steps from the cache with one forward, under the default attention, sdpa and eager, and four tokens are generated;
- hf_gqa itself converts, in every way of `CONVERSIONS`, and verifies the result.

Some 40 seconds a release. With `--releases` the other rows of the output stay.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from hf_gqa import __version__, convert_checkpoint
from hf_gqa.convert import fresh_process
from hf_gqa.convert.manifest import Manifest


ROOT = Path(__file__).resolve().parent.parent
DONOR = ROOT / "examples/donor"
PAGE = ROOT / "docs/compatibility.md"
TOLERANCE = 1e-5
SHARING = {"num_key_value_heads": 2, "sharing": "cross_layer_kv", "shared_layers": (2, 4)}
# Column -> donor and plan.
STUDENTS = {
    "native": ("prose", {"num_key_value_heads": 2}),
    "bundle": ("prose", {"num_key_value_heads": 2, "export": "bundle"}),
    "sharing bundle": ("prose", SHARING),
    "T5": ("t5", {"num_key_value_heads": 2}),
    "BERT": ("bert", {"num_key_value_heads": 2}),
}
OLD_BUNDLE = "bundle of hf_gqa 0.1.0"
ITSELF = "hf_gqa converts"
CONVERSIONS = """
import sys
from hf_gqa import convert_checkpoint, open_donor, verify

heads = {"num_key_value_heads": 2}
for number, plan in enumerate((
    heads,
    heads | {"export": "bundle"},
    heads | {"sharing": "echo", "shared_layers": (2, 4)},
    heads | {"sharing": "albert", "shared_layers": (3,)},
)):
    convert_checkpoint(sys.argv[1], f"student-{number}", overwrite=True, **plan)
    failed = [check for check in verify(f"student-{number}", open_donor(sys.argv[1])) if check.passed is False]
    if failed:
        sys.exit(f"{plan}: {failed[0].name}: {failed[0].detail}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--releases", help="minor releases, such as 5.4,5.24 [default: all that pyproject.toml claims]")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/compatibility.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        students = make_students(Path(scratch))
        found = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        rows = found.get("rows", {})
        for release in arguments.releases.split(",") if arguments.releases else claimed_releases():
            rows[release] = row_of(release, students, Path(scratch))
            print(release, rows[release], flush=True)
            found = {"made_by": here(), "rows": dict(sorted(rows.items(), key=lambda row: numbers(row[0])))}
            arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    PAGE.write_text(page(found), encoding="utf-8")


def here() -> dict:
    return {
        "hf_gqa": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
    }


def processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


def numbers(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def claimed_releases() -> list[str]:
    """From the oldest that pyproject.toml allows to the newest minor release on the package index, below its cap."""
    claim = re.search(r'"transformers>=([\d.]+),<(\d+)(?:\.(\d+))?"', (ROOT / "pyproject.toml").read_text())
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "transformers"], capture_output=True, text=True, check=True
    ).stdout
    minors = {tuple(map(int, found)) for found in re.findall(r"\b(\d+)\.(\d+)\.\d+\b", listed)}
    oldest, cap = numbers(claim[1])[:2], (int(claim[2]), int(claim[3] or 0))
    return [f"{major}.{minor}" for major, minor in sorted(minors) if oldest <= (major, minor) < cap]


def make_students(scratch: Path) -> dict[str, tuple[Path, torch.Tensor]]:
    """Of each column a folder, and the logits that are computed here."""
    donors = {"prose": DONOR, "t5": scratch / "t5", "bert": scratch / "bert"}
    sizes = {"vocab_size": 99, "num_layers": 2, "num_heads": 4, "d_model": 32, "d_kv": 8, "d_ff": 48}
    randomised(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=1))).save_pretrained(donors["t5"])
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    randomised(BertForMaskedLM(BertConfig(**sizes, intermediate_size=48))).save_pretrained(donors["bert"])
    made = {}
    for column, (donor, plan) in STUDENTS.items():
        folder = scratch / column.replace(" ", "-")
        convert_checkpoint(donors[donor], folder, **plan)
        made[column] = folder, looked_at(Path(sys.executable), folder, scratch)[1]
    old = ROOT / "tests/old_bundles"
    return made | {OLD_BUNDLE: (old / "decoder", load_file(old / "logits.safetensors")["decoder"])}


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Weights so large that nothing can be left out without showing in the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name.lower() and "weight" in name else 0.25 * noise)
    return model


def row_of(release: str, students: dict, scratch: Path) -> dict[str, str]:
    python = environment(release, scratch / f"env-{release}")
    version = run([python, "-c", "import transformers; print(transformers.__version__)"], scratch).stdout.strip()
    cells = {column: cell(python, *student, scratch) for column, student in students.items()}
    return {"version": version, **cells, ITSELF: converts(python, scratch)}


def environment(release: str, folder: Path) -> Path:
    """With the newest patch of a minor release and what that needs; all else is found in this environment."""
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    run([python, "-m", "pip", "install", "--quiet", f"transformers=={release}.*"], folder, check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    own = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "beside.pth").write_text("\n".join(own) + "\n")  # behind its own, so those win
    return python


def run(command: list, cwd: Path, check: bool = False, **env: str) -> subprocess.CompletedProcess:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cwd / "modules"), "OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=check)


def looked_at(python: Path, folder: Path, scratch: Path) -> tuple[dict | str, torch.Tensor | None]:
    """What a fresh process without hf_gqa finds, or its last words; and the logits."""
    manifest, logits = Manifest.read(folder), scratch / "logits.safetensors"
    arguments = {
        "folder": str(folder),
        "trust_remote_code": manifest.export == "bundle",
        "dtype": "float32",
        "model_class": manifest.model_class,
        "logits_file": str(logits),
        "key_weights": [] if manifest.donor["model_type"] == "bert" else None,
    }
    done = run([python, "-I", fresh_process.__file__, json.dumps(arguments)], scratch)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1], None
    return json.loads(done.stdout.strip().splitlines()[-1]), load_file(logits)["logits"]


def cell(python: Path, folder: Path, expected: torch.Tensor, scratch: Path) -> str:
    """ "ok", or what is wrong, the worst first."""
    found, logits = looked_at(python, folder, scratch)
    if logits is None:
        return f"fails: {found}"[:160]
    keys = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in found[kind]]
    if keys:
        return f"tensors do not match: {keys[0]}"
    scale = expected.abs().max().clamp(min=1)
    if not (logits - expected).abs().max() <= TOLERANCE * scale:
        return f"other logits, by {(logits - expected).abs().max():.2g}"
    steps = {name: value for name, value in found["cached_steps"].items() if isinstance(value, float)}
    wrong = {name: value for name, value in steps.items() if not value <= TOLERANCE}
    if wrong:
        return "decodes wrongly: " + ", ".join(
            f"{name} by {value:.2g} of the largest logit" for name, value in wrong.items()
        )
    if found["generated_tokens"] not in (4, None):
        return f"generates {found['generated_tokens']} of 4 tokens"
    missing = sorted(found["cached_steps"].keys() - steps.keys())
    return f"ok, without {', '.join(missing)}" if missing else "ok"


def converts(python: Path, scratch: Path) -> str:
    done = run([python, "-c", CONVERSIONS, DONOR], scratch, PYTHONPATH=str(ROOT))
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return f"fails: {said[-1]}"[:160] if done.returncode else "ok"


def page(found: dict) -> str:
    made, rows = found["made_by"], found["rows"]
    columns = [*STUDENTS, OLD_BUNDLE, ITSELF]
    table = ["| transformers | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows.values():
        cells = [row.get(column, "not run").replace("|", "/") for column in columns]
        table.append(f"| {row['version']} | " + " | ".join(cells) + " |")
    return TEXT.format(table="\n".join(table), allowed=f"{TOLERANCE:g}", **made)


TEXT = """\
# Releases of transformers

What loads and decodes where. [benchmarks/compatibility.py](../benchmarks/compatibility.py) makes an environment for every minor
release that `pyproject.toml` claims and writes this page from
[results/compatibility.json](../benchmarks/results/compatibility.json).

{table}

- Students were made by hf_gqa {hf_gqa} with transformers {transformers}, and are loaded **without hf_gqa**. "ok": every tensor is
  found, the logits are those of transformers {transformers}, and three steps from the cache equal one forward (both to {allowed} of the
  largest logit, float32) under the default attention, `sdpa` and `eager`; a model that generates gives four tokens. BERT keeps no cache.
- native, bundle and sharing bundle (`cross_layer_kv`, layers 2 and 4) are of [examples/donor](../examples/donor), 8 to 2 heads; T5 and
  BERT are random models of two layers, 4 to 2 heads. "without sdpa": that release has no such attention for that family.
- "hf_gqa converts": hf_gqa itself, in that environment, converts examples/donor to a native student, a bundle, and bundles that share
  attention (`echo`) and weights (`albert`), and `verify --donor` passes on each.
- A bundle that hf_gqa 0.1.0 wrote fails on 5.24 until `hf-gqa refresh FOLDER` renews its code ([refresh.md](refresh.md)).
- Outside the range that its `config.json` names under `hf_gqa`, a bundle warns once; see [adr/0011](adr/0011-releases.md).
- Python {python}, torch {torch}, {processor}.
"""


if __name__ == "__main__":
    main()
