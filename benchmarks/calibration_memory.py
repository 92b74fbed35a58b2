"""Peak memory of converting with text, one layer of the donor at a time, against the donor's depth and against loading it whole.

Run: `python benchmarks/calibration_memory.py [--size 1.3b|7b] [--depths 1,3] [--tokens 512] [--method NAMES] [--folder DIR] [--output FILE]`. Donors
are Llamas of that width with random bfloat16 weights and few layers, 32 heads converted to 8. Every way runs once, in a process of
its own, on one thread; memory is the peak of anonymous memory (RssAnon) as in benchmarks/convert.py, above that of the imports.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import convert
from uptrain import machine


METHOD = "fold,refit_queries,refit"  # without `group`, which takes most of the time at such widths
ROW_TOKENS = 256
EMBEDDED = 2 * 32_000  # rows of the embedding and of the head
WHOLE = """
from hf_gqa.convert import calibration
calibration.model_to_run = lambda donor: donor.model_class.from_pretrained(donor.folder, dtype='auto').eval()
"""


def code_of(tokens: int, method: str, whole: bool) -> str:
    return (
        convert.IMPORTS
        + f"torch.set_num_threads(1); rows = torch.randint(32_000, ({tokens // ROW_TOKENS}, {ROW_TOKENS}))\n"
        + (WHOLE if whole else "")
        + f"start = time.perf_counter(); hf_gqa.convert_checkpoint(donor, output, num_key_value_heads="
        f"{convert.NUM_KEY_VALUE_HEADS}, method='{method}', calibration=rows)"
    )


def donor_of_depth(folder: Path, width: str, depth: int) -> dict:
    """Write it; its numbers."""
    size = f"{width} width, {depth} layers"
    convert.SIZES[size] = convert.SIZES[width] | {"num_hidden_layers": depth}
    convert.LAYERS_PER_SHARD[size] = 1
    folder.mkdir()
    _, parameters = convert.write_donor(folder, size)
    embedding_parameters = EMBEDDED * convert.SIZES[size]["hidden_size"]
    layer_parameters = (parameters - embedding_parameters) // depth
    return {
        "layers": depth,
        "parameters": parameters,
        "layer_bytes_bfloat16": 2 * layer_parameters,
        "layer_bytes_float32": 4 * layer_parameters,
        "embedding_bytes_float32": 2 * embedding_parameters,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("1.3b", "7b"), default="1.3b")
    parser.add_argument("--depths", default="1,3", help="the deepest is also loaded whole")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--method", default=METHOD)
    parser.add_argument("--folder", type=Path, help="where to put donors and outputs; a temporary folder by default")
    parser.add_argument("--output", type=Path, help="benchmarks/results/calibration_memory_<size>.json by default")
    asked = parser.parse_args()
    depths = sorted(int(depth) for depth in asked.depths.split(","))
    ways = []
    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
        output = Path(scratch) / "student"
        imports = convert.run_way(convert.WAYS["import only"], output, output)["peak_anonymous_bytes"]
        for depth in depths:
            donor = Path(scratch) / "donor"
            facts = donor_of_depth(donor, asked.size, depth)
            for whole in (False, True) if depth == depths[-1] else (False,):
                run = convert.run_way(code_of(asked.tokens, asked.method, whole), donor, output)
                run["above_import_bytes"] = run["peak_anonymous_bytes"] - imports
                ways.append({"loaded": "whole" if whole else "layer by layer"} | facts | run)
                print(ways[-1], flush=True)
            shutil.rmtree(donor)
    hidden_bytes = asked.tokens * convert.SIZES[asked.size]["hidden_size"] * 4
    result = {
        "size": asked.size,
        "method": asked.method,
        "tokens": asked.tokens,
        "hidden_states_bytes": hidden_bytes,
        "ways": ways,
    }
    output = asked.output or Path(__file__).parent / "results" / f"calibration_memory_{asked.size}.json"
    output.write_text(json.dumps(result | machine() | {"compute": "float32"}, indent=2) + "\n")


if __name__ == "__main__":
    main()
