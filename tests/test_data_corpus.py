"""Files to documents: every format, every way to divide a file, and every way to be told of a bad one."""

import gzip
import itertools
import json
import sys
import tracemalloc
from pathlib import Path

import pytest
from corpora import iter_documents, make_documents, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from snlp_jax.config import DataConfig
from snlp_jax.data import corpus, formats
from snlp_jax.data.shards import prepare_tokens
from snlp_jax.errors import InputError


def test_builtin_corpus_is_some_megabytes_in_order() -> None:
    files = corpus.corpus_files(DataConfig())
    assert files == sorted(files)
    assert 5e6 < sum(path.stat().st_size for path in files) <= corpus.BUILTIN_MAX_BYTES
    assert not {"test", "tests", "site-packages"} & {part for path in files for part in path.parts}
    assert all(len(document) > 0 for document in itertools.islice(iter_documents(DataConfig()), 20))


def test_folder_glob_and_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "sub" / "a.txt").write_bytes("\ufeffä\r\n".encode())
    (tmp_path / "sub" / "empty.txt").write_text(" \n")
    write_jsonl(tmp_path / "a.jsonl", ["c", "  ", "d\ud800"])
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "notes.md").write_text("e")
    (tmp_path / ".hidden" / "f.txt").write_text("f")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    assert list(iter_documents(DataConfig(source=str(tmp_path)))) == ["c", "d?", "b", "ä\r\n", "c", "d?"]
    assert list(iter_documents(DataConfig(source=str(tmp_path / "**/*.txt")))) == ["b", "ä\r\n"]
    assert list(iter_documents(DataConfig(source=str(tmp_path / "notes.md")))) == ["e"]


def write_parquet(path: Path, documents: list, **columns: list) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": documents, **columns}), path, row_group_size=7)


def write_records(path: Path, records: list[str]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record.encode())
    writer.close()


def write_any(path: Path, documents: list[str]) -> None:
    if path.suffix == ".parquet":
        write_parquet(path, documents)
    elif path.suffix == ".arrayrecord":
        write_records(path, [d if i % 2 else json.dumps({"text": d, "id": i}) for i, d in enumerate(documents)])
    elif path.suffix == ".gz":
        write_jsonl(path, documents)
        path.write_bytes(gzip.compress(path.read_bytes()))
    else:
        write_jsonl(path, documents)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrayrecord"])
def test_documents_do_not_depend_on_how_files_are_divided(tmp_path: Path, monkeypatch, name: str) -> None:
    documents = make_documents(50)
    write_any(tmp_path / name, documents)
    config = DataConfig(source=str(tmp_path))
    for size, fewest in ((1 << 26, 1), (2000, 4), (100, 8)):
        monkeypatch.setattr(corpus, "SHARD_BYTES", size)
        planned = corpus.plan_shards(config)
        assert list(iter_documents(config)) == documents
        assert len(planned) >= (1 if name.endswith(".gz") else fewest)
        assert len(planned) == 1 or all(sum(part.size for part in shard) >= size for shard in planned[:-1])


@given(st.lists(st.integers(0, 400), min_size=1, max_size=30), st.integers(1, 500))
def test_a_line_belongs_to_the_part_in_which_it_begins(tmp_path_factory, lengths: list[int], part_size: int) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    documents = ["é" * length + str(i) for i, length in enumerate(lengths)]
    write_jsonl(path, documents)
    parts = formats.parts_of(path, formats.format_of(path), part_size)
    assert [d for part in parts for d in formats.read_part(part, "text")] == documents
    assert len(parts) == -(-path.stat().st_size // part_size)


def test_records_that_are_no_text(tmp_path: Path, monkeypatch) -> None:
    write_records(tmp_path / "a.arrayrecord", ["{not JSON", "[1]", '{"text": "a"}', '{"body": "b"}'])
    found = iter_documents(DataConfig(source=str(tmp_path / "a.arrayrecord")))
    assert list(itertools.islice(found, 3)) == ["{not JSON", "[1]", "a"]
    with pytest.raises(InputError, match="a.arrayrecord, record 3, has no field 'text'; set data.text_field"):
        next(found)
    write_parquet(tmp_path / "a.parquet", ["a", None], number=[1, 2])
    for field, message in (
        ("body", "a.parquet has no column 'body'; set data.text_field"),
        ("number", "row 1 from row group 0 on, holds int in field 'number'"),
        ("text", "row 2 from row group 0 on, holds NoneType in field 'text'; the field must be a string"),
    ):
        with pytest.raises(InputError, match=message):
            list(iter_documents(DataConfig(source=str(tmp_path / "a.parquet"), text_field=field)))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r'needs pyarrow; pip install "snlp-jax\[parquet\]"'):
        corpus.plan_shards(DataConfig(source=str(tmp_path / "a.parquet")))


