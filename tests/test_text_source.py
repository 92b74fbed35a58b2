"""Every kind of text comes out as the same documents; what cannot be read is refused before anything is trained."""

import errno
import json
import os
import re
import shutil

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, IterableDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_gqa import Refusal
from hf_gqa.text import source as text_source
from hf_gqa.text.source import TextSource, fingerprint, open_documents

from .tiny_tokenizer import letters


TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% if message.tool is defined %}!{% endif %}{% endfor %}"
CONVERSATIONS = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}],
    [{"role": "user", "content": "no", "tool": "x"}],
]
RENDERED = ["<user>hi<assistant>yes", "<user>no!"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets-cache"))


@pytest.fixture
def chat():
    tokenizer = letters(bos=True, eos=True, same=True)
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def write(folder, name, content) -> str:
    """`content`: the text of a .txt, the rows of all others."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif name.endswith(".txt"):
        file.write_text(content, encoding="utf-8", newline="")
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), file)
    elif name.endswith(".json"):
        file.write_text(json.dumps(content))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(file)


def documents_of(*files: str, tokenizer=None, **fields) -> list[str]:
    documents = open_documents(TextSource(train_file=files, **fields), tokenizer or letters())
    assert isinstance(documents, IterableDataset if fields.get("streaming") else Dataset)
    found = list(documents)
    assert all(set(row) == {"text"} for row in found)
    return [row["text"] for row in found]


def refusal_of(*files: str, tokenizer=None, **fields) -> str:
    with pytest.raises(Refusal) as refusal:
        open_documents(TextSource(train_file=files, **fields), tokenizer or letters())
    return str(refusal.value)


BOTH = pytest.mark.parametrize("streaming", [False, True])


@BOTH
@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a[1]*?.txt", "a.jsonl", "a.json", "a.parquet"])
def test_every_kind_of_file_is_read(tmp_path, name, streaming):
    texts = ["One.\n\nTwo é 🙂\n"] if name.lower().endswith(".txt") else ["One.", "Two é 🙂\n", "Three"]
    content = texts[0] if name.lower().endswith(".txt") else [{"text": text, "id": 1} for text in texts]
    file = write(tmp_path, name, content) if name != "a.TXT" else str(tmp_path / name)
    if name == "a.TXT":
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert documents_of(file, streaming=streaming) == texts


@BOTH
def test_files_and_folders_come_in_the_given_order(tmp_path, streaming):
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "a.txt", ".hidden.txt", ".git/x.txt"):
        write(tmp_path / "folder", name, f"{name}")
    write(tmp_path / "folder", "c.jsonl", [{"text": "c 1"}, {"text": "c 2"}])
    for name in ("notes.md", "weights.safetensors"):
        write(tmp_path / "folder", name, b"\xff")
    write(tmp_path / "folder", "empty.txt", "")
    last = write(tmp_path, "0.parquet", [{"text": "last"}])
    first = write(tmp_path, "1.txt", "first")
    found = documents_of(first, str(tmp_path / "folder"), last, first, streaming=streaming)
    assert found == ["first", "a/b/c.txt", "a/z.txt", "a.txt", "b.txt", "c 1", "c 2", "last", "first"]


def test_byte_order_mark_and_line_ends_of_windows_are_taken_away(tmp_path):
    assert documents_of(write(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n")) == ["one\ntwo\n"]
    assert documents_of(write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n')) == ["one"]


@BOTH
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_column_is_text_or_messages_or_the_one_asked_for(tmp_path, name, streaming, chat):
    rows = [
        {"other": f"other {n}", "messages": CONVERSATIONS[n], "text": f"text {n}"} for n in range(len(CONVERSATIONS))
    ]
    file = write(tmp_path, name, rows)
    assert documents_of(file, streaming=streaming) == ["text 0", "text 1"]
    assert documents_of(file, streaming=streaming, text_column="other") == ["other 0", "other 1"]
    assert documents_of(file, streaming=streaming, text_column="messages", tokenizer=chat) == RENDERED
    without = write(tmp_path, f"b.{name.partition('.')[2]}", [{"messages": row["messages"]} for row in rows])
    assert documents_of(without, streaming=streaming, tokenizer=chat) == RENDERED
    named_text = write(tmp_path, f"c.{name.partition('.')[2]}", [{"text": row["messages"]} for row in rows])
    assert documents_of(named_text, streaming=streaming, tokenizer=chat) == RENDERED


@BOTH
def test_texts_and_conversations_may_come_together(tmp_path, streaming, chat):
    conversations = write(tmp_path, "a.jsonl", [{"messages": row} for row in [*CONVERSATIONS, [], None]])
    text = write(tmp_path, "b.txt", "text")
    found = documents_of(text, conversations, text, tokenizer=chat, streaming=streaming)
    assert found == ["text", *RENDERED, "", "", "text"]


@BOTH
def test_rows_without_text_stay_blank(tmp_path, streaming):
    file = write(tmp_path, "a.jsonl", [{"text": None}, {"text": ""}, {"text": "one"}])
    assert documents_of(file, streaming=streaming) == [None, "", "one"]


def test_large_strings_of_arrow_are_text(tmp_path):
    table = pyarrow.table({"text": pyarrow.array(["one", "two"], pyarrow.large_string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    plain = write(tmp_path, "b.parquet", [{"text": "three"}])
    assert documents_of(str(tmp_path / "a.parquet")) == ["one", "two"]
    assert documents_of(str(tmp_path / "a.parquet"), write(tmp_path, "c.txt", "c"), plain)[-2:] == ["c", "three"]


@BOTH
def test_folder_of_a_dataset(tmp_path, streaming):
    write(tmp_path / "set", "train.jsonl", [{"text": "train"}])
    write(tmp_path / "set", "test.jsonl", [{"text": "test"}])
    for split, texts in (("train", ["train"]), ("test", ["test"])):
        source = TextSource(dataset_name=str(tmp_path / "set"), dataset_split=split, streaming=streaming)
        assert [row["text"] for row in open_documents(source, letters())] == texts


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=40), st.text(max_size=20).map(str.encode)), chunk=st.integers(1, 9))
def test_utf8_is_judged_as_python_does(tmp_path, content, chunk, monkeypatch):
    monkeypatch.setattr(text_source, "CHUNK_BYTES", chunk)
    (tmp_path / "a.txt").write_bytes(content)
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        wanted = f"is not UTF-8 (byte 0x{content[error.start]:02x} at offset {error.start})"
        with pytest.raises(Refusal, match=re.escape(wanted)):
            text_source._check_utf8(tmp_path / "a.txt")
    else:
        text_source._check_utf8(tmp_path / "a.txt")


@BOTH
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_other_encodings_are_refused(tmp_path, name, streaming):
    kind = name.partition(".")[2]
    good = write(tmp_path, "good.txt", "good")
    file = write(tmp_path, name, b"x" * 1234567 + "é".encode("latin-1"))
    assert refusal_of(good, file, streaming=streaming) == (
        f"{file}: is not UTF-8 (byte 0xe9 at offset 1,234,567). Convert it, if it is LATIN1: iconv -f LATIN1 -t UTF-8 "
        f"{file} > a.utf8.{kind}"
    )
    file = write(tmp_path, f"my {name}", "text".encode("utf-16"))
    assert refusal_of(file, streaming=streaming) == (
        f"{file}: is not UTF-8 (byte 0xff at offset 0). Convert it, if it is UTF-16: iconv -f UTF-16 -t UTF-8 "
        f"'{file}' > 'my a.utf8.{kind}'"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "text: got neither train_file nor dataset_name. Give one of them."),
        ({"train_file": [], "dataset_name": ""}, "text: got neither train_file nor dataset_name. Give one of them."),
        (
            {"train_file": ["a.txt", "b.txt"], "dataset_name": "c"},
            "text: got both train_file = a.txt and 1 more and dataset_name = 'c'. Give one of them.",
        ),
        ({"train_file": "a.txt"}, "train_file: got the string 'a.txt'. Give a list of files and folders."),
        (
            {"train_file": ["a.txt"], "dataset_config_name": "c"},
            "text: dataset_config_name = 'c' belongs to a dataset, and dataset_name is not given. Leave it out, or give "
            "dataset_name.",
        ),
    ],
)
def test_contradictory_sources_are_refused(fields, message):
    with pytest.raises(Refusal) as refusal:
        TextSource(**fields)
    assert str(refusal.value) == message


def test_source_keeps_its_files_as_strings(tmp_path):
    source = TextSource(train_file=[tmp_path / "a.txt"])
    assert source.train_file == (str(tmp_path / "a.txt"),) and hash(source) == hash(source)


SUFFIXES = ".txt, .jsonl, .json, .parquet"


def test_files_that_hold_no_text_are_refused(tmp_path):
    folder, missing = tmp_path / "folder", str(tmp_path / "missing.txt")
    markdown, empty = write(folder, "a.md", b"x"), write(folder, "b.txt", "")
    assert refusal_of(missing) == f"{missing}: is no file and no folder. Check train_file."
    assert refusal_of(markdown) == f"{markdown}: has the suffix '.md', known are {SUFFIXES}. Convert it to one."
    assert refusal_of(empty) == f"{empty}: is empty. Leave it out."
    assert refusal_of(str(folder)) == f"{folder}: holds no file with text ({SUFFIXES}). Give another folder."


@BOTH
def test_text_that_is_blank_is_refused(tmp_path, streaming):
    blank = write(tmp_path, "a.txt", "\n \n")
    assert refusal_of(blank, streaming=streaming) == (
        f"{blank}: holds no text (columns: text; read: text). Give other text, or another text_column."
    )
    nulls = write(tmp_path, "a.jsonl", [{"text": None, "body": "x"}])
    assert refusal_of(nulls, streaming=streaming) == (
        f"{nulls}: holds no text (columns: text, body; read: text). Give other text, or another text_column."
    )


@BOTH
def test_columns_that_are_not_there_are_refused(tmp_path, streaming):
    file = write(tmp_path, "a.jsonl", [{"body": "x", "title": "y"}])
    assert refusal_of(file, streaming=streaming) == (
        f"{file}: has no column 'text' or 'messages' (columns: body, title). Give text_column."
    )
    assert refusal_of(file, streaming=streaming, text_column="content") == (
        f"{file}: has no column 'content' (columns: body, title). Give text_column."
    )


@BOTH
def test_columns_that_are_not_text_are_refused(tmp_path, streaming, chat):
    file = write(tmp_path, "a.jsonl", [{"text": 5, "mixed": "x", "messages": [{"from": "human", "value": "hi"}]}])
    assert refusal_of(file, streaming=streaming) == (
        f"{file}: column 'text': holds int where text or a list of messages is needed. Give text_column."
    )
    assert refusal_of(file, streaming=streaming, text_column="messages", tokenizer=chat) == (
        f"{file}: column 'messages': its messages have the keys from, value, needed are role and content. Rename them."
    )


@BOTH
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_rows_that_are_not_text_are_refused(tmp_path, name, streaming):
    """Streamed, datasets would hand out every text in quotation marks."""
    file = write(tmp_path, name, [{"text": "x"}, {"text": 5}])
    with pytest.raises(Refusal) as refusal:
        documents_of(file, streaming=streaming)
    assert str(refusal.value) in (
        f"{file}: column 'text': holds 5, which is not text. Make all of its rows strings.",
        f"{file}: cannot be read (ArrowInvalid: JSON parse error: Column(/text) changed from string to number in row 1). "
        f"Repair the file, or do not stream it.",
        f"{file}: cannot be read (ArrowTypeError: (\"Expected bytes, got a 'int' object\", 'Conversion failed for column text "
        f"with type object')). Repair the file, or do not stream it.",
    )


@BOTH
def test_messages_may_have_keys_of_several_types(tmp_path, streaming, chat):
    called = [{"role": "assistant", "content": "yes", "tool": [{"a": 1}]}]
    file = write(tmp_path, "a.jsonl", [{"messages": CONVERSATIONS[0]}, {"messages": called}])
    assert documents_of(file, tokenizer=chat, streaming=streaming) == [RENDERED[0], "<assistant>yes!"]


def test_conversations_need_a_template(tmp_path):
    file = write(tmp_path, "a.jsonl", [{"messages": row} for row in CONVERSATIONS])
    assert refusal_of(file) == (
        f"{file}: column 'messages': holds conversations, and the tokenizer has no chat template to turn them into text. "
        f"Give a text_column with plain text, or a tokenizer with a chat_template."
    )


@BOTH
def test_conversations_that_a_template_refuses(tmp_path, streaming, chat):
    chat.chat_template = "{{ raise_exception('roles must alternate') }}"
    file = write(tmp_path, "a.jsonl", [{"messages": row} for row in CONVERSATIONS[:1]])
    with pytest.raises(Refusal) as refusal:
        documents_of(file, tokenizer=chat, streaming=streaming)
    assert str(refusal.value) == (
        f"{file}: column 'messages': the chat template fails on {CONVERSATIONS[0]!r:.80} (roles must alternate). Repair "
        f"the conversation."
    )


@BOTH
def test_damaged_files_are_refused(tmp_path, streaming):
    advice = "Repair the file, or do not stream it." if streaming else "Repair the file."
    lines = write(tmp_path, "a.jsonl", b'{"text": "a"}\n{"text": \n')
    assert refusal_of(lines, streaming=streaming) == (
        f"{lines}: cannot be read (ArrowInvalid: JSON parse error: Invalid value. in row 1). {advice}"
    )
    table = write(tmp_path, "a.parquet", b"PAR1xx")
    assert refusal_of(table, streaming=streaming) == (
        f"{table}: cannot be read (ArrowInvalid: Parquet file size is 6 bytes, smaller than the minimum file footer (8 "
        f"bytes)). {advice}"
    )


@BOTH
def test_hub_that_is_offline_is_refused(streaming, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = (
        "no/such: is no folder here and not in the cache of datasets, and the Hub is offline (HF_HUB_OFFLINE is set). "
        "Unset it, or download the dataset first."
    )
    source = TextSource(dataset_name="no/such", streaming=streaming)
    for refused in (lambda: open_documents(source, letters()), lambda: fingerprint(source)):
        with pytest.raises(Refusal) as refusal:
            refused()
        assert str(refusal.value) == message


def test_datasets_that_cannot_be_opened_are_refused(tmp_path):
    write(tmp_path / "set", "train.jsonl", [{"text": "train"}])
    for fields, reason in (
        ({"dataset_split": "dev"}, "ValueError: Unknown split \"dev\". Should be one of ['train']"),
        ({"dataset_config_name": "x"}, "ValueError: BuilderConfig 'x' not found. Available: ['default']"),
    ):
        name = str(tmp_path / "set")
        with pytest.raises(Refusal) as refusal:
            open_documents(TextSource(dataset_name=name, **fields), letters())
        assert str(refusal.value) == (
            f"{name}: cannot be read ({reason}). Check dataset_name, dataset_config_name and dataset_split."
        )


def test_full_disk_stays_an_error_of_the_disk(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise text_source.DatasetsError("generating failed") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(text_source, "load_dataset", fail)
    with pytest.raises(OSError, match="No space left"):
        open_documents(TextSource(train_file=[write(tmp_path, "a.txt", "a")]), letters())


def test_fingerprint_follows_the_text_and_not_its_place(tmp_path):
    for folder in ("one", "two"):
        write(tmp_path / folder, "a.txt", "first")
        write(tmp_path / folder, "b.jsonl", [{"text": "second"}])

    def of(*names, **fields):
        return fingerprint(TextSource(train_file=[tmp_path / name for name in names], **fields))

    one = of("one")
    assert re.fullmatch("[0-9a-f]{64}", one)
    os.utime(tmp_path / "two" / "a.txt", (0, 0))
    assert one == of("two") == of("two/a.txt", "one/b.jsonl") == of("one", streaming=True)
    others = {of("one/b.jsonl", "one/a.txt"), of("one/a.txt"), of("one", "one"), of("one", text_column="other")}
    write(tmp_path / "two", "a.txt", "First")
    assert len(others | {one, of("two")}) == 6


def test_fingerprint_of_a_dataset(tmp_path, monkeypatch):
    write(tmp_path / "one", "train.jsonl", [{"text": "train"}])
    shutil.copytree(tmp_path / "one", tmp_path / "two")

    def of(name, **fields):
        return fingerprint(TextSource(dataset_name=str(name), **fields))

    one = of(tmp_path / "one")
    assert one == of(tmp_path / "two") != of(tmp_path / "one", dataset_split="test")
    write(tmp_path / "two", "train.jsonl", [{"text": "other"}])
    assert one != of(tmp_path / "two")

    def builder_at(commit):
        return lambda name, config: type("Builder", (), {"hash": commit})()

    found = []
    for commit in ("c0ffee", "decade"):
        monkeypatch.setattr(text_source, "load_dataset_builder", builder_at(commit))
        found += [of("some/name"), of("some/name", dataset_config_name="x"), of("other/name")]
    assert len(set(found)) == 6 and found[3] == of("some/name", streaming=True)
