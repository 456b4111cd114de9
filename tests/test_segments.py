# SPDX-License-Identifier: Apache-2.0
"""The segment grid equals lists cut row by row, for random masks: padding in front, behind, and in between."""

import random

import pytest
import torch
from torch import Tensor

from rcc_hf.modeling.segments_rcc import Grid, count_segments, join, pack_left

seeds = pytest.mark.parametrize("seed", range(40))
embedded = pytest.mark.parametrize("as_embeddings", [False, True], ids=["ids", "embeddings"])


def random_case(seed: int) -> tuple[Tensor, Tensor | None, int, int | None]:
    """Ids `[B, T]`, a mask or None, a segment length and a window or None."""
    rng = random.Random(seed)
    batch_size, length, segment_length = rng.randint(1, 4), rng.randint(1, 30), rng.randint(1, 7)
    ids = torch.arange(1, batch_size * length + 1).reshape(batch_size, length)
    density = rng.choice([None, 0.0, 0.3, 0.8, 1.0])
    if density is None:
        return ids, None, segment_length, rng.choice([None, rng.randint(1, 12)])
    mask = torch.tensor([[int(rng.random() < density) for _ in range(length)] for _ in range(batch_size)])
    return ids, mask, segment_length, rng.choice([None, rng.randint(1, 12)])


def embed(ids: Tensor) -> Tensor:
    """Embeddings `[..., 3]` that tell which ids they are of, 0 for 0."""
    return ids[..., None] * torch.tensor([1.0, -1.0, 0.5])


