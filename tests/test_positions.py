# SPDX-License-Identifier: Apache-2.0
"""Positions of slots and text, fitted into the base's range on demand."""

import pytest
import torch
from tiny import SEGMENT, ratio_of_norms, rcc_model, text_config, tokens

from rcc_hf import RCCConfig, RCCMemory
from rcc_hf.modeling.positions_rcc import local_positions, moved_up, slot_positions, slot_tokens, slots_reach

WIRINGS = pytest.mark.parametrize("wiring", ["replace", "add"])
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def config(**options):
    return RCCConfig(text_config=text_config(), segment_length=SEGMENT, ratio=4, window=32, **options)


def short_model(wiring="replace", **options):
    """A base of 64 positions, of which fitted slots have 20."""
    text = text_config(max_position_embeddings=64)
    options = {"fit_positions": True, "slot_positions": 20, **options}
    return rcc_model(text_config=text, scheme_options={"wiring": wiring}, **options)


def test_slots_count_up_and_text_follows():
    index, shift = slot_positions(config(), None, (1, 3), "cpu")
    assert index.tolist() == [[0, 1, 2]]
    assert local_positions(None, 3, 2, shift, "cpu").tolist() == [[3, 4]]


def test_fitted_slots_are_spread_evenly_and_text_keeps_its_stride():
    index, shift = slot_positions(config(fit_positions=True, slot_positions=2), None, (1, 4), "cpu")
    assert index.tolist() == [[0, 0.5, 1, 1.5]]
    assert local_positions(None, 4, 3, shift, "cpu").tolist() == [[2, 3, 4]]


def test_each_row_is_fitted_by_its_own_number_of_slots():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    index, shift = slot_positions(config(fit_positions=True, slot_positions=2), mask, (2, 4), "cpu")
    assert index[0].tolist() == [0, 0.5, 1, 1.5]
    assert index[1, 2:].tolist() == [0, 1]
    full = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], 1)
    assert local_positions(full, 4, 2, shift, "cpu").tolist() == [[2, 3], [2, 3]]


def test_what_fits_is_not_fitted():
    index, shift = slot_positions(config(fit_positions=True, slot_positions=4), None, (1, 4), "cpu")
    assert index.tolist() == [[0, 1, 2, 3]]
    assert shift == 0


@WIRINGS
def test_a_fitted_memory_computes_what_the_training_pass_computes(wiring):
    model, context, prompt = (
        short_model(wiring),
        tokens(2, 10 * SEGMENT),
        tokens(2, 9, seed=1),
    )  # 40 slots, 20 positions
    through_memory = model(prompt, memory=model.compress(context)).logits
    assert ratio_of_norms(through_memory, model(prompt, context_ids=context).logits) <= 1e-10


@WIRINGS
def test_fitting_changes_something_and_steps_equal_one_pass(wiring):
    model, context, prompt = short_model(wiring), tokens(1, 10 * SEGMENT), tokens(1, 9, seed=1)
    memory = model.compress(context)
    whole = model(prompt, memory=memory).logits
    cache, steps = None, []
    for i in range(prompt.shape[1]):
        given = {"memory": memory} if cache is None else {"past_key_values": cache}
        outputs = model(prompt[:, i : i + 1], **given)
        cache = outputs.past_key_values
        steps.append(outputs.logits)
    assert ratio_of_norms(torch.cat(steps, 1), whole) <= 1e-10
    wider = short_model(wiring, slot_positions=30)
    assert ratio_of_norms(wider(prompt, memory=memory).logits, whole) > 1e-3


@pytest.mark.parametrize("spread", [False, True])
def test_rows_of_a_ragged_fitted_batch_equal_single_rows_with_beams(spread):
    model = short_model(spread_slots=spread)
    ids = tokens(2, 12 * SEGMENT + 5)
    ids[1, : 7 * SEGMENT] = 0
    mask = (ids != 0).long()
    batch = model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY)[:, ids.shape[1] :]
    for row in range(2):
        alone = model.generate(ids[row : row + 1, mask[row].argmax() :], num_beams=3, **GREEDY)[:, -6:]
        assert torch.equal(batch[row : row + 1], alone)


def test_without_fitting_too_many_positions_are_refused_with_the_remedy():
    model = short_model(fit_positions=False)
    memory = model.compress(tokens(1, 15 * SEGMENT))
    with pytest.raises(ValueError, match=r"positions, but the base was trained for 64.*fit_positions=True"):
        model.generate(tokens(1, 9), memory=memory, **GREEDY)


def test_text_beyond_the_range_is_refused_even_when_slots_are_fitted():
    model = short_model()
    memory = model.compress(tokens(1, 15 * SEGMENT))
    with pytest.raises(ValueError, match="need 79 positions"):
        model.generate(tokens(1, 9), memory=memory, **GREEDY | {"max_new_tokens": 50})


@pytest.mark.parametrize("slot_positions", [0, 512])
def test_slot_positions_out_of_range_are_refused(slot_positions):
    with pytest.raises(ValueError, match=f"slot_positions={slot_positions}"):
        config(slot_positions=slot_positions)


