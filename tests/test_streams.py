# SPDX-License-Identifier: Apache-2.0
"""`RCCStream`: tokens that come in forever give the slots of compressing them in one go, in bounded memory."""

import random

import pytest
import torch
from generating import EXACT, never_ending
from tiny import (
    RATIO,
    SEGMENT,
    VARIANTS,
    WINDOW,
    pad,
    ratio_of_norms,
    rcc_model,
    skip_if_it_cannot_recompress,
    text_config,
    tokens,
)
from transformers import GenerationConfig

from rcc_hf import RCCMemory, RCCStream

NEW = 40  # past the window of 32
SLOTS = SEGMENT // RATIO
GREEDY = {"do_sample": False, "max_new_tokens": NEW}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request):
    return never_ending(rcc_model(**request.param))


@pytest.fixture(scope="module")
def one():
    """A model where the wiring makes no difference."""
    return never_ending(rcc_model())


def chunks(length, most=37, seed=0):
    """Random sizes that add up to `length`."""
    draw, left = random.Random(seed), length
    while left:
        size = draw.randint(1, min(most, left))
        yield size
        left -= size


def feed(stream, ids, mask=None, **how):
    """Append in random pieces."""
    start = 0
    for size in chunks(ids.shape[1], **how):
        piece = slice(start, start + size)
        stream.append(ids[:, piece], None if mask is None else mask[:, piece])
        start += size
    return stream


def assert_same(memory, expected):
    """Slots as close as reordered sums are, all else equal."""
    assert memory.slot_counts == expected.slot_counts
    assert memory.row_tokens == expected.row_tokens
    for layer, others in zip(memory.layers, expected.layers, strict=True):
        for part, other in zip(layer, others, strict=True):
            assert part.shape == other.shape
            assert part.numel() == 0 or ratio_of_norms(part, other) <= EXACT
    for name in ("head", "local"):
        ids = [getattr(m, f"{name}_ids") for m in (memory, expected)]
        masks = [getattr(m, f"{name}_mask") for m in (memory, expected)]
        assert (masks[0] is None) == (masks[1] is None)
        if masks[0] is not None:
            assert torch.equal(*masks)
            ids = [i * m for i, m in zip(ids, masks, strict=True)]
        assert torch.equal(*ids)
    assert (memory.mask is None) == (expected.mask is None)
    assert memory.mask is None or torch.equal(memory.mask, expected.mask)


# --- appending -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_length", [0, 5, 40])
@pytest.mark.parametrize("window", [None, 50])
def test_in_pieces_as_in_one_go(model, head_length, window):
    ids = tokens(2, 300)
    stream = feed(RCCStream(model, head_length=head_length, window=window), ids)
    assert_same(stream.memory, model.compress(ids, head_length=head_length, window=window or WINDOW))
    assert (stream.num_tokens, stream.nbytes) == (300, stream.memory.nbytes)
    assert (stream.num_slots, stream.num_local) == (stream.memory.num_slots, stream.memory.num_local)
    assert 0 < stream.num_local <= (window or WINDOW)


@pytest.mark.parametrize("ratio", [2, 16])
def test_token_by_token(model, ratio):
    ids = tokens(1, 70)
    stream = RCCStream(model, ratio=ratio, head_length=3)
    for i in range(70):
        stream.append(ids[:, i : i + 1])
        assert stream.num_local <= WINDOW
    assert_same(stream.memory, model.compress(ids, ratio=ratio, head_length=3, window=WINDOW))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("head_length", [0, 5, [7, 0, 2]])
def test_ragged_rows(model, side, head_length):
    rows = [tokens(1, n, seed=n)[0] for n in (150, 3, 61)]
    ids, mask = pad(rows, side)
    stream = feed(RCCStream(model, head_length=head_length), ids, mask, most=20)
    assert_same(stream.memory, model.compress(ids, mask, head_length=head_length, window=WINDOW))
    assert stream.num_tokens == 150
    assert stream.memory.row_tokens == (150, 3, 61)


def test_rows_that_pause(model):
    """Some rows go on while others have nothing new; padding stands anywhere."""
    stream, seen = RCCStream(model, head_length=4), [[] for _ in range(3)]
    for step in range(12):
        lengths = [(7 * step + 5 * i) % 23 for i in range(3)]
        rows = [tokens(1, n, seed=100 * step + i)[0] for i, n in enumerate(lengths)]
        stream.append(*pad(rows, "right" if step % 2 else "left"))
        for i, row in enumerate(rows):
            seen[i].append(row)
    assert_same(stream.memory, model.compress(*pad([torch.cat(row) for row in seen]), head_length=4, window=WINDOW))


