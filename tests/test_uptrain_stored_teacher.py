"""A teacher's top-k on disk: the teacher's own values, the same bytes however often the run was stopped, or a refusal."""

import json
import math
import pickle
import re
import shutil
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from hf_gqa import Refusal
from hf_gqa.uptrain import stored_teacher
from hf_gqa.uptrain import write_teacher_logits as writer
from hf_gqa.uptrain.stored_teacher import StoredTeacher, TeacherLogitsSettings, describe_rows, read_rows, read_settings
from hf_gqa.uptrain.write_teacher_logits import write_teacher_logits

from .fresh_process import run_python
from .tiny_donors import SOME_MODEL_TYPES, VOCAB_SIZE, tiny_donor


DOCUMENTS = (5, 4, 7)  # tokens of the documents packed into each row
NUM_ROWS, SEQUENCE_LENGTH = 11, sum(DOCUMENTS)
WRITTEN = {"top_k": 6, "donor_id": "tiny/donor", "batch_size": 2, "rows_per_shard": 4}
SHARDS = [f"shard-0000{shard}.safetensors" for shard in range(3)]


def packed_rows(num_rows: int = NUM_ROWS, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB_SIZE, (num_rows, SEQUENCE_LENGTH), generator=generator)
    position_ids = torch.cat([torch.arange(length) for length in DOCUMENTS]).expand(num_rows, -1)
    return Dataset.from_dict({"input_ids": input_ids.tolist(), "position_ids": position_ids.tolist()})


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refused(function, *args, **kwargs) -> str:
    with pytest.raises(Refusal) as refusal:
        function(*args, **kwargs)
    return str(refusal.value)


@pytest.fixture(scope="module")
def teacher():
    return tiny_donor("llama")


@pytest.fixture(scope="module")
def rows():
    return packed_rows()


@pytest.fixture(scope="module")
def written(teacher, rows, tmp_path_factory):
    """Never changed by a test."""
    folder = tmp_path_factory.mktemp("written") / "teacher"
    write_teacher_logits(teacher, rows, folder, **WRITTEN)
    return folder


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


@pytest.mark.parametrize("model_type", SOME_MODEL_TYPES)
def test_values_are_the_teachers_of_each_document_alone(model_type, tmp_path):
    teacher, rows = tiny_donor(model_type), packed_rows()
    write_teacher_logits(teacher, rows, tmp_path, **WRITTEN)
    row_indices = torch.tensor([10, 0, 4, 3, 0])
    token_ids_BSk, log_probs_BSk = StoredTeacher.open(tmp_path, rows, vocab_size=VOCAB_SIZE).rows(row_indices)
    assert (token_ids_BSk.dtype, log_probs_BSk.dtype) == (torch.int64, torch.float32)
    input_ids = torch.tensor([rows[row]["input_ids"] for row in row_indices.tolist()])
    with torch.no_grad():
        documents = [teacher(input_ids=part).logits for part in input_ids.split(DOCUMENTS, dim=1)]
    expected_BSV = torch.cat(documents, dim=1).log_softmax(-1)
    torch.testing.assert_close(log_probs_BSk, expected_BSV.gather(-1, token_ids_BSk), rtol=2**-11, atol=2e-5)
    torch.testing.assert_close(log_probs_BSk, expected_BSV.topk(6).values, rtol=2**-11, atol=2e-5)


def test_settings_say_what_was_written(written, rows):
    settings = read_settings(written)
    assert list(asdict(settings).values()) == [
        *("hf_gqa teacher logits, version 1", "tiny/donor", "float32", 6, VOCAB_SIZE, SEQUENCE_LENGTH, NUM_ROWS, 4),
        *(describe_rows(rows)["rows_sha256"], "U16", "F16", True),
    ]
    assert TeacherLogitsSettings(**json.loads(settings.to_json())) == settings
    assert sorted(bytes_of(written)) == [*SHARDS, "teacher_logits.json"]
    assert len({path.stat().st_mode for path in written.iterdir()}) == 1
    stored = StoredTeacher.open(written, rows)
    assert stored.bytes_per_token == 6 * (2 + 2)
    assert stored.bytes_on_disk == sum((written / shard).stat().st_size for shard in SHARDS)
    assert 0 < stored.bytes_on_disk - NUM_ROWS * SEQUENCE_LENGTH * stored.bytes_per_token < 3 * 300  # headers