def real_rows(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The real tokens of every row."""
    mask = torch.ones_like(ids) if mask is None else mask
    return [[t for t, m in zip(*row, strict=True) if m] for row in zip(ids.tolist(), mask.tolist(), strict=True)]


def count_by_hand(length: int, segment_length: int, window: int | None) -> int:
    """Compress segments while too much is left, but never all of a row that has a window."""
    left = length
    if window is None:
        while left >= segment_length:
            left -= segment_length
    else:
        while left > window and left > segment_length:
            left -= segment_length
    return (length - left) // segment_length


@seeds
@embedded
def test_pack_left_moves_padding_in_front_and_keeps_the_order(seed, as_embeddings):
    ids, mask, _, _ = random_case(seed)
    inputs = embed(ids) if as_embeddings else ids
    packed, packed_mask = pack_left(inputs, mask)
    assert packed.shape == inputs.shape
    if mask is None or mask.all():
        assert packed_mask is None
    else:
        assert packed_mask.tolist() == [sorted(row) for row in mask.tolist()]
    for row, real in enumerate(real_rows(ids, mask)):
        expected = embed(torch.tensor(real, dtype=torch.long)) if as_embeddings else torch.tensor(real)
        assert torch.equal(packed[row, packed.shape[1] - len(real) :], expected.to(packed.dtype))


@seeds
@embedded
def test_grid_cuts_every_row_as_it_would_be_cut_alone(seed, as_embeddings):
    ids, mask, segment_length, window = random_case(seed)
    rows = real_rows(ids, mask)
    counts = [count_by_hand(len(row), segment_length, window) for row in rows]
    segments = [
        row[i * segment_length :][:segment_length] for row, n in zip(rows, counts, strict=True) for i in range(n)
    ]
    locals_ = [row[n * segment_length :] for row, n in zip(rows, counts, strict=True)]
    packed, packed_mask = pack_left(ids, mask)
    grid = Grid.of(packed, packed_mask, segment_length, window)
    assert (grid.lengths, grid.counts) == (tuple(map(len, rows)), tuple(counts))
    assert (grid.num_segments, grid.is_ragged) == (sum(counts), len(set(counts)) > 1)
    inputs = embed(packed) if as_embeddings else packed
    for number in range(1, len(segments) + 2):
        batches = list(grid.segment_batches(inputs, number * segment_length + segment_length // 2))
        assert [place.start for place, _ in batches] == list(range(0, len(segments), number))
        for place, batch in batches:
            expected = torch.tensor(segments[place])
            assert torch.equal(batch, embed(expected) if as_embeddings else expected)
    local, local_mask = grid.take_local(inputs)
    longest = max(map(len, locals_))
    assert local.shape[:2] == (len(rows), longest)
    assert (local_mask is None) == (len(set(map(len, locals_))) == 1)
    if local_mask is not None:
        assert local_mask.tolist() == [[0] * (longest - len(x)) + [1] * len(x) for x in locals_]
    for row, real in enumerate(locals_):
        expected = torch.tensor(real, dtype=torch.long)
        actual = local[row, longest - len(real) :]
        assert torch.equal(actual, embed(expected) if as_embeddings else expected)


@seeds
def test_cells_and_block_mask_put_segments_last(seed):
    ids, mask, segment_length, window = random_case(seed)
    grid = Grid.of(*pack_left(ids, mask), segment_length, window)
    most = max(grid.counts)
    real = [[block >= most - n for block in range(most)] for n in grid.counts]
    rows, blocks = grid.cells(torch.device("cpu"))
    expected = [(row, block) for row in range(len(ids)) for block in range(most) if real[row][block]]
    assert list(zip(rows.tolist(), blocks.tolist(), strict=True)) == expected
    for slots in (1, 3):
        slot_mask = grid.block_mask(slots, torch.device("cpu"))
        if grid.is_ragged:
            assert slot_mask.tolist() == [[int(b) for b in row for _ in range(slots)] for row in real]
        else:
            assert slot_mask is None


@seeds
@embedded
def test_join_puts_rows_one_behind_the_other(seed, as_embeddings):
    first, first_mask, _, _ = random_case(seed)
    length = random.Random(seed).randint(0, 9)
    second = 1000 + torch.arange(len(first) * length).reshape(len(first), length)
    second_mask = None if seed % 3 else torch.randint(0, 2, second.shape)
    inputs = (embed(first), embed(second)) if as_embeddings else (first, second)
    joined, mask = join(inputs[0], first_mask, inputs[1], second_mask)
    both = torch.cat([first, second], 1)
    assert torch.equal(joined, embed(both) if as_embeddings else both)
    assert (mask is None) == (first_mask is None and second_mask is None)
    expected = [a + b for a, b in zip(real_rows(first, first_mask), real_rows(second, second_mask), strict=True)]
    assert real_rows(both, mask) == expected


@pytest.mark.parametrize(
    ("length", "segment_length", "window", "expected"),
    [
        (15, 16, None, 0),
        (16, 16, None, 1),
        (47, 16, None, 2),
        (48, 16, None, 3),
        (32, 16, 32, 0),  # fits the window
        (33, 16, 32, 1),
        (48, 16, 32, 1),  # exactly the window is left
        (49, 16, 32, 2),
        (16, 16, 16, 0),
        (17, 16, 16, 1),
        (32, 16, 16, 1),  # an exact multiple: the last segment stays, or nothing would be left to decode
        (33, 16, 16, 2),
        (16, 16, 8, 0),  # a window shorter than a segment
        (17, 16, 8, 1),
        (5, 1, 1, 4),
        (0, 16, None, 0),
        (0, 16, 32, 0),
    ],
)
def test_count_segments_at_its_edges(length, segment_length, window, expected):
    assert count_segments(length, segment_length, window) == expected


def test_count_segments_equals_counting_by_hand():
    for segment_length in range(1, 9):
        for window in (None, *range(1, 20)):
            for length in range(60):
                expected = count_by_hand(length, segment_length, window)
                assert count_segments(length, segment_length, window) == expected, (length, segment_length, window)


def test_window_leaves_at_most_itself_and_at_least_one_token():
    for segment_length in range(1, 9):
        for window in range(segment_length, 20):
            for length in range(1, 60):
                left = length - segment_length * count_segments(length, segment_length, window)
                assert 1 <= left <= window
