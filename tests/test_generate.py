# SPDX-License-Identifier: Apache-2.0
"""`generate` with memory, and with prompts that do not fit the window, against loops over plain forward calls."""

import copy

import pytest
import torch
from generating import (
    EXACT,
    MODES,
    NEW,
    ROUNDED,
    assert_decoded,
    case,
    decode,
    loop,
    never_ending,
    padded,
    split,
    teacher_forced,
)
from tiny import RATIO, SEGMENT, base_model, ratio_of_norms, rcc_model, tokens

from rcc_hf.modeling.cache_rcc import RCCCache
from rcc_hf.modeling.memory_rcc import WIRINGS


@pytest.fixture(scope="module", params=WIRINGS)
def model(request):
    return never_ending(rcc_model(scheme_options={"wiring": request.param}))


@pytest.mark.parametrize("mode", MODES)
def test_greedy_equals_a_loop_without_cache(model, mode):
    arguments, (local, memory) = case(model, mode)
    assert_decoded(decode(model, **arguments), loop(model, local, memory))


def test_memory_matters(model):
    """What the tests of this file compare would be equal by chance if the model ignored its memory."""
    arguments, _ = case(model, "memory")
    with_memory, without = decode(model, **arguments)[1], decode(model, arguments["input_ids"])[1]
    assert ratio_of_norms(with_memory[:, 0], without[:, 0]) > 1e-3
    other = decode(model, arguments["input_ids"], memory=model.compress(tokens(1, 54, seed=9)))[1]
    assert ratio_of_norms(other[:, 0], with_memory[:, 0]) > 1e-3


def test_memory_keeps_the_local_tokens_of_a_context_in_front_of_a_long_prompt(model):
    """54 = 3 segments + 6 raw tokens; with the prompt they are 67 raw tokens, of which 3 segments do not fit."""
    context, prompt = tokens(1, 54), tokens(1, 61, seed=2)
    joined = torch.cat([context[:, 48:], prompt], 1)
    memory = model.compress(joined[:, :48], memory=model.compress(context[:, :48]))
    assert_decoded(decode(model, prompt, memory=model.compress(context)), loop(model, joined[:, 48:], memory))


@pytest.mark.parametrize("mode", MODES)
def test_batch_of_equal_lengths_equals_single_rows(model, mode):
    arguments, (local, memory) = case(model, mode, batch_size=3)
    new, logits = decode(model, **arguments)
    for row in range(3):
        expected = loop(model, local[row : row + 1], memory.select(torch.tensor([row])))
        assert_decoded((new[row : row + 1], logits[row : row + 1]), expected)


def test_ragged_left_padded_long_prompts_equal_single_rows(model):
    """Of 90, 20 and 55 tokens: 4 segments, none (this row is the plain base model), and 2."""
    rows = [tokens(1, n, seed=n) for n in (90, 20, 55)]
    ids, mask = padded(rows, "left")
    new, logits = decode(model, ids, attention_mask=mask)
    for i, row in enumerate(rows):
        assert_decoded((new[i : i + 1], logits[i : i + 1]), decode(model, row))


def test_padding_is_found_without_a_mask(model):
    """`generate` makes the mask from the padding token when none is given."""
    ids, mask = padded([tokens(1, 70), tokens(1, 41, seed=1)], "left")
    assert_decoded(decode(model, ids), decode(model, ids, attention_mask=mask))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompt_lengths", [(5, 5, 5), (5, 9, 2), (33, 50, 2)])
def test_ragged_memory_and_ragged_prompts_equal_single_rows(model, side, prompt_lengths):
    """A context of 9 tokens has no slot; all of it stays local."""
    contexts = [tokens(1, n, seed=n) for n in (70, 9, 37)]
    prompts = [tokens(1, n, seed=100 + n) for n in prompt_lengths]
    ids, mask = padded(contexts, side)
    memory = model.compress(ids, attention_mask=mask)
    prompt_ids, prompt_mask = padded(prompts, "left")
    new, logits = decode(model, prompt_ids, attention_mask=prompt_mask, memory=memory)
    for i, (context, prompt) in enumerate(zip(contexts, prompts, strict=True)):
        if context.shape[1] < SEGMENT:
            expected = decode(model, torch.cat([context, prompt], 1))
        else:
            expected = decode(model, prompt, memory=model.compress(context))
        assert_decoded((new[i : i + 1], logits[i : i + 1]), expected)