@given(st.lists(st.tuples(st.sampled_from(["word ", "\n", "\n\n", "é" * 999]), st.integers(1, 4000)), max_size=6))
def test_pieces_of_a_text_file_join_to_the_file(tmp_path_factory: pytest.TempPathFactory, parts: list) -> None:
    path = tmp_path_factory.mktemp("text") / "file.txt"
    text = "start" + "".join(part * min(count, 100_000 // len(part)) for part, count in parts)
    path.write_text(text, encoding="utf-8", newline="")
    for part_size in (1 << 26, 5000):
        pieces = [
            piece
            for part in formats.parts_of(path, formats.format_of(path), part_size)
            for piece in formats._read_text(part)
        ]
        assert "".join(pieces) == text
        assert all(0 < len(piece) <= formats.MAX_PIECE_CHARS for piece in pieces if piece)


def test_large_file_is_split_at_blank_lines(tmp_path: Path) -> None:
    paragraph = "word " * 200 + "\n\n"
    (tmp_path / "file.txt").write_text(paragraph * 100)
    pieces = list(iter_documents(DataConfig(source=str(tmp_path / "file.txt"))))
    assert len(pieces) == 20 and all(piece == paragraph * 5 for piece in pieces)


def test_large_file_is_streamed(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("one long line without an end " * 700_000)  # 20 MB
    config = DataConfig(source=str(tmp_path / "file.txt"), cache_dir=str(tmp_path / "cache"))
    tracemalloc.start()
    data = prepare_tokens(config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data.train) + len(data.val) > 20e6
    assert peak < 14e6  # a batch of 1 MB of text as str, its ids as int32, int64 and bytes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist; give 'builtin' or"),
        ("*.nothing", None, "matches no file"),
        ("", None, "holds no .txt, .jsonl, .*; add some"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n ", "holds no text"),
        ("a.jsonl", b"\n", "holds no text"),
        ("a.jsonl.gz", b'{"text": "a"}', "a.jsonl.gz' is not packed by gzip, as its name says"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-9], "a.jsonl.gz' cannot be read"),
        ("a.parquet", b"PAR1", "a.parquet' is not a whole parquet file"),
        ("a.arrayrecord", b"text" * 99, "a.arrayrecord' is not an array record"),
        ("a.txt", b"\xff\xfe\x00", "a.txt' is not UTF-8 text"),
        ("a.txt", b"abc\0def", "a.txt' is binary"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a.jsonl:2 is not valid JSON"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl:1 is not valid JSON"),
        ("a.jsonl", b'{"body": "a"}\n', r"a.jsonl:1 has no field 'text'; set data.text_field"),
        ("a.jsonl", b'["text"]\n', r"a.jsonl:1 has no field 'text'"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1 holds int in field 'text'"),
        ("a.txt", b"just one document", "holds only one document"),
        ("a.jsonl", b'{"text": "a"}\n' * 9, "holds only one document, or copies"),
    ],
)
def test_bad_corpus(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    (tmp_path / "in").mkdir()
    if content is not None:
        (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        prepare_tokens(DataConfig(source=str(tmp_path / "in" / name), cache_dir=str(tmp_path / "cache")))
    assert not list(tmp_path.glob("cache/**/.*"))
