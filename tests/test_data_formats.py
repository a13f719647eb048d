"""Every format, packed in every way and oddly named, gives the same documents and conversations; what is damaged, or is
not what its name says, gives one sentence."""

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard
from corpora import iter_documents

from snlp_jax.config import DataConfig
from snlp_jax.data import formats, json_values
from snlp_jax.data.chat import prepare_chat, read_conversations
from snlp_jax.data.tokenizer import FileTokenizer
from snlp_jax.errors import InputError

TEXTS = ["first\r\nline", "zweitens: größer", 'third "quoted", {braces}', "four " * 900]
TALKS = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"yes, {i}"}]}
    for i in range(3)
]
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}
KINDS = (".jsonl", ".ndjson", ".json", "array.json", "pretty.json", "object.json", ".parquet", ".arrayrecord")


def content(kind: str, records: list[dict], folder: Path) -> bytes:
    """A file of records, as the end of its name asks for."""
    if kind in (".jsonl", ".ndjson", ".json"):  # .json: a stream, as people have it
        return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records).encode()
    if kind in ("array.json", "pretty.json"):
        return json.dumps(records, indent=2 if kind == "pretty.json" else None).encode()
    if kind == "object.json":
        return json.dumps(records[0]).encode()
    path = folder / "scratch"
    if kind == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(json.dumps(record).encode())
        writer.close()
    return path.read_bytes()


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("kind", KINDS)
def test_formats(kind: str, pack: str, tmp_path: Path) -> None:
    records = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
    path, talks = tmp_path / f"Ein [Satz] – {kind.upper()}{pack.upper()}", tmp_path / f"talks{kind}{pack}"
    path.write_bytes(PACK[pack](content(kind, records, tmp_path)))
    assert list(iter_documents(DataConfig(source=str(path)))) == TEXTS[: 1 if kind == "object.json" else None]
    talks.write_bytes(PACK[pack](content(kind, TALKS, tmp_path)))
    said = list(read_conversations(DataConfig(source=str(talks), format="chat")))
    assert said[0] == [("user", "0?"), ("assistant", "yes, 0")] and len(said) == (1 if kind == "object.json" else 3)


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("length", [3, 40])
def test_a_text_is_the_same_however_it_is_packed(pack: str, length: int, tmp_path: Path) -> None:
    text = "".join(f"paragraph {i} " + "word " * 100 + "\r\n\r\n" for i in range(length))
    (tmp_path / "plain.txt").write_bytes(text.encode())
    path = tmp_path / f"no suffix{pack}"
    path.write_bytes(PACK[pack](text.encode("utf-8-sig")))
    found = list(iter_documents(DataConfig(source=str(path))))
    assert found == list(iter_documents(DataConfig(source=str(tmp_path / "plain.txt"))))
    assert "".join(found) == text and (len(found) > 1) == (length == 40)


def test_links_are_followed_and_each_file_is_read_once(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "deep").mkdir(parents=True)
    outside.mkdir()
    (outside / "b.JSON").write_text('{"text": "b"}')
    (inside / "deep" / "a.txt").write_text("a")
    (inside / "deep" / "again.txt").symlink_to("a.txt")
    (inside / "linked").symlink_to(outside)
    (inside / "deep" / "loop").symlink_to(inside)
    (inside / "self.txt").symlink_to("self.txt")
    for source in (inside, f"{inside}/**/*.*"):
        assert list(iter_documents(DataConfig(source=str(source)))) == ["a", "b"]
    with pytest.raises(InputError, match="does not exist"):
        list(iter_documents(DataConfig(source=str(inside / "self.txt"))))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="neither a file nor a folder; write what comes from it to a file"):
        list(iter_documents(DataConfig(source=str(tmp_path / "pipe"))))


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match="cannot be read .Permission denied"):
        list(iter_documents(DataConfig(source=str(tmp_path))))


