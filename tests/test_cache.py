# SPDX-License-Identifier: Apache-2.0
"""The cache by itself: its two lengths, what may be taken out of it, and rows that move."""

import copy

import pytest
import torch
from tiny import RATIO, SEGMENT, ratio_of_norms, rcc_model, tokens

from rcc_hf.modeling.cache_rcc import RCCCache, ReadOnlyLayer

LAYERS, BATCH, HEADS, SLOTS, WIDTH = 3, 2, 2, 12, 8

# tokens decoded by the first call and tokens of the prompt: nothing compressed; 6 raw tokens of the memory in front;
# 32 tokens of the prompt compressed; 6 in front and 16 of all compressed
FIRST_CALLS = [(5, 5), (11, 5), (5, 37), (11, 21)]


def rows(length: int, seed: int) -> torch.Tensor:
    """Keys or values `[B, H, T, D]`."""
    return torch.randn(BATCH, HEADS, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def slots() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(rows(SLOTS, 2 * i), rows(SLOTS, 2 * i + 1)) for i in range(LAYERS)]


def filled(local_length: int, input_length: int, mask: torch.Tensor | None = None) -> RCCCache:
    """A cache after its first forward call."""
    cache = RCCCache(LAYERS)
    slot_mask = None if mask is None else mask[:, :SLOTS]
    cache.start(slots(), slot_mask, 0, local_length=local_length, input_length=input_length)
    for i in range(LAYERS):
        cache.update(rows(local_length, 100 + i), rows(local_length, 200 + i), i)
    cache.mask = mask
    return cache


def full_mask(local_length: int) -> torch.Tensor:
    """The second row has 4 slots fewer and 2 local tokens fewer."""
    mask = torch.ones(BATCH, SLOTS + local_length, dtype=torch.long)
    mask[1, :4] = 0
    mask[1, SLOTS : SLOTS + 2] = 0
    return mask


def contents(cache: RCCCache) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_a_cache_that_has_not_started_is_empty():
    cache = RCCCache(LAYERS)
    assert (cache.started, cache.num_slots, cache.physical_length, cache.get_seq_length()) == (False, 0, 0, 0)
    assert cache.get_query_offset() == 0
    cache.reset()
    assert cache.physical_length == 0


@pytest.mark.parametrize(("local_length", "input_length"), FIRST_CALLS)
def test_logical_length_counts_the_prompt_and_physical_length_the_entries(local_length, input_length):
    cache = filled(local_length, input_length)
    assert (cache.started, cache.num_slots) == (True, SLOTS)
    for new in range(3):
        assert cache.get_seq_length() == input_length + new
        assert cache.get_query_offset() == cache.physical_length == SLOTS + local_length + new
        for i in range(LAYERS):
            assert cache.get_mask_sizes(4, i) == (SLOTS + local_length + new + 4, 0)
            cache.update(rows(1, new), rows(1, new), i)


def test_slots_are_in_front_of_what_is_added():
    cache = filled(5, 5)
    for i, (keys, values) in enumerate(slots()):
        assert torch.equal(cache.layers[i].keys, torch.cat([keys, rows(5, 100 + i)], 2))
        assert torch.equal(cache.layers[i].values, torch.cat([values, rows(5, 200 + i)], 2))


def test_a_cache_may_start_without_slots():
    cache = RCCCache(LAYERS)
    cache.start([], None, 0, local_length=5, input_length=5)
    for i in range(LAYERS):
        cache.update(rows(5, i), rows(5, i), i)
    assert (cache.num_slots, cache.physical_length, cache.get_seq_length()) == (0, 5, 5)
    cache.reset()
    assert (cache.physical_length, cache.get_seq_length()) == (0, 0)


@pytest.mark.parametrize(("local_length", "input_length"), FIRST_CALLS)
@pytest.mark.parametrize("absolute", [False, True], ids=["by number", "to length"])
@pytest.mark.parametrize("masked", [False, True])
def test_crop_takes_the_last_tokens(local_length, input_length, absolute, masked):
    """Older versions of transformers say to which (logical) length, newer ones by how many tokens."""
    mask = full_mask(local_length) if masked else None
    cache = filled(local_length, input_length, mask)
    cache.crop(input_length - 3 if absolute else -3)
    expected = filled(local_length, input_length)
    assert_same(contents(cache), [tensor[:, :, :-3] for tensor in contents(expected)])
    assert (cache.get_seq_length(), cache.physical_length) == (input_length - 3, SLOTS + local_length - 3)
    assert (cache.mask is None) if mask is None else torch.equal(cache.mask, mask[:, :-3])


@pytest.mark.parametrize(
    ("local_length", "input_length", "absolute"),
    # where nothing was compressed no length is shorter than that of the raw tokens
    [*((*call, False) for call in FIRST_CALLS), (5, 37, True), (11, 21, True)],
)
def test_crop_does_not_cut_into_memory(local_length, input_length, absolute):
    """Raw tokens of the memory are memory too."""
    raw = min(local_length, input_length)
    cache = filled(local_length, input_length, full_mask(local_length))
    before, mask = [tensor.clone() for tensor in contents(cache)], cache.mask.clone()
    with pytest.raises(ValueError, match=f"cannot remove {raw + 1} tokens: {raw} are raw.*Crop fewer") as error:
        cache.crop(input_length - raw - 1 if absolute else -raw - 1)
    assert "memory" in str(error.value)
    assert_same(contents(cache), before)
    assert torch.equal(cache.mask, mask)
    cache.crop(-raw)
    assert cache.physical_length == SLOTS + local_length - raw