def test_wide_vocabulary_in_half_precision(tmp_path):
    """Takes wider indices; the log-probabilities are those that float32 gives of the teacher's bfloat16 logits."""
    teacher, rows = tiny_donor("llama", vocab_size=65537).bfloat16(), packed_rows(2)
    teacher.lm_head.weight.data[65536] = 4 * teacher.lm_head.weight[:100].abs().amax(0)  # likeliest somewhere
    write_teacher_logits(teacher, rows, tmp_path, top_k=3, donor_id="wide")
    stored = StoredTeacher.open(tmp_path, rows)
    token_ids_BSk, log_probs_BSk = stored.rows(torch.tensor([0, 1]))
    assert stored.bytes_per_token == 3 * (4 + 2) and token_ids_BSk.max() == 65536
    assert load_file(tmp_path / SHARDS[0])["token_ids"].dtype == torch.int32
    with torch.no_grad():
        expected_BSV = teacher(**read_rows(rows, 0, 2), use_cache=False).logits.float().log_softmax(-1)
    torch.testing.assert_close(log_probs_BSk, expected_BSV.gather(-1, token_ids_BSk), rtol=2**-11, atol=1e-5)


def test_logits_of_minus_infinity_are_finite_on_disk(rows, tmp_path):
    """Their probability is 0, and 0 * -inf would be NaN in a loss."""
    teacher = tiny_donor("llama")
    teacher.lm_head.register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.arange(4, VOCAB_SIZE), -torch.inf)
    )
    write_teacher_logits(teacher, rows, tmp_path, **WRITTEN)
    _, log_probs_BSk = StoredTeacher.open(tmp_path, rows).rows(torch.arange(NUM_ROWS))
    assert (log_probs_BSk[..., 4:] == -65504).all() and (log_probs_BSk[..., :4] > -100).all()


def test_small_chunks_and_dropout_change_nothing(written, rows, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(writer, "TOKENS_PER_CHUNK", 3)
    teacher = tiny_donor("llama", attention_dropout=0.5).train()
    write_teacher_logits(teacher, rows, tmp_path, **WRITTEN)
    assert bytes_of(tmp_path) == bytes_of(written)
    assert teacher.training and all(parameter.grad is None for parameter in teacher.parameters())
    assert "".join(capfd.readouterr()) == ""  # no bar where there is no terminal


@pytest.mark.parametrize("shards_before", [0, 1, 2])
def test_stopped_run_continues_to_the_same_bytes(teacher, rows, written, tmp_path, monkeypatch, shards_before):
    def stop(tensors, file):
        if file.name.startswith(SHARDS[shards_before]):
            file.write_bytes(b"half")
            raise KeyboardInterrupt
        save_file(tensors, file)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer, "save_file", stop)
        write_teacher_logits(teacher, rows, tmp_path, **WRITTEN)
    found = refused(StoredTeacher.open, tmp_path, rows)
    assert found == f"{tmp_path}: is incomplete. Write the teacher's logits again: it continues where it stopped."
    batches = []
    hook = teacher.register_forward_hook(lambda module, args, output: batches.append(1))
    for _ in range(2):  # the second run finds nothing to do
        write_teacher_logits(teacher, rows, tmp_path, **WRITTEN)
        assert bytes_of(tmp_path) == bytes_of(written) and len(batches) == 6 - 2 * shards_before
    hook.remove()


