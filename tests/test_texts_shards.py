# SPDX-License-Identifier: Apache-2.0
"""Token shards in memory, and windows: what is cut, what may be drawn and how often, and errors."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rcc_hf.texts import TokenShards, Windows

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any)


def documents(lengths):
    """Ids that say where they are: 100 times the document, plus the place."""
    return [np.arange(length) + 100 * number for number, length in enumerate(lengths)]


@given(LENGTHS)
def test_a_slice_is_what_the_document_has_there(lengths):
    rows = documents(lengths)
    shards = TokenShards.of_documents(rows)
    assert (shards.num_documents, shards.num_tokens) == (len(lengths), sum(lengths))
    assert shards.lengths.tolist() == lengths
    for number, row in enumerate(rows):
        for start in range(len(row) + 1):
            for length in range(len(row) - start + 1):
                found = shards.slice(number, start, length)
                assert found.dtype == np.int64
                assert found.tolist() == row[start : start + length].tolist()


@given(LENGTHS, st.integers(1, 5))
def test_windows_are_all_places_within_documents_each_once(lengths, length):
    shards = TokenShards.of_documents(documents(lengths))
    expected = [(d, s) for d, size in enumerate(lengths) for s in range(size) if s + length <= size]
    if not expected:
        with pytest.raises(ValueError, match=f"no document has {length} tokens, the longest has {max(lengths)}"):
            Windows(shards, length)
        return
    windows = Windows(shards, length)
    assert list(windows) == expected
    assert len(windows) == sum(max(0, size - length + 1) for size in lengths)
    rng = np.random.default_rng(0)
    for _ in range(20):
        document, start = windows.draw(rng)
        ids = shards.slice(document, start, length)
        assert set(ids // 100) == {document}
        assert len(ids) == length


def test_every_place_is_drawn_equally_often():
    """Chi-square with 29 degrees of freedom: beyond 58.3 once in a thousand, and the seed is fixed."""
    windows = Windows(TokenShards.of_documents(documents([1, 20, 2, 3, 13, 0])), 3)
    assert len(windows) == 30
    rng, draws = np.random.default_rng(5), 30_000
    counts = dict.fromkeys(windows, 0)
    for _ in range(draws):
        counts[windows.draw(rng)] += 1
    expected = draws / len(windows)
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 58.3


def test_draws_are_those_of_the_generator():
    windows = Windows(TokenShards.of_documents(documents([50, 60])), 4)
    first, again = ([windows.draw(np.random.default_rng([7, i])) for i in range(9)] for _ in range(2))
    assert first == again
    assert len(set(first)) > 5


def test_tensors_arrays_and_lists_are_documents():
    made = TokenShards.of_documents([torch.tensor([1, 2]), np.array([3], np.uint16), [4, 70_000]])
    assert [made.slice(i, 0, n).tolist() for i, n in enumerate([2, 1, 2])] == [[1, 2], [3], [4, 70_000]]


def test_a_stream_is_cut_at_its_separator():
    shards = TokenShards.of_stream(np.array([0, 0, 5, 6, 0, 7, 0, 0, 8, 9, 9], "<u2"), 0)
    assert [shards.slice(i, 0, n).tolist() for i, n in enumerate(shards.lengths)] == [[5, 6], [7], [8, 9, 9]]
    ended = TokenShards.of_stream(torch.tensor([5, 6, 0, 7, 0]), separator=0)
    assert ended.lengths.tolist() == [2, 1]
    assert shards.fingerprint != ended.fingerprint


def test_a_fingerprint_tells_tokens_and_documents_apart():
    rows = [[[1, 2], [3]], [[1], [2, 3]], [[1, 2], [4]], [[1, 2], [3], []]]
    assert len({TokenShards.of_documents(row).fingerprint for row in rows}) == len(rows)
    assert TokenShards.of_documents(rows[0]).fingerprint == TokenShards.of_stream(np.array([1, 2, 0, 3]), 0).fingerprint


def test_shards_in_memory_travel_to_other_processes():
    shards = TokenShards.of_documents([[1, 2, 3]])
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.slice(0, 1, 2).tolist() == [2, 3]
    assert copy.fingerprint == shards.fingerprint


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenShards.of_documents([]), "the list of documents holds no tokens"),
        (lambda: TokenShards.of_documents([[], []]), "holds no tokens"),
        (lambda: TokenShards.of_documents([[1], [[1, 2]]]), r"document 1 is an array of int64 \[1, 2\]; .* one row"),
        (lambda: TokenShards.of_documents([[1.5]]), "document 0 is an array of float64"),
        (lambda: TokenShards.of_documents([[-1]]), "integers from 0"),
        (lambda: TokenShards.of_documents([[2**32]]), "the largest id is 4294967296"),
        (lambda: TokenShards.of_stream(np.zeros(4, int), 0), "holds no tokens"),
        (lambda: TokenShards.of_stream(np.zeros((2, 2), int), 0), r"ids is an array of int64 \[2, 2\]"),
        (lambda: Windows(TokenShards.of_documents([[1]]), 0), "length is 0"),
        (lambda: TokenShards.of_documents([[1, 2]]).slice(0, 1, 2), "start is 1 and length 2; document 0 has 2 tokens"),
        (lambda: TokenShards.of_documents([[1, 2]]).slice(0, -1, 1), "start is -1"),
    ],
)
def test_what_is_no_token_row_or_place_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("document", [-1, 1])
def test_documents_that_are_not_there_are_refused(document):
    with pytest.raises(IndexError, match="there are 1, from 0"):
        TokenShards.of_documents([[1]]).slice(document, 0, 1)
