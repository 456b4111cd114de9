# SPDX-License-Identifier: Apache-2.0
"""Blocks of tokens."""

import pytest
import torch

from rcc_hf.texts.blocks import TokenBlocks


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