def test_nothing_yet(one):
    stream = RCCStream(one)
    assert (stream.memory, stream.num_tokens, stream.num_slots, stream.num_local, stream.nbytes) == (None, 0, 0, 0, 0)
    stream.append(tokens(2, 0))
    assert (stream.memory.batch_size, stream.num_tokens) == (2, 0)
    stream.append(tokens(2, 70))
    assert_same(stream.memory, one.compress(tokens(2, 70), window=WINDOW))


def test_one_head_for_all_rows(model):
    head, ids = tokens(1, 6, seed=9), tokens(3, 90)
    stream = RCCStream(model, head_ids=head)
    assert (stream.num_tokens, stream.memory.num_head, stream.num_local) == (6, 6, 0)
    feed(stream, ids)
    whole = torch.cat([head.expand(3, -1), ids], 1)
    assert_same(stream.memory, model.compress(whole, head_length=6, window=WINDOW))
    assert stream.num_tokens == 96


def test_the_configuration_has_a_head(one):
    one.config.head_length = 5
    try:
        stream = feed(RCCStream(one), tokens(1, 90), most=3)
        assert_same(stream.memory, one.compress(tokens(1, 90), window=WINDOW))
        assert stream.memory.num_head == 5
    finally:
        one.config.head_length = 0


def test_int8(one):
    """Old slots of a stream that goes on behind a small memory stay small."""
    ids = tokens(1, 120)
    memory = one.compress(ids[:, :64], window=WINDOW).to_int8()
    stream = feed(RCCStream(one, memory=memory), ids[:, 64:])
    assert stream.memory.dtype == torch.int8
    expected = one.compress(ids, window=WINDOW)
    assert stream.memory.slot_counts == expected.slot_counts
    floats = stream.memory.to_float(torch.float64)
    assert ratio_of_norms(floats.layers[0][0], expected.layers[0][0]) <= 2e-2


# --- generating ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3, 29, 100])
@pytest.mark.parametrize("head_length", [0, 5, 60])
@pytest.mark.parametrize("window", [None, 50])
def test_generating_is_appending_what_was_generated(model, length, head_length, window):
    """Three turns, the first of which may be shorter than the head; each as one `generate` over all there is."""
    stream, seen = RCCStream(model, head_length=head_length, window=window), tokens(2, 0)
    for turn in range(3):
        prompt = tokens(2, length, seed=turn)
        new = stream.generate(prompt, **GREEDY)
        seen = torch.cat([seen, prompt], 1)
        # the tiny model writes the padding token too, and without a mask it would count as padding
        mask = torch.ones_like(seen)
        settings = {"attention_mask": mask, "rolling": True, "head_length": head_length, "window": window}
        assert torch.equal(new, model.generate(seen, **settings, **GREEDY)[:, seen.shape[1] :])
        seen = torch.cat([seen, new], 1)
        assert_same(stream.memory, model.compress(seen, head_length=head_length, window=window or WINDOW))
        assert stream.num_tokens == seen.shape[1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("head_length", [0, 5])
def test_generating_in_ragged_rows(model, side, head_length):
    stream = RCCStream(model, head_length=head_length)
    singles = [RCCStream(model, head_length=head_length) for _ in range(3)]
    for lengths in ((70, 3, 20), (2, 60, 9)):
        rows = [tokens(1, n, seed=n)[0] for n in lengths]
        ids, mask = pad(rows, side)
        new = stream.generate(ids, mask, **GREEDY)
        for i, single in enumerate(singles):
            assert torch.equal(single.generate(rows[i][None], **GREEDY)[0], new[i])
    assert_same(stream.memory, RCCMemory.stack([single.memory for single in singles]))


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "do_sample": True}, {"do_sample": True}])
def test_beams_and_sampling(model, settings):
    prompt, more = tokens(2, 20), tokens(2, 30, seed=1)
    stream = RCCStream(model, head_length=4)
    results = []
    for ids in (prompt, more):
        torch.manual_seed(3)
        results.append(stream.generate(ids, **GREEDY | settings))
    torch.manual_seed(3)
    expected = model.generate(prompt, rolling=True, head_length=4, **GREEDY | settings)
    assert torch.equal(results[0], expected[:, 20:])
    whole = torch.cat([prompt, results[0], more, results[1]], 1)
    assert_same(stream.memory, model.compress(whole, head_length=4, window=WINDOW))


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("padding", [0, "end"])
def test_what_is_behind_an_end_token_does_not_enter(one, num_beams, in_config, padding):
    """Also where padding is an end token, as in many checkpoints."""
    prompts = tokens(3, 20)
    free = RCCStream(one).generate(prompts, **GREEDY)
    ends = [int(free[0, 7]), int(free[1, 2])]
    beams = {"num_beams": num_beams, "early_stopping": True, "length_penalty": -9.0}
    settings = {"eos_token_id": ends, "pad_token_id": ends[0] if padding == "end" else 0}
    settings = {"generation_config": GenerationConfig(**settings)} if in_config else settings
    stream = RCCStream(one)
    new = stream.generate(prompts, **GREEDY, **settings, **(beams if num_beams > 1 else {}))
    kept = []
    for prompt, row in zip(prompts, new.tolist(), strict=True):
        places = [i for i, token in enumerate(row) if token in ends]
        kept.append(torch.cat([prompt, torch.tensor(row[: places[0] + 1] if places else row)]))
    assert len({len(row) for row in kept}) > 1
    assert_same(stream.memory, one.compress(*pad(kept), window=WINDOW))
    assert stream.num_tokens == max(map(len, kept))


