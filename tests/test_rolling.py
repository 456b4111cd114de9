# SPDX-License-Identifier: Apache-2.0
"""Generating past the window: the oldest raw segment is compressed whenever the window is full."""

import pytest
import torch
from generating import EXACT, decode, never_ending, padded
from tiny import RATIO, SEGMENT, VARIANTS, WINDOW, pad, ratio_of_norms, rcc_model, skip_if_it_cannot_recompress, tokens

from rcc_hf import RCCMemory
from rcc_hf.modeling.cache_rcc import RCCCache
from rcc_hf.modeling.rolling_rcc import Rolling

LONG = 60  # new tokens: several times past the window of 32
SLOTS = SEGMENT // RATIO


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request):
    return never_ending(rcc_model(**request.param))


@torch.no_grad()
def forced(model, prompt, new, memory=None, mask=None):
    """The logits of every new token from one forward call, window by window."""
    ids = torch.cat([prompt, new], 1)
    if mask is not None:
        mask = torch.cat([mask, torch.ones_like(new)], 1)
    logits = model(ids, attention_mask=mask, memory=memory, compress=True).logits
    return logits[:, prompt.shape[1] - 1 : -1]


@pytest.mark.parametrize("length", [3, WINDOW, 75])
@pytest.mark.parametrize("with_memory", [False, True])
@pytest.mark.parametrize("head_length", [0, 5])
def test_every_new_token_sees_what_a_forward_call_shows_it(model, length, with_memory, head_length):
    prompt, memory = tokens(2, length), None
    if with_memory:
        memory = model.compress(tokens(2, 54, seed=3), head_length=head_length)
    model.config.head_length = head_length
    try:
        new, logits = decode(model, prompt, memory=memory, rolling=True, count=LONG)
        expected = forced(model, prompt, new, memory)
    finally:
        model.config.head_length = 0
    assert ratio_of_norms(logits.double(), expected) <= 1e-6
    assert torch.equal(expected.argmax(-1), new)


@pytest.mark.parametrize("length", [3, 30])
def test_a_memory_without_slots_keeps_its_head(model, length):
    prompt, ids = tokens(2, length), tokens(2, 12, seed=3)
    memory = model.compress(ids, head_length=5, window=WINDOW)
    assert (memory.num_slots, memory.num_head, memory.num_local) == (0, 5, 7)
    new, logits = decode(model, prompt, memory=memory, rolling=True, count=LONG)
    whole = torch.cat([ids, prompt], 1)
    expected = decode(model, whole, rolling=True, head_length=5, count=LONG)
    assert torch.equal(new, expected[0])
    assert ratio_of_norms(logits, expected[1]) <= 1e-6


@pytest.mark.parametrize("window", [SEGMENT, 50])
@pytest.mark.parametrize("length", [3, 75])
def test_a_window_for_one_call(model, window, length):
    prompt = tokens(2, length)
    new, logits = decode(model, prompt, rolling=True, count=LONG, window=window)
    before = model.config.window
    model.config.window = window
    try:
        expected = decode(model, prompt, rolling=True, count=LONG)
    finally:
        model.config.window = before
    assert torch.equal(new, expected[0])
    assert ratio_of_norms(logits, expected[1]) <= 1e-6
    assert ratio_of_norms(logits, decode(model, prompt, rolling=True, count=LONG)[1]) > 1e-4