@pytest.mark.parametrize(("local_length", "input_length"), FIRST_CALLS)
def test_reset_keeps_the_memory(local_length, input_length):
    mask = full_mask(local_length)
    cache, kept = filled(local_length, input_length, mask), SLOTS + max(0, local_length - input_length)
    cache.update(rows(2, 7), rows(2, 8), 0)
    for i in range(1, LAYERS):
        cache.update(rows(2, 7), rows(2, 8), i)
    cache.mask = torch.cat([mask, mask.new_ones(BATCH, 2)], 1)
    cache.reset()
    expected = filled(local_length, input_length)
    assert_same(contents(cache), [tensor[:, :, :kept] for tensor in contents(expected)])
    assert torch.equal(cache.mask, mask[:, :kept])
    assert cache.get_seq_length() == max(0, input_length - local_length)
    cache.reset()
    assert cache.physical_length == kept


@pytest.mark.parametrize("length", [54, 48])
def test_after_a_reset_the_memory_answers_as_at_first(length):
    model = rcc_model()
    memory, first, second = model.compress(tokens(1, length)), tokens(1, 7, seed=1), tokens(1, 4, seed=2)
    with torch.no_grad():
        cache = model(first, memory=memory).past_key_values
        cache.reset()
        actual = model(second, past_key_values=cache).logits
        assert ratio_of_norms(actual, model(second, memory=memory).logits) <= 1e-10


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("move", "order"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda cache: cache.batch_repeat_interleave(3), [0, 0, 0, 1, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ],
    ids=["reorder", "repeat", "select"],
)
def test_rows_move_with_their_mask(move, order, masked):
    mask = full_mask(5) if masked else None
    cache = filled(5, 5, mask)
    move(cache)
    assert_same(contents(cache), [tensor[order] for tensor in contents(filled(5, 5))])
    assert (cache.mask is None) if mask is None else torch.equal(cache.mask, mask[order])
    assert (cache.get_seq_length(), cache.physical_length) == (5, SLOTS + 5)


def test_a_copy_goes_its_own_way():
    cache = filled(5, 37, full_mask(5))
    twin = copy.deepcopy(cache)
    before = [tensor.clone() for tensor in contents(cache)]
    for i in range(LAYERS):
        twin.update(rows(2, 7), rows(2, 8), i)
        twin.layers[i].keys.zero_()
    twin.mask.zero_()
    assert_same(contents(cache), before)
    assert torch.equal(cache.mask, full_mask(5))
    assert (cache.get_seq_length(), twin.get_seq_length()) == (37, 39)
    twin.crop(-4)
    with pytest.raises(ValueError, match="3 are raw"):
        twin.crop(-4)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (None, None, None),
        ([[0, 1], [1, 1]], None, [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
        (None, [[0, 1, 1], [1, 1, 1]], [[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]),
        ([[0, 1], [1, 1]], [[1, 1, 0], [0, 1, 1]], [[0, 1, 1, 1, 0], [1, 1, 0, 1, 1]]),
    ],
)
def test_the_mask_grows_with_the_tokens(old, new, expected):
    cache = RCCCache(1)
    slot_mask = None if old is None else torch.tensor(old)
    cache.start([(rows(2, 0), rows(2, 1))], slot_mask, 0, local_length=3, input_length=3)
    mask = cache.extend_mask(None if new is None else torch.tensor(new), batch_size=BATCH, query_length=3, device="cpu")
    assert (mask is None) if expected is None else mask.tolist() == expected
    assert (cache.mask is None) if old is None else cache.mask.tolist() == old


def test_read_only_layer_replays():
    layer, keys, values = ReadOnlyLayer(), rows(SLOTS, 0), rows(SLOTS, 1)
    new = rows(3, 2), rows(3, 3)
    assert_same(list(layer.update(*new)), list(new))
    assert not layer.is_initialized
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    for _ in range(2):
        assert_same(list(layer.update(*new)), [torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2)])
        assert (layer.keys is keys, layer.values is values) == (True, True)
        assert layer.get_seq_length() == SLOTS
        assert layer.get_mask_sizes(3) == (SLOTS + 3, 0)


def test_read_only_layer_lets_gradients_through():
    layer, keys, new = ReadOnlyLayer(), rows(SLOTS, 0).requires_grad_(), rows(3, 2).requires_grad_()
    layer.lazy_initialization(keys, keys)
    layer.keys, layer.values = keys, keys
    sum(tensor.sum() for tensor in layer.update(new, new)).backward()
    assert torch.equal(keys.grad, torch.full_like(keys, 2))
    assert torch.equal(new.grad, torch.full_like(new, 2))


def test_forward_without_a_cache_reads_only():
    model, ids = rcc_model(), tokens(1, 7, seed=1)
    memory = model.compress(tokens(1, 54))
    with torch.no_grad():
        output = model(ids, memory=memory, use_cache=False)
        assert output.past_key_values is None
        assert ratio_of_norms(output.logits, model(ids, memory=memory).logits) <= 1e-10


def test_a_cache_made_by_hand_is_filled_from_its_memory():
    model, ids = rcc_model(), tokens(1, 7, seed=1)
    memory = model.compress(tokens(1, 54))
    cache = RCCCache(LAYERS, memory)
    with torch.no_grad():
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids, memory=memory).logits)
    assert cache.physical_length == 3 * SEGMENT // RATIO + 6 + 7
    assert cache.memory is None