ZSTD, GZIP = PACK[".zst"], PACK[".gz"]
LINES = b"".join(b'{"text": "line %d"}\n' % i for i in range(999))
BAD = {
    "gzip cut off": ("a.jsonl.gz", GZIP(LINES)[:-9], "cannot be read"),
    "gzip flipped": ("a.jsonl.gz", GZIP(LINES)[:60] + b"\0\1\2" + GZIP(LINES)[63:], "cannot be read"),
    "gzip of nothing": ("a.txt.gz", b"", "is not packed by gzip, as its name says"),
    "zstd cut off": ("a.jsonl.zst", ZSTD(LINES)[:-9], "its last frame is cut off"),
    "zstd flipped": ("a.jsonl.zst", ZSTD(LINES)[:60] + b"\0\1\2" + ZSTD(LINES)[63:], "cannot be read"),
    "zstd by name alone": ("a.json.zst", LINES, "is not packed by zstd, as its name says"),
    "gzip under a plain name": ("a.jsonl", GZIP(LINES), "is packed by gzip, which its name does not say; rename it"),
    "zip": ("a.txt", b"PK\3\4....", "is a zip archive, which its name does not say; unpack it"),
    "parquet as text": ("a", b"PAR1....", "is a parquet file, which its name does not say; rename it to end in .par"),
    "records without a suffix": ("a", b'\n{"text": "a"}\n', "begins with a JSON object; rename it to end in .jsonl"),
    "an array of another name": ("a.data", b'[\n {"a\\"b": 1}]', "begins with a JSON object"),
    "packed records": ("a.gz", GZIP(LINES), "begins with a JSON object"),
    "JSON cut off": ("a.json", b'[{"text": "a"}, {"te', "a.json, record 2, is not valid JSON"),
    "an array cut off": ("a.json", b'[{"text": "a"}', "record 2, is not valid JSON .the array .* is cut off"),
    "a comma too many": ("a.json", b'[{"text": "a"},]', "record 2, is not valid JSON"),
    "nesting": ("a.json", b"[" * 100_000, "record 1, is not valid JSON"),
    "no record": ("a.json", b'["a"]', "record 1, has no field 'text'"),
    "no number": ("a.json", b'{"text": NaN}', "holds float in field 'text'"),
    "a long number": ("a.json", b'{"a": ' + b"1" * 9999 + b"}", "record 1, is not valid JSON"),
    "not UTF-8": ("a.json", b'{"text": "\xff"}', "is not UTF-8 text"),
    "UTF-16": ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "is not UTF-8 text"),
    "a NUL": ("a.jsonl", b'{"text": "a\0"}', "a.jsonl:1 is not valid JSON"),
    "empty parquet": ("a.parquet", b"", "is not a whole parquet file"),
    "parquet inside": ("a.parquet.gz", GZIP(b"PAR1"), "is not a whole parquet file"),
    "empty records": ("a.arrayrecord", b"", "is not an array record"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_sentence(case: str, tmp_path: Path) -> None:
    name, data, sentence = BAD[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=sentence) as caught:
        list(iter_documents(DataConfig(source=str(tmp_path / name))))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_what_json_leaves_open_is_read_as_stated(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"text": "no", "text": "yes", "x": NaN}\r\n\r\n[{"text": "\\ud800!"}] ')
    assert list(iter_documents(DataConfig(source=str(tmp_path / "a.json")))) == ["yes", "?!"]


def test_json_values_at_every_border(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the text is cut while it is read, the values are the same."""
    values = [{"text": 'a"\\\n\u1234', "n": [1.5e-7, True, None, {}]}, {"text": "b" * 50}, {}]
    for text in (json.dumps(values), " ".join(map(json.dumps, values)), json.dumps(values, indent=1) + "\n[]"):
        (tmp_path / "a.json").write_text(text)
        for size in (1, 2, 7, 40):
            monkeypatch.setattr(json_values, "_CHARS", size)
            (part,) = formats.parts_of(tmp_path / "a.json", formats.Format("json"), 10)
            assert [record for _, record in formats.records_of(part)] == values


def test_lone_surrogates_of_conversations_are_replaced_before_a_tokenizer_learns_them(tmp_path: Path) -> None:
    talks = [{"prompt": f"{i}\ud800", "response": "\udc00 words"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    data = prepare_chat(
        DataConfig(
            source=str(tmp_path / "a.jsonl"), format="chat", tokenizer="bpe", bpe_vocab_size=300, val_fraction=0.2
        )
    )
    assert isinstance(data.tokenizer, FileTokenizer)
    assert "? words" in data.tokenizer.decode(data.splits["train"][0].ids_T)
