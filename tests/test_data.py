# SPDX-License-Identifier: Apache-2.0
"""Documents from files, and blocks of tokens."""

import json

import pytest
import torch

from rcc_hf.data import TokenBlocks, read_documents


class OneTokenPerCharacter:
    def __call__(self, text, **kwargs):
        return {"input_ids": [ord(c) for c in text]}


def blocks(*texts, length=4):
    return TokenBlocks(texts, OneTokenPerCharacter(), length, [1], progress=False)


def test_blocks_cover_every_token_and_span_no_two_documents():
    made = blocks("abcdefghij", "ABCD", "xy")
    contexts = ["".join(map(chr, made.context(i).tolist())) for i in range(len(made))]
    assert contexts == ["abcd", "efgh", "ghij", "ABCD"]
    assert made.num_short == 1


def test_a_document_of_whole_blocks_has_no_overlap():
    made = blocks("abcdefgh")
    assert [made.context(i).tolist() for i in range(len(made))] == [[97, 98, 99, 100], [101, 102, 103, 104]]


def test_an_item_is_a_reconstruction_example():
    item = blocks("abcd")[0]
    assert item["input_ids"].tolist() == [1, 97, 98, 99, 100]
    assert torch.equal(item["context_ids"], item["input_ids"][1:])


def test_only_short_documents_are_an_error():
    with pytest.raises(ValueError, match="all 2 documents have less than 4 tokens"):
        blocks("ab", "c")


def test_documents_from_a_folder_of_texts_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "two"}) + "\n\n" + json.dumps({"text": "three"}) + "\n")
    (tmp_path / "c.md").write_text("four")
    (tmp_path / "d.bin").write_bytes(b"\x00")
    assert read_documents(str(tmp_path)) == ["one", "two", "three", "four"]


def test_a_line_without_text_names_file_and_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n{"body": 1}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2.*\"text\""):
        read_documents(str(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("make", [lambda p: p / "absent", lambda p: p])
def test_nothing_to_read_is_an_error(tmp_path, make):
    with pytest.raises(ValueError, match=r"neither a file|holds no text"):
        read_documents(str(make(tmp_path)))