def test_rows_that_a_criterion_of_the_caller_stopped(one):
    """Their padding has no end token in front."""

    def after_five(ids, scores, **kwargs):
        return torch.arange(len(ids)) * 3 + 5 <= ids.shape[1] - SEGMENT

    stream = RCCStream(one)
    settings = {"stopping_criteria": [after_five], "eos_token_id": 2, "pad_token_id": 0}
    new = stream.generate(tokens(2, 20), **GREEDY, **settings)
    assert new.shape == (2, 8)
    assert new[0, 5:].tolist() == [0, 0, 0]
    assert stream.memory.row_tokens == (25, 28)


class Collector:
    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids.append(value.flatten().tolist())

    def end(self):
        pass


def test_streamers_see_the_end_of_the_prompt_and_every_new_token(one):
    stream = feed(RCCStream(one), tokens(1, 90))
    streamer, prompt = Collector(), tokens(1, 40, seed=1)
    new = stream.generate(prompt, streamer=streamer, **GREEDY)
    assert streamer.ids[0] == prompt[0, -SEGMENT:].tolist()
    assert [token for ids in streamer.ids[1:] for token in ids] == new[0].tolist()


# --- what a stream is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [3, 70])
def test_going_on_from_a_saved_memory(model, after, tmp_path):
    skip_if_it_cannot_recompress(model)
    settings = {"head_length": 5, "max_slots": 30, "when_full": "recompress"}
    stream = RCCStream(model, **settings)
    stream.append(tokens(2, after))
    stream.memory.save_pretrained(tmp_path)
    resumed = RCCStream(model, memory=RCCMemory.from_pretrained(tmp_path), **settings)
    assert (resumed.num_tokens, resumed.num_slots) == (stream.num_tokens, stream.num_slots)
    prompt = tokens(2, 33, seed=1)
    assert torch.equal(resumed.generate(prompt, **GREEDY), stream.generate(prompt, **GREEDY))
    assert_same(resumed.memory, stream.memory)


def test_a_memory_that_is_gone_on_behind_stays_as_it_was(one):
    memory = one.compress(tokens(1, 54))
    before = {name: tensor.clone() for name, tensor in memory._tensors().items()}
    stream = RCCStream(one, memory=memory)
    stream.generate(tokens(1, 30), **GREEDY)
    assert all(torch.equal(tensor, before[name]) for name, tensor in memory._tensors().items())
    assert stream.num_tokens == 54 + 30 + NEW


