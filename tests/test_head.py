# SPDX-License-Identifier: Apache-2.0
"""A head that stays raw in front of the slots: a system prompt, an attention sink."""

import pytest
import torch
from generating import EXACT, NEW, assert_decoded, decode, never_ending
from tiny import RATIO, SEGMENT, VARIANTS, WINDOW, pad, ratio_of_norms, rcc_model, tokens

from rcc_hf import RCCMemory
from rcc_hf.modeling.positions_rcc import slot_positions

HEAD = 5
ROWS = (70, 3, 24, 6)  # 4 segments and 1 token; all of it head; 1 segment and 3; nothing compressed


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS.keys())
def model(request):
    return never_ending(rcc_model(**request.param))


@pytest.fixture(scope="module")
def memory(model):
    return model.compress(tokens(2, 70), head_length=HEAD)


def rows_of(lengths=ROWS):
    return [tokens(1, n, seed=n)[0] for n in lengths]


def by_hand(model, ids, memory, prompt):
    """Logits of a prompt behind a head, slots and local tokens, in one pass over embeddings with the adapters on."""
    scheme, decoder = model.model.scheme, model.model.language_model
    whole = ids[:, HEAD : HEAD + 4 * SEGMENT].reshape(-1, SEGMENT)
    state = scheme.write(decoder, scheme.empty(decoder, len(whole)), whole, RATIO)
    state = tuple(layer.unflatten(0, (len(ids), 4)).flatten(1, 2) for layer in state)
    embed = model.get_input_embeddings()
    rows = embed(torch.cat([ids[:, :HEAD], memory.local_ids, prompt], 1))
    width = state[0].shape[1]
    slots, shift = slot_positions(model.config, None, (len(ids), width), "cpu", [RATIO] * width)
    local = torch.arange(HEAD + width, rows.shape[1] + width).expand(len(ids), -1) - shift
    positions = torch.cat([torch.arange(HEAD).expand(len(ids), -1), slots + HEAD, local], 1)
    mask = torch.ones_like(positions)  # without, the library takes positions that jump for packed sequences
    hidden = scheme.decode(decoder, state, rows, mask, positions, num_head=HEAD).last_hidden_state
    return model.lm_head(hidden[:, -prompt.shape[1] :])


@torch.no_grad()
def test_what_the_memory_holds(model, memory):
    ids = tokens(2, 70)
    assert torch.equal(memory.head_ids, ids[:, :HEAD])
    assert torch.equal(memory.local_ids, ids[:, HEAD + 4 * SEGMENT :])
    assert (memory.num_head, memory.num_slots, memory.num_local, memory.num_tokens) == (5, 16, 1, 70)
    behind = model.compress(ids[:, HEAD:])
    for layer, expected in zip(memory.layers, behind.layers, strict=True):
        assert all(map(torch.equal, layer, expected))
    assert "num_head=5" in repr(memory)


@torch.no_grad()
def test_the_head_is_decoded_in_front_of_the_slots(model, memory):
    prompt = tokens(2, 7, seed=1)
    expected = by_hand(model, tokens(2, 70), memory, prompt)
    assert ratio_of_norms(model(prompt, memory=memory).logits, expected) <= EXACT
    changed = tokens(2, 70)
    changed[:, 2] = 3 + (changed[:, 2] + 1) % 100
    other = model.compress(changed, head_length=HEAD)
    assert ratio_of_norms(model(prompt, memory=other).logits, expected) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_equal_single_runs(model, side):
    rows = rows_of()
    memory = model.compress(*pad(rows, side), head_length=HEAD)
    assert memory.row_tokens == ROWS
    prompts = [tokens(1, n, seed=50 + n)[0] for n in (6, 4, 9, 5)]
    ids, mask = pad(prompts, side)
    logits = model(ids, attention_mask=mask, memory=memory).logits
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        if len(row) - HEAD >= SEGMENT:
            alone = model(prompt[None], memory=model.compress(row[None], head_length=HEAD)).logits
        else:
            alone = model(torch.cat([row, prompt])[None]).logits[:, len(row) :]
        assert ratio_of_norms(logits[i, mask[i].bool()], alone[0]) <= EXACT


