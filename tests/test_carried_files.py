"""What travels with a student: the donor's tokenizer and licence on disk, the bundle's code to the Hub."""

from types import SimpleNamespace

import pytest
import transformers.utils.hub
from huggingface_hub import HfApi, ModelCard

from hf_gqa import convert, convert_checkpoint
from hf_gqa.convert.bundle_code import runtime_files

from .tiny_donors import tiny_donor


CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
)
LEFT = ("README.md", "pytorch_model.bin", "optimizer.pt", "modeling_own.py", "tokenizer_own.py", "training_args.json")


@pytest.mark.parametrize(("model_type", "heads"), [("llama", 2), ("gpt2", 2), ("gpt2", 1)])
def test_files_beside_the_weights(tmp_path, model_type, heads):
    donor, student = tmp_path / "donor", tmp_path / "student"
    tiny_donor(model_type).save_pretrained(donor)
    (donor / "additional_chat_templates").mkdir()
    for name in (*CARRIED, *LEFT):
        (donor / name).write_bytes(f"{name} \xe4\r\n".encode("latin-1"))
    convert_checkpoint(donor, student, num_key_value_heads=heads)
    for name in (*CARRIED, "generation_config.json"):
        assert (student / name).read_bytes() == (donor / name).read_bytes(), name
    assert not [name for name in LEFT if (student / name).exists()]


def test_push_to_hub_uploads_the_code(tmp_path, monkeypatch):
    """The real `push_to_hub`, with the two calls that need a network replaced."""
    uploaded = {}

    def create_repo(*args, **kwargs):
        return SimpleNamespace(repo_id="someone/student")

    def create_commit(*args, operations, **kwargs):
        for operation in operations:
            with operation.as_file() as file:
                uploaded[operation.path_in_repo] = file.read()

    for name, stand_in in (("create_repo", create_repo), ("create_commit", create_commit)):
        monkeypatch.setattr(HfApi, name, stand_in)
        monkeypatch.setattr(transformers.utils.hub, name, stand_in, raising=False)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard("card"))
    convert(tiny_donor("gpt2"), num_key_value_heads=2).push_to_hub("someone/student")
    assert {"config.json", "generation_config.json", "model.safetensors"} <= uploaded.keys()
    for file in runtime_files("gqa_gpt2"):
        assert uploaded[file.name] == file.read_bytes()