def test_streams_on_one_model_do_not_mix(model):
    options = [{"head_length": 5}, {"window": 50, "ratio": 8}, {"max_slots": 8, "when_full": "drop"}]
    alone = []
    for i, option in enumerate(options):
        stream = RCCStream(model, **option)
        alone.append([stream.generate(tokens(1, 30, seed=10 * i + turn), **GREEDY) for turn in range(3)])
    streams = [RCCStream(model, **option) for option in options]
    for turn in range(3):
        for i, stream in enumerate(streams):
            new = stream.generate(tokens(1, 30, seed=10 * i + turn), **GREEDY)
            assert torch.equal(new, alone[i][turn])


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when_full", ["drop", "recompress"])
@pytest.mark.parametrize("max_slots", [4, 9, 22])
def test_pieces_do_not_matter_under_a_budget(model, when_full, max_slots):
    skip_if_it_cannot_recompress(model, when_full)
    ids, options = tokens(2, 300), {"max_slots": max_slots, "when_full": when_full, "head_length": 5}
    once = RCCStream(model, **options)
    once.append(ids)
    stream = feed(RCCStream(model, **options), ids)
    assert_same(stream.memory, once.memory)
    assert SLOTS <= stream.num_slots <= max_slots
    assert stream.num_tokens == 300
    assert (stream.memory.num_tokens < 300) == (when_full == "drop" or max_slots < 22)
    assert torch.equal(stream.memory.head_ids, ids[:, :5])
    assert torch.equal(stream.memory.local_ids, ids[:, 300 - stream.num_local :])


@pytest.mark.parametrize("when_full", ["drop", "recompress"])
def test_generating_under_a_budget(model, when_full):
    skip_if_it_cannot_recompress(model, when_full)
    options = {"max_slots": 10, "when_full": when_full}
    stream, other = RCCStream(model, **options), RCCStream(model, **options)
    for turn in range(4):
        prompt = tokens(2, 21, seed=turn)
        new = stream.generate(prompt, **GREEDY)
        other.append(torch.cat([prompt, new], 1))
        assert_same(stream.memory, other.memory)
        assert (stream.num_slots <= 10, stream.num_tokens) == (True, (turn + 1) * (21 + NEW))


@pytest.mark.parametrize("when_full", ["drop", "recompress"])
def test_fifty_windows_in_bounded_memory(one, when_full):
    """More tokens than the base has positions, three times over, with 12 slots and a window."""
    stream = RCCStream(one, max_slots=12, when_full=when_full, head_length=4)
    sizes, ids = [], tokens(1, 50 * WINDOW)
    for start in range(0, ids.shape[1], 40):
        stream.append(ids[:, start : start + 40])
        sizes.append((stream.num_slots, stream.num_local, stream.nbytes))
    assert stream.num_tokens == 50 * WINDOW > 3 * one.config.max_positions
    assert max(slots for slots, _, _ in sizes) == 12
    assert max(local for _, local, _ in sizes) <= WINDOW
    assert max(nbytes for _, _, nbytes in sizes[20:]) <= max(nbytes for _, _, nbytes in sizes[:20])
    new = stream.generate(tokens(1, 5), do_sample=False, max_new_tokens=10 * WINDOW)
    assert new.shape == (1, 10 * WINDOW)
    assert (stream.num_slots <= 12, stream.num_tokens) == (True, 60 * WINDOW + 5)


# --- errors ----------------------------------------------------------------------------------------------------------


def state(stream):
    return stream.memory, stream.num_tokens, {n: t.clone() for n, t in stream.memory._tensors().items()}


def assert_untouched(stream, before):
    memory, num_tokens, tensors = before
    assert (stream.memory is memory, stream.num_tokens) == (True, num_tokens)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in memory._tensors().items())


@pytest.mark.parametrize("call", ["append", "generate"])
def test_a_budget_that_may_not_be_exceeded(one, call):
    stream = RCCStream(one, max_slots=8)
    stream.append(tokens(1, 60))
    before = state(stream)
    with pytest.raises(ValueError, match=r"(has|come to) \d+ slots.*max_slots is 8"):
        stream.append(tokens(1, 50)) if call == "append" else stream.generate(tokens(1, 9), **GREEDY)
    assert_untouched(stream, before)
    stream.append(tokens(1, 4))
    assert stream.num_tokens == 64


def test_more_positions_than_the_base_has(one):
    stream = RCCStream(one, ratio=1)
    stream.append(tokens(1, 500))
    before = state(stream)
    with pytest.raises(ValueError, match="but the base was trained for 512"):
        stream.generate(tokens(1, 9), **GREEDY)
    assert_untouched(stream, before)