@torch.no_grad()
def test_each_row_has_its_own_length_of_head(model):
    ids, lengths = tokens(3, 70), [0, 5, 20]
    memory = model.compress(ids, head_length=lengths)
    prompt = tokens(3, 4, seed=1)
    logits = model(prompt, memory=memory).logits
    for i, n in enumerate(lengths):
        single = model.compress(ids[i : i + 1], head_length=n)
        assert ratio_of_norms(logits[i : i + 1], model(prompt[i : i + 1], memory=single).logits) <= EXACT
    new = model.generate(ids, head_length=lengths, max_new_tokens=NEW, do_sample=False, num_beams=2)
    for i, n in enumerate(lengths):
        alone = model.generate(ids[i : i + 1], head_length=n, max_new_tokens=NEW, do_sample=False, num_beams=2)
        assert torch.equal(new[i], alone[0])


@torch.no_grad()
def test_appending_keeps_the_head(model, memory):
    more = tokens(2, 30, seed=4)
    grown = model.compress(more, memory=memory)
    whole = model.compress(torch.cat([tokens(2, 70), more], 1), head_length=HEAD)
    prompt = tokens(2, 4, seed=1)
    assert ratio_of_norms(model(prompt, memory=grown).logits, model(prompt, memory=whole).logits) <= EXACT
    with pytest.raises(ValueError, match="head_length=3 has no effect on a memory that is appended to"):
        model.compress(more, memory=memory, head_length=3)


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("length", [HEAD, [HEAD], [HEAD] * 3])
def test_a_head_that_is_not_full_is_filled(model, length, num_beams):
    """Row by row: one has text behind its head, one half a head, one nothing at all."""
    first, second = [tokens(1, n, seed=n)[0] for n in (40, 3, 0)], [tokens(1, n, seed=n)[0] for n in (50, 60, 20)]
    memory = model.compress(*pad(first), head_length=HEAD, window=WINDOW)
    assert memory.head_mask.sum(1).tolist() == [HEAD, 3, 0]
    grown = model.compress(*pad(second, "right"), memory=memory, head_length=length, window=WINDOW)
    joined = [torch.cat(rows) for rows in zip(first, second, strict=True)]
    whole = model.compress(*pad(joined), head_length=HEAD, window=WINDOW)
    assert torch.equal(grown.head_ids, whole.head_ids)
    for layer, expected in zip(grown.layers, whole.layers, strict=True):
        assert all(ratio_of_norms(a, b) <= EXACT for a, b in zip(layer, expected, strict=True))
    settings = {"rolling": True, "do_sample": False, "max_new_tokens": 60, "num_beams": num_beams}
    ids, mask = pad(second)
    new = model.generate(ids, attention_mask=mask, memory=memory, head_length=length, **settings)[:, ids.shape[1] :]
    for i, row in enumerate(joined):
        mask = torch.ones_like(row[None])  # id 0 may be among the new tokens
        alone = model.generate(row[None], attention_mask=mask, head_length=HEAD, **settings)[:, len(row) :]
        assert torch.equal(new[i], alone[0])


