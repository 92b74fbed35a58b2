"""Convert a checkpoint without loading the model, then check it in a process that has no hf_gqa.

Run: `python examples/convert_on_disk.py [DONOR] [OUTPUT]`. Offline, on a CPU, in seconds.
The same from a shell: `hf-gqa convert DONOR OUTPUT --num-key-value-heads 2`, `hf-gqa verify OUTPUT --donor DONOR`.
"""

import sys
from pathlib import Path

from hf_gqa import convert_checkpoint, open_donor, verify


def main(donor_name: str = str(Path(__file__).parent / "donor"), output: str = "students/prose-gqa-2") -> None:
    manifest = convert_checkpoint(donor_name, output, num_key_value_heads=2, method="mean_pool", overwrite=True)
    print(f"{output}: {manifest.model_class}, {manifest.export}, because {manifest.reason}")
    for check in verify(output, open_donor(donor_name)):
        print(f"  {'ok' if check.passed else 'FAILED'}  {check.name}: {check.detail}")


if __name__ == "__main__":
    main(*sys.argv[1:])
