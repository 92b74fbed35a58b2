"""Students in folders, compared with students in memory."""

from pathlib import Path

import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from .conformance import assert_same_tensors
from .tiny_donors import default_head


ONE_TENSOR_EACH, SEVERAL_EACH = "1KB", "12KB"


def written(model: PreTrainedModel, folder: Path, **kwargs) -> Path:
    model.save_pretrained(folder, **kwargs)
    return folder


def stored(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, read from the files themselves."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
        assert not found.keys() & set(names), "a tensor is stored twice"
        found |= dict.fromkeys(names, file)
    return found


def load(folder: Path, auto_class=AutoModelForCausalLM) -> PreTrainedModel:
    student, loading = auto_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(loading.values()), loading
    return student


def assert_same_student(folder: Path, student: PreTrainedModel, auto_class=None) -> None:
    default = default_head(student.config.model_type.removeprefix("gqa_"))
    on_disk = load(folder, auto_class or getattr(transformers, default))
    assert type(on_disk) is type(student)
    assert on_disk.dtype == student.dtype
    assert_same_tensors(on_disk.state_dict(), student.state_dict())
    ours, theirs = on_disk.config.to_dict(), student.config.to_dict()
    for field in ("transformers_version", "_name_or_path", "architectures", "dtype"):
        ours.pop(field, None), theirs.pop(field, None)
    assert ours == theirs