def test_generate_takes_it_from_the_call_or_the_configuration(model):
    prompt = tokens(2, HEAD + WINDOW + 20)
    cut = HEAD + 2 * SEGMENT
    memory = model.compress(prompt[:, :cut], head_length=HEAD)
    expected = decode(model, prompt[:, cut:], memory=memory)
    assert_decoded(decode(model, prompt, head_length=HEAD), expected)
    model.config.head_length = HEAD
    try:
        assert_decoded(decode(model, prompt), expected)
        assert torch.equal(model.compress(prompt[:, :cut]).head_ids, memory.head_ids)
        short = tokens(1, HEAD + WINDOW)
        plain = model.generate(short, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        assert type(plain.past_key_values).__name__ == "DynamicCache"
    finally:
        model.config.head_length = 0
    with pytest.raises(ValueError, match="head_length=2 has no effect behind a memory"):
        model.generate(prompt, memory=memory, head_length=2, max_new_tokens=2)


@pytest.mark.parametrize("head_length", [HEAD, [0, 9, 5]], ids=str)
def test_in_a_static_cache(model, head_length):
    ids, mask = pad([tokens(1, n, seed=n)[0] for n in (90, 20, 55)])
    arguments = {"attention_mask": mask, "head_length": head_length}
    static = decode(model, ids, **arguments, cache_implementation="static", disable_compile=True)
    assert_decoded(static, decode(model, ids, **arguments))
    memory = model.compress(ids, mask, head_length=head_length)
    prompt = tokens(3, 7)
    static = decode(model, prompt, memory=memory, cache_implementation="static", disable_compile=True)
    assert_decoded(static, decode(model, prompt, memory=memory))


def test_training_pass_equals_memory_path(model):
    context, prompt = tokens(2, 70), tokens(2, 6, seed=1)
    model.config.head_length = HEAD
    try:
        in_training = model(prompt, context_ids=context).logits
        expected = model(prompt, memory=model.compress(context)).logits
    finally:
        model.config.head_length = 0
    assert ratio_of_norms(in_training, expected) <= EXACT


def test_fitted_positions_are_behind_the_head(model):
    model.config.fit_positions, slots = True, model.config.slot_positions
    model.config.slot_positions = 10
    try:
        memory = model.compress(tokens(1, 70), head_length=HEAD)
        prompt = tokens(1, 4, seed=1)
        logits = model(prompt, memory=memory).logits
        assert logits.isfinite().all()
        context = model(prompt, context_ids=tokens(1, 70 - HEAD)).logits
        assert ratio_of_norms(logits, context) > 1e-4
        model.config.head_length = HEAD
        assert ratio_of_norms(model(prompt, context_ids=tokens(1, 70)).logits, logits) <= EXACT
    finally:
        model.config.fit_positions, model.config.slot_positions, model.config.head_length = False, slots, 0


def test_a_head_goes_with_the_first_segment(model, memory, tmp_path):
    first, second = memory.slice(0, 2), memory.slice(2)
    assert (first.num_head, second.num_head) == (HEAD, 0)
    assert (memory.slice(-4).num_head, memory.slice(-9).num_head, memory.slice(-3).num_head) == (HEAD, HEAD, 0)
    joined = RCCMemory.concatenate([first, second])
    for name, tensor in memory._tensors().items():
        assert torch.equal(joined._tensors()[name], tensor)
    with pytest.raises(ValueError, match=r"memory 1 begins with 5 raw tokens \(its head\).*\.slice\(1\)"):
        RCCMemory.concatenate([second.slice(0, 2), first])
    ragged = model.compress(*pad(rows_of()), head_length=HEAD)
    stacked = RCCMemory.stack(ragged.unstack())
    for name, tensor in ragged._tensors().items():
        mask = {"head_ids": ragged.head_mask, "local_ids": ragged.local_mask}.get(name)
        other = stacked._tensors()[name]
        assert torch.equal(tensor if mask is None else tensor * mask, other if mask is None else other * mask), name
    ragged.save_pretrained(tmp_path)
    assert torch.equal(RCCMemory.from_pretrained(tmp_path).head_mask, ragged.head_mask)


@pytest.mark.parametrize("length", [-1, 1.5, [1, 2, 3], torch.tensor([1.0, 2.0])])
def test_impossible_lengths(model, length):
    with pytest.raises(ValueError, match=r"is not a number of tokens from 0 up, or one such number for each of the 2"):
        model.compress(tokens(2, 70), head_length=length)
    memory = model.compress(tokens(2, 3), head_length=HEAD, window=WINDOW)
    with pytest.raises(ValueError, match=r"is not a number of tokens from 0 up, or one such number for each of the 2"):
        model.compress(tokens(2, 70), memory=memory, head_length=length)


@pytest.mark.parametrize("length", [-1, 1.5, "4"])
def test_impossible_lengths_in_the_configuration(length):
    with pytest.raises(ValueError, match=r"head_length=.* must be a whole number of at least 0"):
        rcc_model(head_length=length)