KILLED_RUNS = """
import json, os, signal, sys
from pathlib import Path

import torch
torch.set_num_threads(1)  # a fork of a process whose thread pools have started may hang
from hf_gqa import staging
from tests.test_uptrain_stored_teacher import WRITTEN, bytes_of, packed_rows, tiny_donor, write_teacher_logits, writer

scratch, teacher, rows = Path(sys.argv[1]), tiny_donor("llama"), packed_rows()


def run(place, name, call):
    folder, original, calls = scratch / f"{name} {call}", getattr(place, name), []

    def replacement(*args):
        calls.append(args)
        if len(calls) == call:
            args[1].write_bytes(b"half") if name == "save_file" else None
            os.kill(os.getpid(), signal.SIGKILL)
        original(*args)

    process = os.fork()
    if process == 0:
        setattr(place, name, replacement)
        write_teacher_logits(teacher, rows, folder, **WRITTEN)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    left = sorted(path.name for path in folder.iterdir())
    write_teacher_logits(teacher, rows, folder, **WRITTEN)
    return {"code": code, "left": left, "same": bytes_of(folder) == bytes_of(scratch / "whole")}


write_teacher_logits(teacher, rows, scratch / "whole", **WRITTEN)
KILLS = (writer, "publish_file", 1), (writer, "save_file", 2), (writer, "publish_file", 3), (staging, "flush", 6)
print(json.dumps([run(*kill) for kill in (*KILLS, (writer, "publish_file", 5))]))
"""


def test_killed_run_continues_to_the_same_bytes(tmp_path):
    found = run_python(KILLED_RUNS, tmp_path)
    assert [(run["code"], run["same"]) for run in found] == [(-9, True)] * 5
    assert [run["left"] for run in found] == [
        ["teacher_logits.json.partial"],
        *[[SHARDS[0], f"{SHARDS[1]}.partial", "teacher_logits.json"]] * 2,
        [*SHARDS[:2], "teacher_logits.json"],
        [*SHARDS, "teacher_logits.json", "teacher_logits.json.partial"],
    ]


def test_workers_read_what_the_main_process_reads(written, rows):
    stored = StoredTeacher.open(written, rows)
    stored.rows(torch.tensor([0]))  # read before the fork

    def collate(row_indices):
        return torch.tensor(row_indices), *stored.rows(torch.tensor(row_indices))

    loader = DataLoader(range(NUM_ROWS), 3, True, num_workers=2, multiprocessing_context="fork", collate_fn=collate)
    seen, sent = [], pickle.loads(pickle.dumps(stored))  # as spawned workers get it
    for row_indices, *read in loader:
        assert all(map(torch.equal, read, stored.rows(row_indices)))
        assert all(map(torch.equal, read, sent.rows(row_indices)))
        seen += row_indices.tolist()
    assert sorted(seen) == [*range(NUM_ROWS)]


@pytest.mark.parametrize("row", [-1, NUM_ROWS])
def test_no_such_row(written, rows, row):
    with pytest.raises(IndexError, match=rf"^{written}: holds rows 0 to 10, got {row}\.$"):
        StoredTeacher.open(written, rows).rows(torch.tensor([0, row]))


def test_reads_rows_and_not_shards(written, rows, monkeypatch):
    """Through slices of the mapped file; a whole tensor is not to be had here."""

    @contextmanager
    def slices_only(file, framework):
        with safe_open(file, framework=framework) as opened:
            yield SimpleNamespace(get_slice=lambda name: {1: opened.get_slice(name)[1:2][0]})

    safe_open, stored = stored_teacher.safe_open, StoredTeacher.open(written, rows)
    expected = stored.rows(torch.tensor([9, 1]))
    monkeypatch.setattr(stored_teacher, "safe_open", slices_only)
    assert all(map(torch.equal, stored.rows(torch.tensor([9, 1])), expected))


def test_rows_are_known_by_their_tokens_and_positions(rows, monkeypatch):
    """And not by how they are stored, or how many are read at once."""
    expected, columns = describe_rows(rows), rows.with_format("numpy")[:]
    narrow = Dataset.from_dict({name: values.astype("int32") for name, values in columns.items()})
    swapped = rows.rename_columns({"input_ids": "position_ids", "position_ids": "input_ids"})
    others = [packed_rows(seed=1), packed_rows(NUM_ROWS - 1), rows.select([1, 0, *range(2, NUM_ROWS)]), swapped]
    assert len({describe_rows(other)["rows_sha256"] for other in [rows, *others]}) == 5
    monkeypatch.setattr(stored_teacher, "ROWS_PER_READ", 4)
    assert describe_rows(narrow.add_column("row", list(range(NUM_ROWS)))) == expected