def test_the_cache_stays_small(model):
    output = model.generate(
        tokens(1, 3), rolling=True, max_new_tokens=200, do_sample=False, return_dict_in_generate=True
    )
    cache = output.past_key_values
    segments = -(-(202 - WINDOW) // SEGMENT)
    assert cache.num_slots == segments * SLOTS
    assert cache.physical_length == segments * SLOTS + 202 - segments * SEGMENT
    assert cache.get_seq_length() == 202
    # the slots are those of compressing the text in one go
    whole = model.compress(output.sequences[:, : segments * SEGMENT])
    for layer, expected in zip(cache.memory.layers, whole.layers, strict=True):
        assert all(ratio_of_norms(a, b) <= EXACT for a, b in zip(layer, expected, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_roll_each_in_its_own_time(model, side):
    rows = [tokens(1, n, seed=n) for n in (40, 3, 29)]
    ids, mask = padded(rows, side)
    new, logits = decode(model, ids, attention_mask=mask, rolling=True, count=LONG)
    for i, row in enumerate(rows):
        alone, expected = decode(model, row, rolling=True, count=LONG)
        assert torch.equal(new[i], alone[0])
        assert ratio_of_norms(logits[i], expected[0]) <= 1e-6


def test_rows_that_roll_at_different_times_take_no_more_room(model):
    """As many slots side by side as the row with most has, however often the rows took turns."""
    rows = [tokens(1, n, seed=n) for n in (40, 3, 29)]
    ids, mask = padded(rows, "left")
    cache = model.generate(
        ids, attention_mask=mask, rolling=True, max_new_tokens=200, do_sample=False, return_dict_in_generate=True
    ).past_key_values
    segments = -(-(239 - WINDOW) // SEGMENT)
    assert cache.memory.slot_counts == (SLOTS,) * segments
    assert cache.memory.mask.sum(1).tolist() == [SLOTS * -(-(n + 199 - WINDOW) // SEGMENT) for n in (40, 3, 29)]


@pytest.mark.parametrize("with_memory", [False, True])
def test_beams(model, with_memory):
    """Beams have texts of their own, and so slots of their own: scores are those of each text alone."""
    prompt = tokens(2, 20)
    memory = model.compress(tokens(2, 54, seed=3)) if with_memory else None
    output = model.generate(
        prompt,
        memory=memory,
        rolling=True,
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=LONG,
        do_sample=False,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    new = output.sequences[:, 20:]
    rows = None if memory is None else memory.expand(6)
    log_probabilities = forced(model, output.sequences[:, :20], new, rows).log_softmax(-1)
    scores = log_probabilities.gather(2, new[..., None])[..., 0].sum(1)
    assert ratio_of_norms(output.sequences_scores.double(), scores) <= 1e-5
    assert len({tuple(row) for row in new.tolist()}) == 6


@torch.no_grad()
def test_rows_move_with_their_slots(model):
    """As beams do: each takes its slots and raw tokens along, and rolls on with them."""
    ids, order = tokens(2, 120), torch.tensor([1, 0])
    cache = RCCCache(3, rolling=Rolling(), compress_prompt=True)
    model(ids[:, :50], past_key_values=cache)
    cache.reorder_cache(order)
    for step in range(50, 119):
        model(ids[order, step : step + 1], past_key_values=cache)
    logits = model(ids[order, 119:], past_key_values=cache).logits
    assert ratio_of_norms(logits, model(ids[order]).logits[:, -1:]) <= EXACT


def test_embeddings(model):
    prompt = tokens(1, 40)
    embeds = model.get_input_embeddings()(prompt).detach()
    expected, _ = decode(model, prompt, rolling=True, count=LONG)
    assert torch.equal(decode(model, None, inputs_embeds=embeds, rolling=True, count=LONG)[0], expected)


def test_continuing_a_rolling_cache(model):
    prompt = tokens(1, 20)
    whole, _ = decode(model, prompt, rolling=True, count=2 * LONG)
    settings = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(prompt, rolling=True, max_new_tokens=LONG, **settings)
    second = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=LONG, **settings)
    assert torch.equal(second.sequences[:, 20:], whole)


# --- slot budgets ----------------------------------------------------------------------------------------------------


def slots_of(memory) -> list[torch.Tensor]:
    return [part for layer in memory.layers for part in layer]


@pytest.mark.parametrize("when_full", ["drop", "recompress"])
def test_rows_of_different_lengths_within_a_budget_equal_single_rows(model, when_full):
    skip_if_it_cannot_recompress(model, when_full)
    settings = {"rolling": True, "max_slots": 12, "when_full": when_full, "max_new_tokens": 40, "do_sample": False}
    settings |= {"eos_token_id": None, "pad_token_id": 0}
    rows = [tokens(1, n, seed=n)[0] for n in (150, 61)]
    ids, mask = pad(rows)
    together = model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    for row, new in zip(rows, together, strict=True):
        assert torch.equal(model.generate(row[None], **settings)[0, len(row) :], new)


@pytest.mark.parametrize("when_full", ["drop", "recompress"])
def test_generating_within_a_budget(model, when_full):
    skip_if_it_cannot_recompress(model, when_full)
    settings = {"rolling": True, "max_slots": 10, "when_full": when_full}
    output = model.generate(
        tokens(2, 40), **settings, max_new_tokens=200, do_sample=False, return_dict_in_generate=True
    )
    assert 8 <= output.past_key_values.num_slots <= 10
    beams = model.generate(tokens(2, 40), **settings, max_new_tokens=LONG, do_sample=False, num_beams=2)
    assert beams.shape == (2, 40 + LONG)


def test_dropping_forgets_the_oldest(model):
    memory = model.compress(tokens(2, 64))
    bounded = Rolling(max_slots=9, when_full="drop").bound(memory)
    expected = model.compress(tokens(2, 64)[:, 32:])
    assert bounded.slot_counts == (4, 4)
    assert all(ratio_of_norms(a, b) <= EXACT for a, b in zip(slots_of(bounded), slots_of(expected), strict=True))
    assert Rolling(max_slots=16, when_full="drop").bound(memory) is memory


@pytest.mark.parametrize("when_full", ["drop", "recompress"])
def test_the_head_is_not_forgotten(model, when_full):
    memory = model.compress(tokens(2, 100), head_length=5)
    bounded = Rolling(max_slots=4, when_full=when_full).bound(memory)
    assert bounded.num_slots == 4
    assert torch.equal(bounded.head_ids, tokens(2, 100)[:, :5])
    assert torch.equal(bounded.local_ids, memory.local_ids)


def test_dropping_goes_by_the_slots_of_each_segment(model):
    ids = tokens(1, 64)
    memory = model.compress(ids[:, 32:], memory=model.compress(ids[:, :32], ratio=2), ratio=16)
    assert memory.slot_counts == (8, 8, 1, 1)
    assert Rolling(max_slots=12, when_full="drop").bound(memory).slot_counts == (8, 1, 1)
    assert Rolling(max_slots=13, when_full="recompress").bound(memory).slot_counts == (4, 4, 1, 1)


def test_recompressing_is_compressing_at_a_higher_ratio(model):
    """Old segments at twice and four times the ratio, as if they had been compressed so from their text."""
    skip_if_it_cannot_recompress(model)
    ids = tokens(1, 96)
    bounded = Rolling(max_slots=14, when_full="recompress").bound(model.compress(ids))
    assert bounded.slot_counts == (1, 1, 2, 2, 4, 4)
    expected = None
    for i, size in enumerate(bounded.slot_counts):
        expected = model.compress(ids[:, i * SEGMENT : (i + 1) * SEGMENT], memory=expected, ratio=SEGMENT // size)
    assert all(ratio_of_norms(a, b) <= EXACT for a, b in zip(slots_of(bounded), slots_of(expected), strict=True))
    prompt = tokens(1, 5)
    with torch.no_grad():
        assert ratio_of_norms(model(prompt, memory=bounded).logits, model(prompt, memory=expected).logits) <= EXACT


def test_recompressing_ends_in_dropping(model):
    skip_if_it_cannot_recompress(model)
    bounded = Rolling(max_slots=3, when_full="recompress").bound(model.compress(tokens(1, 96)))
    assert bounded.slot_counts == (1, 1, 1)
    expected = model.compress(tokens(1, 96)[:, 80:], ratio=16)
    assert ratio_of_norms(bounded.slice(2).layers[-1][0], expected.layers[-1][0]) <= EXACT


def test_each_row_has_the_budget(model):
    rows = [tokens(1, n, seed=n)[0] for n in (96, 20, 9)]
    memory = model.compress(*pad(rows))
    for policy in ("drop", "recompress"):
        rolling = Rolling(max_slots=7, when_full=policy)
        bounded = rolling.bound(memory)
        singles = [rolling.bound(single) for single in memory.unstack()]
        expected = RCCMemory.stack(singles)
        assert all(map(torch.equal, slots_of(bounded), slots_of(expected)))
        assert torch.equal(bounded.mask.sum(1), torch.tensor([7 if policy == "recompress" else 4, 4, 0]))


def test_a_small_int8_memory_is_bounded_too(model):
    memory = model.compress(tokens(1, 96))
    rolling = Rolling(max_slots=14, when_full="recompress")
    small, expected = rolling.bound(memory.to_int8()), rolling.bound(memory).to_int8()
    assert all(map(torch.equal, slots_of(small), slots_of(expected)))
    assert torch.equal(small.scales[0][0], expected.scales[0][0])


def test_a_budget_that_will_be_exceeded_is_refused_before_the_first_step(model):
    calls = []
    watch = model.model.language_model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ValueError, match=r"come to 52 slots, and max_slots is 20.*when_full='drop'"):
            model.generate(tokens(1, 40), rolling=True, max_slots=20, max_new_tokens=200, do_sample=False)
    finally:
        watch.remove()
    assert calls == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_slots": 9}, "max_slots=9 has no effect without rolling=True"),
        ({"when_full": "drop"}, "when_full='drop' has no effect without rolling=True"),
        ({"rolling": True, "when_full": "forget"}, "choose one of error, drop, recompress"),
        ({"rolling": True, "when_full": "drop"}, "has no effect without max_slots"),
        ({"rolling": True, "max_slots": 0}, "max_slots=0 must be a whole number of at least 1"),
        ({"rolling": True, "max_slots": 3, "when_full": "drop"}, "less than the 4 slots of one segment"),
        ({"rolling": True, "compress": False}, "exclude each other"),
        ({"rolling": True, "window": 15}, "window=15 is shorter than segment_length=16"),
        ({"rolling": True, "prompt_lookup_num_tokens": 3}, "rolling=True and assisted generation"),
        ({"rolling": True, "cache_implementation": "static"}, "exclude each other: a rolling cache is filled anew"),
        ({"rolling": True, "use_cache": False}, "rolling=True .*does not work with use_cache=False"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(model, settings, words):
    with pytest.raises(ValueError, match=words):
        model.generate(tokens(1, 10), max_new_tokens=4, **settings)


def test_a_scheme_without_nested_ratios_does_not_recompress(model, monkeypatch):
    monkeypatch.setattr(type(model.model.scheme), "nested_ratios", False)
    with pytest.raises(ValueError, match="cannot recompress slots without their text; choose when_full='drop'"):
        model.generate(tokens(1, 10), rolling=True, max_slots=8, when_full="recompress", max_new_tokens=4)
