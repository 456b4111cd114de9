# SPDX-License-Identifier: Apache-2.0
"""Memories cut, joined, stacked and stored in 8 bits equal those of the same source text compressed anew."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import RATIO, SEGMENT, pad, ratio_of_norms, rcc_model, tokens

from rcc_hf import RCCMemory
from rcc_hf.modeling import compressed_int8_rcc
from rcc_hf.modeling.memory_rcc import WIRINGS

ROWS = (70, 9, 37)  # 4 segments and 6 tokens; no segment and 9; 2 segments and 5
SLOTS = SEGMENT // RATIO


@pytest.fixture(scope="module", params=WIRINGS)
def model(request):
    model = rcc_model(scheme_options={"wiring": request.param})
    model.config.encode_batch_tokens = SEGMENT  # one at a time, so that results are equal to the last bit
    return model


@pytest.fixture(scope="module")
def memory(model):
    return model.compress(tokens(2, 70))


@pytest.fixture(scope="module")
def ragged(model):
    return compress_rows(model, source_rows())


def source_rows() -> list[torch.Tensor]:
    return [tokens(1, n, seed=n)[0] for n in ROWS]


def compress_rows(model, rows, **options) -> RCCMemory:
    return model.compress(*pad(rows), **options)


def real_local(memory) -> list[list[int]]:
    mask = torch.ones_like(memory.local_ids) if memory.local_mask is None else memory.local_mask
    return [row[kept.bool()].tolist() for row, kept in zip(memory.local_ids, mask, strict=True)]


def assert_same(actual: RCCMemory, expected: RCCMemory) -> None:
    """Equal to the last bit, padding of the slots included; what stands in the padding of local ids is free."""
    assert actual._tensors().keys() == expected._tensors().keys()
    for name, tensor in expected._tensors().items():
        assert actual._tensors()[name].dtype == tensor.dtype
        assert name == "local_ids" or torch.equal(actual._tensors()[name], tensor), name
    assert real_local(actual) == real_local(expected)
    assert actual.local_ids.shape == expected.local_ids.shape
    for name in ("slot_counts", "row_tokens", "origin"):
        assert getattr(actual, name) == getattr(expected, name)


@torch.no_grad()
def logits(model, memory, rows=None) -> torch.Tensor:
    prompt = tokens(3, 5, seed=50)[: memory.batch_size] if rows is None else tokens(3, 5, seed=50)[rows]
    return model(prompt, memory=memory).logits


# --- slice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (0, 2), (1, 3), (2, 3), (0, 5), (3, None), (0, None), (1, 100)])
def test_a_slice_is_what_compressing_these_tokens_gives(model, memory, start, stop):
    """Tokens behind the last whole segment count as a started segment number 4."""
    ids = tokens(2, 70)[:, start * SEGMENT : None if stop is None else stop * SEGMENT]
    assert_same(memory.slice(start, stop), model.compress(ids))


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (0, 3), (1, 2), (0, None), (1, None), (1, 3), (0, 100)])
def test_a_slice_of_ragged_rows_is_cut_row_by_row(model, ragged, start, stop):
    rows = [row[start * SEGMENT : None if stop is None else stop * SEGMENT] for row in source_rows()]
    sliced = ragged.slice(start, stop)
    assert_same(sliced, compress_rows(model, rows))
    assert sliced.row_tokens == tuple(map(len, rows))


def test_negative_numbers_count_from_the_last_whole_segment_of_each_row(model, ragged):
    rows = source_rows()
    assert_same(ragged.slice(-1), compress_rows(model, [rows[0][48:], rows[1], rows[2][16:]]))
    assert_same(ragged.slice(0, -1), compress_rows(model, [rows[0][:48], rows[1][:0], rows[2][:16]]))
    assert ragged.slice(-3, -1).row_tokens == (32, 0, 16)


def test_local_tokens_stay_only_behind_their_own_last_segment(memory, ragged):
    assert memory.slice(0, 4).num_local == 0
    assert torch.equal(memory.slice(0, 5).local_ids, memory.local_ids)
    assert torch.equal(memory.slice(4).local_ids, memory.local_ids)
    assert (memory.slice(5).num_local, memory.slice(5).row_tokens) == (0, (0, 0))
    assert [len(row) for row in real_local(ragged.slice(0, 3))] == [0, 9, 5]
    assert [len(row) for row in real_local(ragged.slice(1))] == [6, 0, 5]


def test_a_slice_of_nothing_decodes_as_the_base_does(model, memory):
    nothing = memory.slice(2, 2)
    assert (nothing.num_slots, nothing.num_tokens, nothing.nbytes, nothing.slot_counts) == (0, 0, 0, ())
    with torch.no_grad():
        assert torch.equal(logits(model, nothing), model(tokens(3, 5, seed=50)[:2]).logits)
    assert_same(model.compress(tokens(2, 70), memory=nothing), memory)


def test_a_slice_decodes_like_the_text_it_stands_for(model, ragged):
    sliced = ragged.slice(1, 3)
    for i, row in enumerate(source_rows()):
        if len(row) >= 2 * SEGMENT:
            single = model.compress(row[None, SEGMENT : 3 * SEGMENT])
            assert ratio_of_norms(logits(model, sliced)[i : i + 1], logits(model, single, [i])) <= 1e-10


def test_a_slice_does_not_hold_on_to_the_whole(memory):
    part = memory.slice(0, 1)
    assert part.layers[0][0].untyped_storage().nbytes() == part.layers[0][0].nbytes
    assert part.nbytes == memory.slice(0, 4).nbytes // 4


def test_segments_of_different_ratios_are_told_apart(model):
    ids = tokens(1, 64)
    memory = model.compress(ids[:, 32:], memory=model.compress(ids[:, :32], ratio=2), ratio=16)
    assert memory.slot_counts == (8, 8, 1, 1)
    assert_same(memory.slice(0, 2), model.compress(ids[:, :32], ratio=2))
    assert_same(memory.slice(3), model.compress(ids[:, 48:], ratio=16))


def test_segments_of_another_length_are_not_appended(model, memory):
    longer = rcc_model(scheme_options=model.config.scheme_options, segment_length=2 * SEGMENT)
    with pytest.raises(ValueError, match=r"segments of 16 tokens and config.segment_length is 32 now: set it back"):
        longer.compress(tokens(2, 64), memory=memory)


def test_what_is_not_kept_by_segment_cannot_be_cut(memory):
    recurrent = replace(memory, layers=tuple((layer[0][..., :7, :],) for layer in memory.layers))
    for use in (recurrent.slice, recurrent.unstack, lambda: RCCMemory.concatenate([recurrent])):
        with pytest.raises(ValueError, match="scheme 'rcc' does not keep its slots segment by segment"):
            use()


# --- concatenate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(5))
def test_both_sides_of_a_cut_give_the_whole(memory, cut):
    assert_same(RCCMemory.concatenate([memory.slice(0, cut), memory.slice(cut)]), memory)


def test_concatenating_is_compressing_one_text_behind_the_other(model):
    ids = tokens(2, 70)
    parts = [model.compress(ids[:, :16]), model.compress(ids[:, 16:48]), model.compress(ids[:, 48:])]
    assert_same(RCCMemory.concatenate(parts), model.compress(ids))
    assert_same(RCCMemory.concatenate(tuple(parts[:1])), parts[0])


def test_ragged_memories_are_joined_and_appended_to_without_gaps(model):
    firsts = [tokens(1, n, seed=n)[0] for n in (64, 16, 0)]
    seconds = [tokens(1, n, seed=n)[0] for n in (21, 50, 33)]
    joined = RCCMemory.concatenate([compress_rows(model, firsts), compress_rows(model, seconds)])
    whole = compress_rows(model, [torch.cat(pair) for pair in zip(firsts, seconds, strict=True)])
    assert_same(joined, whole)
    assert_same(model.compress(*pad(seconds), memory=compress_rows(model, firsts)), whole)


def test_ragged_rows_of_different_ratios(model):
    """Row 0 gets a segment of 8 slots where row 1 has one of 2: its other places are padding inside the block."""
    first = compress_rows(model, [tokens(1, 32)[0], tokens(1, 16, seed=1)[0]], ratio=8)
    second = compress_rows(model, [tokens(1, 3)[0], tokens(1, 35, seed=2)[0]], ratio=2)
    joined = RCCMemory.concatenate([first, second])
    assert joined.slot_counts == (2, 8, 8)
    assert joined.mask.sum(1).tolist() == [4, 18]
    for i, single in enumerate(joined.unstack()):
        pair = [first.unstack()[i], second.unstack()[i]]
        assert_same(single, RCCMemory.concatenate(pair))
        assert single.slot_counts == ((2, 2), (2, 8, 8))[i]
    assert_same(joined.slice(0, 1).unstack()[1], first.unstack()[1])
    assert_same(RCCMemory.stack(joined.unstack()), joined)


def other_model(memory):
    return replace(memory, origin=replace(memory.origin, compressor="0" * 16))


REFUSED = {
    "no memory": (lambda memory: [], ValueError, r"needs at least one memory"),
    "no RCCMemory": (lambda memory: [memory, "memory"], TypeError, r"number 1 is a str"),
    "another model": (lambda memory: [memory, other_model(memory)], ValueError, r"written by another model.*0000"),
    "another dtype": (lambda memory: [memory, memory.to(dtype=torch.float32)], ValueError, r"float64 .*float32"),
    "int8": (lambda memory: [memory.to_int8(), memory], ValueError, r"torch.int8 .*float64.*to_int8\(\)"),
    "another device": (lambda memory: [memory, memory.to("meta")], ValueError, r"on cpu and memory 1 on meta.*\.to\("),
}


@pytest.mark.parametrize("verb", ["concatenate", "stack"])
@pytest.mark.parametrize(("make", "error", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_go_together(memory, verb, make, error, words):
    with pytest.raises(error, match=words):
        getattr(RCCMemory, verb)(make(memory.slice(0, 2)))


def test_only_the_last_may_have_local_tokens(model, memory, ragged):
    with pytest.raises(ValueError, match=r"memory 0 ends in 6 raw local tokens.*model\.compress\(input_ids, memory="):
        RCCMemory.concatenate([memory, memory])
    with pytest.raises(ValueError, match="memory 1 ends in 9 raw local tokens"):
        RCCMemory.concatenate([ragged.slice(0, 0), ragged, ragged])
    unpadded = replace(memory, local_mask=torch.zeros(2, 6, dtype=torch.long))
    assert RCCMemory.concatenate([unpadded, memory]).row_tokens == (134, 134)


def test_rows_are_joined_to_rows(memory, ragged):
    with pytest.raises(ValueError, match="memory 0 has 2 rows and the last one 3"):
        RCCMemory.concatenate([memory.slice(0, 4), ragged])


def test_segments_of_one_length_only(model, memory):
    longer = rcc_model(scheme_options=model.config.scheme_options, segment_length=2 * SEGMENT)
    with pytest.raises(ValueError, match=r"segments of different lengths \(\[16, 32\]\)"):
        RCCMemory.concatenate([memory.slice(0, 4), longer.compress(tokens(2, 64))])


# --- stack, unstack --------------------------------------------------------------------------------------------------


def test_stacked_memories_are_one_ragged_batch(model, ragged):
    rows = source_rows()
    singles = [model.compress(rows[0][None]), ragged.slice(0).unstack()[1], model.compress(rows[2][None])]
    assert_same(RCCMemory.stack(singles), ragged)
    for single, again in zip(singles, RCCMemory.stack(singles).unstack(), strict=True):
        assert_same(again, single)


def test_unstacked_rows_have_no_padding(model, ragged):
    for row, single in zip(source_rows(), ragged.unstack(), strict=True):
        assert (single.mask, single.local_mask, single.batch_size) == (None, None, 1)
        assert single.num_tokens == len(row)
        if len(row) >= SEGMENT:
            assert_same(single, model.compress(row[None]))


def test_batches_are_stacked_row_under_row(model, memory, ragged):
    both = RCCMemory.stack([ragged, memory])
    assert both.row_tokens == (*ragged.row_tokens, *memory.row_tokens)
    for actual, expected in zip(both.unstack(), [*ragged.unstack(), *memory.unstack()], strict=True):
        assert_same(actual, expected)
    assert_same(RCCMemory.stack([memory]), memory)


def test_equal_memories_are_stacked_without_a_mask(model, memory):
    assert_same(RCCMemory.stack(memory.unstack()), memory)
    assert RCCMemory.stack(memory.unstack()).mask is None


def test_stacked_memories_answer_as_each_alone(model, ragged):
    singles = ragged.unstack()
    together = logits(model, RCCMemory.stack(singles))
    for i, single in enumerate(singles):
        assert ratio_of_norms(together[i : i + 1], logits(model, single, [i])) <= 1e-10


# --- int8 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "ragged"])
def test_int8_is_close_and_small(model, kind, request):
    memory = request.getfixturevalue(kind)
    small, text = memory.to_int8(), model.config.text_config
    assert small.dtype == torch.int8
    assert ratio_of_norms(logits(model, small), logits(model, memory)) <= 0.02
    heads = 1 if model.config.scheme_options["wiring"] == "add" else 2 * text.num_key_value_heads
    width = text.hidden_size if heads == 1 else heads * text.hidden_size // text.num_attention_heads
    slots, others = memory.batch_size * sum(memory.slot_counts), 0
    for tensor in (memory.mask, memory.local_ids, memory.local_mask):
        others += 0 if tensor is None else tensor.nbytes
    assert small.nbytes == text.num_hidden_layers * slots * (width + 4 * heads) + others


def test_int8_rounds_to_the_nearest_of_255_steps(memory):
    for layer, back in zip(memory.layers, memory.to_int8().to_float(torch.float64).layers, strict=True):
        for slots, rounded in zip(layer, back, strict=True):
            step = slots.abs().amax(-1, keepdim=True) / 127
            assert ((slots - rounded).abs() <= step * 0.5001).all()
            assert (rounded.abs().amax(-1, keepdim=True) / step - 127).abs().max() < 1e-4


def test_int8_of_states_keeps_large_channels_apart():
    """States of real models have a few channels that are hundreds of times larger than all others."""
    states = torch.randn(2, 5, 192)
    states[..., 70] = 500.0
    numbers, scales = compressed_int8_rcc.to_int8(states)
    assert (numbers.shape, scales.shape) == ((2, 5, 192), (2, 5, 3))
    back = compressed_int8_rcc.from_int8(numbers, scales, torch.float32)
    assert ratio_of_norms(back[..., :64], states[..., :64]) <= 0.01
    assert ratio_of_norms(back[..., 128:], states[..., 128:]) <= 0.01
    heads = compressed_int8_rcc.to_int8(torch.randn(2, 3, 5, 192))[1]
    assert heads.shape == (2, 3, 5, 1)


def test_int8_of_zeros_and_of_what_is_not_finite(memory):
    zeros = replace(memory, layers=tuple(tuple(map(torch.zeros_like, layer)) for layer in memory.layers))
    assert_same(zeros.to_int8().to_float(torch.float64), zeros)
    for value in (float("inf"), float("nan")):
        broken = replace(zeros, layers=(tuple(t + value for t in zeros.layers[0]), *zeros.layers[1:]))
        with pytest.raises(ValueError, match="infinite or undefined slots"):
            broken.to_int8()


def test_int8_and_back(memory):
    small = memory.to_int8()
    assert small.to_int8() is small
    assert_same(small.to(dtype=torch.float32), small.to_float(torch.float32))
    assert small.to_float(torch.float32).scales is None
    assert small.to("cpu").dtype == torch.int8
    assert_same(memory.to_float(torch.float32), memory.to(dtype=torch.float32))
    for convert in (memory.to_float, lambda dtype: memory.to(dtype=dtype)):
        with pytest.raises(ValueError, match=r"not in torch.int8; for 8 bits use to_int8\(\)"):
            convert(torch.int8)


def test_int8_goes_through_every_operation(memory, ragged):
    for whole in (memory, ragged):
        small = whole.to_int8()
        assert_same(small.slice(1, 3), whole.slice(1, 3).to_int8())
        assert_same(RCCMemory.stack(small.unstack()), small)
        parts = [whole.slice(0, 0), whole]
        assert_same(RCCMemory.concatenate([p.to_int8() for p in parts]), RCCMemory.concatenate(parts).to_int8())
        assert_same(small.select(torch.tensor([1, 0])), whole.select(torch.tensor([1, 0])).to_int8())
        assert_same(small.expand(6), whole.expand(6).to_int8())


def test_a_saved_int8_memory_stays_one(model, ragged, tmp_path):
    small = ragged.to_int8()
    small.save_pretrained(tmp_path)
    loaded = RCCMemory.from_pretrained(tmp_path)
    assert_same(loaded, small)
    assert torch.equal(logits(model, loaded), logits(model, small))


@pytest.mark.parametrize("missing", ["scales.1.0", "scales"])
def test_int8_without_all_of_its_scales_is_damaged(memory, missing, tmp_path):
    memory.to_int8().save_pretrained(tmp_path)
    with safe_open(tmp_path / "memory.safetensors", "pt") as file:
        tensors = {n: file.get_tensor(n) for n in file.keys() if not n.startswith(missing)}
        description = file.metadata()["memory"]
    save_file(tensors, tmp_path / "memory.safetensors", {"memory": description})
    assert json.loads(description)["num_layers"] == 3
    with pytest.raises(ValueError, match="damaged or no memory"):
        RCCMemory.from_pretrained(tmp_path)


def test_a_model_decodes_from_int8_as_from_what_it_stands_for(model, memory):
    small = memory.to_int8()
    plain = small.to_float(torch.float64)
    assert torch.equal(logits(model, small), logits(model, plain))
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    prompt = tokens(2, 5, seed=50)
    assert torch.equal(
        model.generate(prompt, memory=small, **settings), model.generate(prompt, memory=plain, **settings)
    )


def test_appending_to_int8_leaves_the_old_slots_alone(model, memory):
    small = memory.to_int8()
    grown = model.compress(tokens(2, 21, seed=1), memory=small)
    assert (grown.dtype, grown.num_slots, grown.num_local) == (torch.int8, 5 * SLOTS, 11)
    assert_same(grown.slice(0, 4), small.slice(0, 4))
    assert_same(grown, model.compress(torch.cat([tokens(2, 70), tokens(2, 21, seed=1)], 1)).to_int8())
    short = model.compress(tokens(2, 3, seed=1), memory=small)
    assert (short.dtype, short.num_local) == (torch.int8, 9)


def test_a_long_prompt_behind_int8_is_compressed_too(model, memory):
    small, prompt = memory.to_int8(), tokens(2, 61, seed=2)
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    expected = model.generate(prompt, memory=memory, **settings)
    assert model.generate(prompt, memory=small, **settings).shape == expected.shape


def test_layers_are_made_floating_one_by_one(model, memory, monkeypatch):
    made = []
    inherited = compressed_int8_rcc.FloatLayers.__getitem__

    def spy(self, index):
        made.append(index)
        return inherited(self, index)

    monkeypatch.setattr(compressed_int8_rcc.FloatLayers, "__getitem__", spy)
    layers = memory.to_int8().float_layers(torch.float64)
    assert (len(layers), made) == (3, [])
    assert layers[1][0].dtype == torch.float64
    assert made == [1]
    assert memory.float_layers(torch.float64) is memory.layers