AGAIN = "write the teacher's logits again: only what is missing is computed."


def test_reader_refuses_another_folder(written, rows, tmp_path):
    found = refused(StoredTeacher.open, tmp_path, rows)
    assert found == f"{tmp_path}: holds no teacher_logits.json. Write the teacher's logits there first."
    file = tmp_path / "teacher_logits.json"
    file.write_bytes((written / file.name).read_bytes()[:50])
    assert refused(StoredTeacher.open, tmp_path, rows).startswith(f"{file}: not readable JSON (Expecting property name")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "x"}, "ValueError: format = 'x', expected 'hf_gqa teacher logits, version 1'"),
        ({"top_k": "6"}, "ValueError: top_k = '6' is not at least 1"),
        ({"rows_per_shard": 0}, "ValueError: rows_per_shard = 0 is not at least 1"),
        ({"complete": 1}, "ValueError: complete = 1 is not bool"),
        ({"token_ids_dtype": "I64"}, "ValueError: token_ids_dtype = 'I64', log_probs_dtype = 'F16'"),
        ({"x": 2}, "TypeError: TeacherLogitsSettings.__init__() got an unexpected keyword argument 'x'"),
    ],
)
def test_reader_refuses_settings_that_it_does_not_know(copy, rows, changes, reason):
    file = copy / "teacher_logits.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert refused(StoredTeacher.open, copy, rows) == (
        f"{file}: not readable ({reason}). Write the teacher's logits into a new folder."
    )


def test_reader_refuses_other_rows_and_vocabularies(written, rows):
    other = packed_rows(seed=1)
    hashes = [describe_rows(some)["rows_sha256"] for some in (rows, other)]
    for given, vocab_size, message in (
        (other, None, "rows_sha256 = {}, training has {}".format(*hashes)),
        (packed_rows(7), None, "num_rows = 11, training has 7"),
        (rows, 128, "vocab_size = 99, training has 128"),
    ):
        said = refused(StoredTeacher.open, written, given, vocab_size=vocab_size)
        assert said.startswith(f"{written}: was written with {message}. Train with what it was written for (text, ")