def test_a_cache_keeps_each_rows_shift_when_rows_move():
    model = short_model()
    context = tokens(2, 10 * SEGMENT)
    context[1, : 8 * SEGMENT] = 0
    mask = (context != 0).long()
    cache = model(tokens(2, 3), memory=model.compress(context, attention_mask=mask)).past_key_values
    assert cache.position_shift.tolist() == [[20], [0]]
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    assert cache.position_shift.tolist() == [[0], [20], [20], [0]]
    cache.batch_select_indices(torch.tensor([1, 3]))
    assert cache.position_shift.tolist() == [[20], [0]]


def test_spread_slots_stand_where_their_text_stood_and_text_follows():
    index, shift = slot_positions(config(spread_slots=True), None, (1, 3), "cpu", [4, 4, 8])
    assert index.tolist() == [[3, 7, 15]]
    assert local_positions(None, 3, 2, shift, "cpu").tolist() == [[16, 17]]
    assert moved_up(shift) == 13


@pytest.mark.parametrize("masked", [False, True])
def test_spread_slots_of_long_texts_shrink_evenly(masked):
    mask = torch.ones(1, 4, dtype=torch.long) if masked else None
    index, shift = slot_positions(config(spread_slots=True, slot_positions=8), mask, (1, 4), "cpu", [4] * 4)
    assert index.tolist() == [[1.5, 3.5, 5.5, 7.5]]
    assert int(shift) == -4


def test_spread_slots_of_a_row_do_not_count_what_it_lacks():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    index, shift = slot_positions(config(spread_slots=True), mask, (2, 4), "cpu", [4] * 4)
    assert index[0].tolist() == [3, 7, 11, 15]
    assert index[1, 2:].tolist() == [3, 7]
    assert shift.tolist() == [[-12], [-6]]
    full = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], 1)
    assert local_positions(full, 4, 2, shift, "cpu").tolist() == [[16, 17], [8, 9]]


@pytest.mark.parametrize(
    ("options", "numbers", "expected"),
    [
        ({}, (5, 20), 5),
        ({"fit_positions": True}, (50, 200), 30),
        ({"spread_slots": True}, (5, 20), 20),
        ({"spread_slots": True}, (5, 40), 30),
        ({"spread_slots": True}, (50, 200), 50),
        ({"spread_slots": True, "fit_positions": True}, (50, 200), 30),
    ],
)
def test_positions_that_slots_take(options, numbers, expected):
    assert slots_reach(config(slot_positions=30, **options), *numbers) == expected


@WIRINGS
@pytest.mark.parametrize("segments", [1, 10])
def test_a_spread_memory_computes_what_the_training_pass_computes(wiring, segments):
    """Within the base's range, and beyond it."""
    model = short_model(wiring, spread_slots=True, fit_positions=False, slot_positions=44)
    context, prompt = tokens(2, segments * SEGMENT), tokens(2, 9, seed=1)
    through_memory = model(prompt, memory=model.compress(context)).logits
    assert ratio_of_norms(through_memory, model(prompt, context_ids=context).logits) <= 1e-10
    other = short_model(wiring, fit_positions=False)
    assert ratio_of_norms(other(prompt, context_ids=context).logits, through_memory) > 1e-3


def test_text_behind_spread_slots_is_refused_where_the_range_ends():
    model = short_model(spread_slots=True, fit_positions=False, slot_positions=44)
    memory = model.compress(tokens(1, 2 * SEGMENT))
    model(tokens(1, 32), memory=memory)
    with pytest.raises(ValueError, match="need 65 positions"):
        model(tokens(1, 33), memory=memory)
    with pytest.raises(ValueError, match="need 65 positions"):
        model(tokens(1, 33), context_ids=tokens(1, 2 * SEGMENT))
    with pytest.raises(ValueError, match="positions, but the base was trained for 64"):
        model.generate(tokens(1, 9), memory=memory, **GREEDY | {"max_new_tokens": 30})


def test_spread_slots_of_rows_of_different_ratios():
    """A row with fewer slots in a segment has each stand for more tokens."""
    model = short_model(spread_slots=True, slot_positions=30)
    rows = [model.compress(tokens(1, 2 * SEGMENT, seed=n), ratio=ratio) for n, ratio in ((1, 4), (2, 8))]
    stacked, prompt = RCCMemory.stack(rows), tokens(2, 9, seed=3)
    together = model(prompt, memory=stacked).logits
    for row in range(2):
        alone = model(prompt[row : row + 1], memory=rows[row]).logits
        assert ratio_of_norms(together[row : row + 1], alone) <= 1e-10
    assert slot_tokens(16, (4, 4), stacked.mask).sum(1).tolist() == [32, 32]


def test_spread_slots_leave_room_for_a_window_and_new_text():
    usual, spread = (config(spread_slots=value) for value in (False, True))
    assert usual.slot_positions == usual.max_positions // 2
    tight = RCCConfig(text_config=text_config(), segment_length=SEGMENT, ratio=4, window=256, spread_slots=True)
    assert tight.slot_positions + tight.window <= tight.max_positions - SEGMENT
    assert spread.slot_positions == usual.slot_positions  # the window is short
