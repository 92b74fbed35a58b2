"""What travels with a student: the donor's tokenizer and licence on disk, the bundle's code to the Hub."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers.utils.hub
from huggingface_hub import HfApi, ModelCard
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

from hf_gqa import ConversionPlan, convert, convert_checkpoint, open_donor
from hf_gqa.convert.bundle_code import runtime_files
from hf_gqa.convert.donor_folder import TOKENIZER_FILES, matches
from hf_gqa.convert.families import FAMILIES
from hf_gqa.convert.target import choose_target
from hf_gqa.export.explanation import explain

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
    "source.spm",
    "target.spm",
    "sentencepiece.bpe.model",
    "normalizer.json",
    "tekken.json",
    "video_preprocessor_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
)
LEFT = ("README.md", "pytorch_model.bin", "optimizer.pt", "modeling_own.py", "tokenizer_own.py", "training_args.json")


@pytest.mark.parametrize(("model_type", "heads"), [("llama", 2), ("gpt2", 2), ("gpt2", 1)])
def test_files_beside_the_weights(tmp_path, model_type, heads):
    donor, student = tmp_path / "donor", tmp_path / "student"
    tiny_donor(model_type).save_pretrained(donor)
    for folder in ("additional_chat_templates", "1_Pooling", "2_Dense"):
        (donor / folder).mkdir()
    for name in (*CARRIED, *LEFT):
        (donor / name).write_bytes(f"{name} \xe4\r\n".encode("latin-1"))
    convert_checkpoint(donor, student, num_key_value_heads=heads)
    for name in (*CARRIED, "generation_config.json"):
        assert (student / name).read_bytes() == (donor / name).read_bytes(), name
    assert not [name for name in LEFT if (student / name).exists()]
    told = next(note for note in explained(donor, heads) if note.startswith("Left behind"))
    assert (
        told
        == "Left behind in the donor's folder: modeling_own.py, optimizer.pt, pytorch_model.bin, tokenizer_own.py, "
        "training_args.json."
    )


def explained(donor, heads: int) -> list[str]:
    opened, plan = open_donor(donor), ConversionPlan(num_key_value_heads=heads)
    return explain(opened, plan, choose_target(opened, plan)).notes


@pytest.mark.parametrize("model_type", FAMILIES.names())
def test_every_file_that_a_family_s_tokenizer_reads_is_carried(model_type):
    name = TOKENIZER_MAPPING_NAMES.get(model_type)
    read = set() if name is None else set(tokenizer_class_from_name(name).vocab_files_names.values())
    files = [Path(file) for file in (*read, "tokenizer_config.json", "special_tokens_map.json")]
    assert [file for file in files if not any(matches(file, pattern) for pattern in TOKENIZER_FILES)] == []


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