def test_an_error_in_the_midst_of_generation(one):
    def fail(ids, scores):
        if ids.shape[1] > 30:
            raise RuntimeError("stopped")
        return scores

    stream = feed(RCCStream(one), tokens(1, 60))
    before = state(stream)
    with pytest.raises(RuntimeError, match="stopped"):
        stream.generate(tokens(1, 9), logits_processor=[fail], **GREEDY)
    assert_untouched(stream, before)
    assert stream.generate(tokens(1, 9), **GREEDY).shape == (1, NEW)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_return_sequences": 2, "num_beams": 2}, "num_return_sequences=2: a stream goes on with one text per row"),
        ({"generation_config": GenerationConfig(num_return_sequences=3, do_sample=True)}, "num_return_sequences=3"),
        ({"memory": None}, "does not take memory: the stream has its own"),
        ({"past_key_values": None}, "does not take past_key_values"),
        ({"window": 64}, "does not take window: give it to RCCStream"),
        ({"ratio": 4}, "does not take ratio: give it to RCCStream"),
        ({"max_slots": 4}, "does not take max_slots: give it to RCCStream"),
        ({"max_length": 40}, "does not take max_length: .* give max_new_tokens"),
        ({"return_dict_in_generate": True}, "a stream returns the new tokens"),
        ({"inputs_embeds": None}, "a stream keeps ids"),
        ({"prompt_lookup_num_tokens": 3}, "rolling=True and assisted generation"),
        ({"use_cache": False}, "does not work with use_cache=False"),
        ({"typo": 3}, "typo"),
    ],
    ids=str,
)
def test_arguments_that_generate_does_not_take(one, arguments, words):
    stream = feed(RCCStream(one), tokens(1, 60))
    before = state(stream)
    with pytest.raises(ValueError, match=words):
        stream.generate(tokens(1, 9), max_new_tokens=4, **arguments)
    assert_untouched(stream, before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 15}, "window=15 is shorter than segment_length=16"),
        ({"ratio": 3}, "ratio=3 does not divide"),
        ({"max_slots": 3, "when_full": "drop"}, "max_slots=3 is less than the 4 slots of one segment"),
        ({"when_full": "drop"}, "has no effect without max_slots"),
        ({"when_full": "forget"}, "choose one of error, drop, recompress"),
        ({"head_ids": tokens(1, 4), "head_length": 4}, "leave head_length and memory out"),
        ({"head_ids": tokens(2, 1)[0]}, r"inputs have shape \(1,\)"),
    ],
    ids=str,
)
def test_options_that_cannot_work(one, options, words):
    with pytest.raises(ValueError, match=words):
        RCCStream(one, **options)


def test_memories_that_cannot_be_gone_on_behind(one):
    memory = one.compress(tokens(1, 70), head_length=5)
    with pytest.raises(ValueError, match=r"head_length=3, but the memory has heads of \[5\] tokens"):
        RCCStream(one, memory=memory, head_length=3)
    with pytest.raises(ValueError, match="the memory has 16 slots and max_slots is 12"):
        RCCStream(one, memory=memory, max_slots=12)
    with pytest.raises(ValueError, match="written by another model"):
        RCCStream(rcc_model(text_config=text_config(initializer_range=0.5)), memory=memory)
    with pytest.raises(TypeError, match="memory must be an RCCMemory"):
        RCCStream(one, memory=[memory])
    assert RCCStream(one, memory=memory, head_length=5, max_slots=12, when_full="drop").num_slots == 12


def test_ids_that_cannot_be_appended(one):
    stream = feed(RCCStream(one), tokens(2, 60))
    before, ids = state(stream), tokens(2, 9)
    for call in (stream.append, stream.generate):
        with pytest.raises(ValueError, match=r"the stream has 2 rows and input_ids 3\. Give one row of tokens"):
            call(tokens(3, 9))
        with pytest.raises(TypeError, match="input_ids must be integers"):
            call(ids.float())
        with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 8\)"):
            call(ids, torch.ones(2, 8))
        with pytest.raises(ValueError, match=r"a stream takes ids \[batch, tokens\]"):
            call(torch.zeros(2, 9, 32, dtype=torch.float64))
    for empty in ((ids[:, :0],), pad([ids[0], ids[1][:0]])):
        with pytest.raises(ValueError, match="at least one token in each row"):
            stream.generate(*empty, **GREEDY)
    assert_untouched(stream, before)