def test_one_memory_serves_a_batch_of_prompts(model):
    memory, prompts = model.compress(tokens(1, 54)), [tokens(1, n, seed=n) for n in (7, 3, 5)]
    ids, mask = padded(prompts, "left")
    new, logits = decode(model, ids, attention_mask=mask, memory=memory)
    for i, prompt in enumerate(prompts):
        assert_decoded((new[i : i + 1], logits[i : i + 1]), decode(model, prompt, memory=memory))


def test_two_memories_serve_two_prompts_each(model):
    memory, prompts = model.compress(tokens(2, 54)), tokens(4, 7, seed=1)
    new, logits = decode(model, prompts, memory=memory)
    for i in range(4):
        expected = decode(model, prompts[i : i + 1], memory=memory.select(torch.tensor([i // 2])))
        assert_decoded((new[i : i + 1], logits[i : i + 1]), expected)


def test_forward_serves_a_batch_of_prompts_with_one_memory(model):
    memory, prompts = model.compress(tokens(1, 54)), tokens(3, 7, seed=1)
    with torch.no_grad():
        logits = model(prompts, memory=memory).logits
        single = torch.cat([model(row[None], memory=memory).logits for row in prompts])
    assert ratio_of_norms(logits, single) <= EXACT


def test_ratio_of_one_call(model):
    long = tokens(1, 61)
    head, local = split(long)
    for ratio in (2, 8, 16):
        assert_decoded(decode(model, long, ratio=ratio), loop(model, local, model.compress(head, ratio=ratio)))
    other, memory = decode(model, long)[1], model.compress(head, ratio=RATIO)
    assert ratio_of_norms(other, loop(model, local, memory)[1]) <= ROUNDED
    assert ratio_of_norms(other, loop(model, local, model.compress(head, ratio=2))[1]) > 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_sampling_is_reproducible_and_from_the_right_distribution(model, mode):
    arguments, (local, memory) = case(model, mode, batch_size=2)

    def sample():
        torch.manual_seed(3)
        return decode(model, **arguments, do_sample=True, num_return_sequences=3)

    (new, logits), again = sample(), sample()
    assert torch.equal(new, again[0])
    assert len({tuple(row) for row in new.tolist()}) == 6
    rows = torch.arange(2).repeat_interleave(3)
    expected = teacher_forced(model, local[rows], new, memory.select(rows))
    assert ratio_of_norms(logits, expected) <= ROUNDED


@pytest.mark.parametrize("mode", MODES)
def test_beam_scores_equal_teacher_forcing(model, mode):
    arguments, (local, memory) = case(model, mode, batch_size=2)
    settings = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0, "max_new_tokens": NEW}
    output = model.generate(**arguments, **settings, do_sample=False, return_dict_in_generate=True, output_scores=True)
    new, rows = output.sequences[:, -NEW:], torch.arange(2).repeat_interleave(2)
    logits = teacher_forced(model, local[rows], new, memory.select(rows))
    expected = logits.log_softmax(-1).gather(2, new[..., None]).sum((1, 2))
    assert (output.sequences_scores - expected).abs().max() <= 1e-4  # the library sums in float32
    assert len({tuple(row) for row in new.tolist()}) == 4


def test_beams_of_ragged_rows_equal_single_rows(model):
    rows = [tokens(1, n, seed=n) for n in (90, 20, 55)]
    ids, mask = padded(rows, "left")
    settings = {"num_beams": 3, "do_sample": False, "max_new_tokens": NEW}
    new = model.generate(ids, attention_mask=mask, **settings)[:, -NEW:]
    for i, row in enumerate(rows):
        assert torch.equal(new[i : i + 1], model.generate(row, **settings)[:, -NEW:])


@pytest.mark.parametrize("mode", MODES)
def test_prompt_lookup_equals_greedy(model, mode):
    arguments, _ = case(model, mode)
    # with a pattern to find, so that candidates are proposed and rejected ones are taken out of the cache
    arguments["input_ids"] = torch.cat([arguments["input_ids"], tokens(1, 3, seed=7).repeat(1, 4)], 1)
    expected, _ = decode(model, **arguments, count=16)
    new = model.generate(**arguments, prompt_lookup_num_tokens=3, do_sample=False, max_new_tokens=16)[:, -16:]
    assert torch.equal(new, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("assistant", ["itself", "its base"])
def test_assisted_decoding_equals_greedy(model, mode, assistant):
    arguments, _ = case(model, mode)
    expected, _ = decode(model, **arguments, count=16)
    helper = model if assistant == "itself" else never_ending(base_model().double())
    new = model.generate(**arguments, assistant_model=helper, do_sample=False, max_new_tokens=16)[:, -16:]
    assert torch.equal(new, expected)


@pytest.mark.parametrize("mode", MODES)
def test_inputs_embeds(model, mode):
    arguments, _ = case(model, mode)
    expected = decode(model, **arguments)
    ids = arguments.pop("input_ids")
    embeds = model.get_input_embeddings()(ids).detach()
    assert_decoded(decode(model, inputs_embeds=embeds, **arguments), expected)
    both = model.generate(ids, inputs_embeds=embeds, do_sample=False, max_new_tokens=NEW, **arguments)
    assert torch.equal(both[:, -NEW:], expected[0])


@pytest.mark.parametrize("mode", MODES)
def test_continuing_from_a_cache(model, mode):
    """A second turn in the same cache; its prompt is everything so far, as for any model, or the new tokens alone."""
    arguments, (local, memory) = case(model, mode)
    first = model.generate(**arguments, do_sample=False, max_new_tokens=NEW, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, RCCCache)
    asked = torch.cat([first.sequences, tokens(1, 9, seed=8)], 1)
    expected = loop(model, torch.cat([local, asked[:, arguments["input_ids"].shape[1] :]], 1), memory)
    cache = copy.deepcopy(first.past_key_values)
    assert_decoded(decode(model, asked, past_key_values=cache), expected)
    unseen = asked[:, first.past_key_values.get_seq_length() :]
    mask = torch.ones_like(asked)
    assert_decoded(decode(model, unseen, past_key_values=first.past_key_values, attention_mask=mask), expected)


def test_continuing_a_ragged_batch(model):
    rows = [tokens(1, n, seed=n) for n in (90, 20, 55)]
    ids, mask = padded(rows, "left")
    first = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, return_dict_in_generate=True)
    more = tokens(3, 5, seed=8)
    asked = torch.cat([first.sequences, more], 1)
    mask = torch.cat([mask, mask.new_ones(3, NEW + 5)], 1)
    new, logits = decode(model, asked, attention_mask=mask, past_key_values=first.past_key_values)
    for i, row in enumerate(rows):
        single = model.generate(row, do_sample=False, max_new_tokens=NEW, return_dict_in_generate=True)
        expected = decode(
            model, torch.cat([single.sequences, more[i : i + 1]], 1), past_key_values=single.past_key_values
        )
        assert_decoded((new[i : i + 1], logits[i : i + 1]), expected)


@pytest.mark.parametrize("mode", [*MODES, "neither"])
def test_while_training_with_checkpointing(mode):
    """Trainers that sample leave the model in its training mode; the layers then keep their cache."""
    one = never_ending(rcc_model())
    arguments = {"input_ids": tokens(1, 7)} if mode == "neither" else case(one, mode)[0]
    expected = decode(one, **arguments)
    one.train()
    one.gradient_checkpointing_enable()
    assert_decoded(decode(one, **arguments), expected)


@pytest.mark.parametrize("mode", MODES)
def test_in_other_precisions(mode):
    """In bfloat16, and in float32 under autocast, the first logits are near those in float64."""
    exact = never_ending(rcc_model())
    expected = decode(exact, **case(exact, mode)[0], count=1)[1]
    for dtype in (torch.bfloat16, torch.float32):
        one = never_ending(rcc_model(dtype=dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            logits = decode(one, **case(one, mode)[0], count=1)[1]
        assert ratio_of_norms(logits.double(), expected.double()) <= 3e-2  # eight bits, through three layers and slots
