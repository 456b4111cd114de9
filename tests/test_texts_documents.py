# SPDX-License-Identifier: Apache-2.0
"""Documents from files, folders and data sets: which, in which order, one at a time, and errors that say where."""

import json
import sys

import datasets
import pytest

from rcc_hf.prose import load_prose
from rcc_hf.texts import Document, listed_files, read_documents
from rcc_hf.texts.datasets_rows import DatasetRows


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` caches nothing outside the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def lines(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def texts(*sources):
    return [document.text for document in read_documents(*sources)]


def test_a_folder_of_texts_json_lines_and_parquet(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("öne", encoding="utf-8")
    (folder / "b.jsonl").write_text('{"text": "two"}\n\n{"text": "three\\u2028", "more": 1}\n')
    (folder / "c.md").write_text("four")
    (folder / "d.bin").write_bytes(b"\x00")
    (folder / "deep" / "a.txt").write_text("five")
    datasets.Dataset.from_dict({"text": ["six", ""], "id": [1, 2]}).to_parquet(folder / "e.parquet")
    found = list(read_documents(folder))
    assert [document.text for document in found] == ["öne", "two", "three\u2028", "four", "five", "six", ""]
    assert [document.place.removeprefix(str(folder)) for document in found[:4]] == [
        "/a.txt", "/b.jsonl, line 1", "/b.jsonl, line 3", "/c.md",
    ]  # fmt: skip
    assert len({document.place for document in found}) == len(found)
    assert found == list(read_documents(str(folder)))


def test_sources_follow_each_other(tmp_path):
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.txt").write_text("a")
    assert texts(tmp_path / "b.txt", tmp_path / "a.txt", tmp_path) == ["b", "a", "a", "b"]


@pytest.mark.real
def test_the_bundled_prose():
    books = load_prose("held_out")
    assert list(read_documents("prose-held-out")) == [Document(book.title, book.text) for book in books]


def test_documents_are_read_when_they_are_asked_for(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "fine"}\nno json\n')
    documents = read_documents(file)
    assert next(documents).text == "fine"
    with pytest.raises(ValueError, match="line 2: no JSON"):
        next(documents)


def test_a_data_set_is_streamed_from_local_files(tmp_path, monkeypatch):
    file = lines(tmp_path / "x.json", *({"body": f"text {i}", "text": 0} for i in range(5)))
    seen = []
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: seen.append(k) or load(*a, **k))
    source = f"datasets:json?data_files={file}&field=body"
    found = list(read_documents(source))
    assert [document.text for document in found] == [f"text {i}" for i in range(5)]
    assert found[1].place.endswith("field=body&data_files=" + str(file) + ", row 2")
    assert seen[0]["streaming"] is True
    assert seen[0]["split"] == "train"


def test_a_folder_is_a_data_set_with_splits(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    lines(folder / "train.jsonl", {"text": "learn"})
    lines(folder / "test.jsonl", {"text": "measure"})
    assert texts(f"datasets:{folder}") == ["learn"]
    assert texts(f"datasets:{folder}?split=test") == ["measure"]
    with pytest.raises(ValueError, match="absent"):
        texts(f"datasets:{folder}?split=absent")


def test_all_options_of_a_data_set():
    written = "datasets:org/name?config=en&split=validation&field=body&data_files=*.gz&data_dir=a/b&revision=v1"
    parsed = DatasetRows.parse(written)
    assert parsed == DatasetRows("org/name", "en", "validation", "body", "*.gz", "a/b", "v1")
    assert str(parsed) == written
    assert str(DatasetRows.parse("datasets:org/name")) == "datasets:org/name"


def test_without_the_package_a_data_set_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"datasets, which is not installed.*pip install 'rcc_hf\[train\]'"):
        texts("datasets:org/name")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "fine"}\n{"body": 1}\n', r'x\.jsonl, line 2: expected {"text": \.\.\.}, found body; .*field=NAME'),
        ('{"text": 5}\n', r"""x\.jsonl, line 1: "text" is '5' \(int\), not a string"""),
        ('{"text": null}\n', r'line 1: "text" is .*NoneType'),
        ("[1]\n", r"line 1: expected an object, found '\[1\]'"),
        (b'{"text": "\xff"}\n', "line 1: no JSON in UTF-8"),
        ("\n\n", "holds no text; give files that end in .txt, .md, .jsonl, .parquet"),
    ],
)
def test_rows_without_text_are_errors_that_say_where(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / "x.jsonl")


def test_a_data_set_without_the_field_names_its_columns(tmp_path):
    lines(tmp_path / "x.json", {"body": "a", "id": 1})
    with pytest.raises(ValueError, match=r'row 1: expected {"text": \.\.\.}, found body, id'):
        texts(f"datasets:json?data_files={tmp_path}/x.json")


def test_a_text_in_another_encoding_is_an_error(tmp_path):
    (tmp_path / "x.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.txt is no text in UTF-8"):
        texts(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent", "absent is neither a file or folder nor one of prose, prose-held-out, nor datasets:NAME"),
        ("absent.jsonl", r"there is no file absent\.jsonl"),
        ("datasets:", "names no data set"),
        ("datasets:x?split", "'split' is not understood; .* one of config, split, field"),
        ("datasets:x?fields=text", "'fields=text' is not understood"),
        ("datasets:x?split=a&split=b", "'split=b' is not understood.*each once"),
    ],
)
def test_sources_that_cannot_be_are_refused_before_any_is_read(tmp_path, source, message):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path, source)


def test_no_source_and_an_empty_folder_are_errors(tmp_path):
    with pytest.raises(ValueError, match="there is no source"):
        read_documents()
    with pytest.raises(ValueError, match="holds no text"):
        texts(tmp_path)


def test_a_list_names_files_of_a_folder(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.md").write_text(name)
    (tmp_path / "list").write_text("c.md\n\n a.md \n")
    assert texts(*listed_files(tmp_path, tmp_path / "list")) == ["c", "a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.md\nb.md", r"list, line 2: .*b\.md is no file that ends in \.txt"),
        ("a.md\na.md", r"list, line 2: .*a\.md is named twice"),
        ("a.md\nlist", "line 2: .*list is no file that ends in"),
        ("\n", "names no files"),
    ],
)
def test_a_list_with_mistakes_is_refused(tmp_path, content, message):
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "list").write_text(content)
    with pytest.raises(ValueError, match=message):
        listed_files(tmp_path, tmp_path / "list")