def test_damaged_or_missing_shard_is_refused_and_written_again(copy, written, teacher, rows):
    shard = copy / SHARDS[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    message = rf"{re.escape(str(shard))}: not a readable safetensors file \(.+\)\. Remove it and {AGAIN}"
    assert re.fullmatch(message, refused(StoredTeacher.open, copy, rows))
    assert re.fullmatch(message, refused(write_teacher_logits, teacher, rows, copy, **WRITTEN))
    shard.unlink()
    assert refused(StoredTeacher.open, copy, rows) == f"{shard}: is missing. W{AGAIN[1:]}"
    write_teacher_logits(teacher, rows, copy, **WRITTEN)
    assert bytes_of(copy) == bytes_of(written)


def test_shard_of_other_tensors_is_refused(copy, rows):
    shard = copy / SHARDS[2]
    save_file({"token_ids": torch.zeros(3, 16, 6, dtype=torch.int32), "log_probs": torch.zeros(3, 16, 5).half()}, shard)
    assert refused(StoredTeacher.open, copy, rows) == (
        f"{shard}: holds {{'log_probs': ('F16', [3, 16, 5]), 'token_ids': ('I32', [3, 16, 6])}}, "
        f"expected {{'log_probs': ('F16', [3, 16, 6]), 'token_ids': ('U16', [3, 16, 6])}}. Remove it and {AGAIN}"
    )


PACK = "Pack them into rows of one length."
NEEDED = "Give at least one, with input_ids and position_ids."


@pytest.mark.parametrize(
    ("input_ids", "positions", "column", "message"),
    [
        ([[1, 2], [3]], [[0, 1], [0]], "position_ids", f"0 to 1 are of several lengths. {PACK}"),
        ([[1], [2], [3, 4]], [[0], [0], [0, 1]], "position_ids", f"are of lengths [1, 2]. {PACK}"),
        ([[1, 2]], [[0]], "position_ids", f"0 to 0 are of several lengths. {PACK}"),
        ([[1, 2]], [[0, 1]], "labels", f"1 rows of ['input_ids', 'labels']. {NEEDED}"),
        ([], [], "position_ids", f"0 rows of ['input_ids', 'position_ids']. {NEEDED}"),
    ],
)
def test_rows_that_are_not_packed_are_refused(teacher, tmp_path, monkeypatch, input_ids, positions, column, message):
    monkeypatch.setattr(stored_teacher, "ROWS_PER_READ", 2)
    rows = Dataset.from_dict({"input_ids": input_ids, column: positions})
    assert refused(write_teacher_logits, teacher, rows, tmp_path / "new", **WRITTEN) == f"rows: {message}"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("key", ["top_k", "batch_size", "rows_per_shard"])
def test_writer_refuses_numbers_out_of_range(teacher, rows, tmp_path, key):
    for number in (0, 100) if key == "top_k" else (0, -1):
        found = refused(write_teacher_logits, teacher, rows, tmp_path / "new", **WRITTEN | {key: number})
        reason = "not in 1 to 99, the vocabulary. Give one." if key == "top_k" else "below 1. Give 1 or more."
        assert found == f"write_teacher_logits: {key} = {number} is {reason}" and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 5}, "top_k = 6, now 5"),
        ({"donor_id": "other"}, "donor_id = 'tiny/donor', now 'other'"),
        ({"rows_per_shard": 2}, "rows_per_shard = 4, now 2"),
        ({"rows": packed_rows(7)}, "num_rows = 11, now 7"),
        ({"teacher": tiny_donor("llama").bfloat16()}, "teacher_dtype = 'float32', now 'bfloat16'"),
    ],
)
def test_writer_refuses_to_continue_with_other_settings(teacher, rows, copy, arguments, message):
    before = bytes_of(copy)
    given = {"teacher": teacher, "rows": rows, "folder": copy} | WRITTEN | arguments
    assert refused(write_teacher_logits, **given) == (
        f"{copy}: was begun with {message}. Continue with what it was begun with, or give another folder."
    )
    assert bytes_of(copy) == before


def test_writer_refuses_places_that_are_not_its_own(teacher, rows, tmp_path):
    (file := tmp_path / "notes.txt").write_text("mine")
    found = refused(write_teacher_logits, teacher, rows, file, **WRITTEN)
    assert found == f"{file}: is not a folder. Give another one for the teacher's logits."
    assert refused(write_teacher_logits, teacher, rows, tmp_path, **WRITTEN) == (
        f"{tmp_path}: holds 'notes.txt' and no teacher_logits.json. Give a new or an empty folder."
    )
    assert bytes_of(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_writer_refuses_a_teacher_that_is_not_finite(rows, tmp_path, value):
    teacher = tiny_donor("llama")
    teacher.model.embed_tokens.weight.data[rows[0]["input_ids"][-1]] = value
    assert refused(write_teacher_logits, teacher, rows, tmp_path, **WRITTEN) == (
        "rows 0 to 1: the teacher's logits hold NaN or Inf. Load it in a wider dtype than float32, or repair it."
    )
    assert not read_settings(tmp_path).complete


def test_full_disk_is_an_os_error_and_keeps_what_is_complete(teacher, rows, written, tmp_path, monkeypatch):
    def fail(tensors, file):
        raise SafetensorError("no space")

    first, second = (tmp_path / shard for shard in SHARDS[:2])
    monkeypatch.setattr(writer, "save_file", lambda *args: (fail if first.exists() else save_file)(*args))
    with pytest.raises(OSError) as error:
        write_teacher_logits(teacher, rows, tmp_path, **WRITTEN)
    assert str(error.value) == f"[Errno 5] writing failed (no space). What is complete stays: '{second}.partial'"
    assert first.read_bytes() == (written / first.name).read_bytes()
    assert read_settings(tmp_path) == replace(read_settings(written), complete=False)
