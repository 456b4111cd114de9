# SPDX-License-Identifier: Apache-2.0
"""Modes of `generate` that few use, and padding on the right: each row and mode equals what it must."""

import pytest
import torch
from generating import MODES, NEW, ROUNDED, case, decode, never_ending, padded, teacher_forced
from tiny import WINDOW, base_with_weights_of, ratio_of_norms, rcc_model, tokens
from transformers import DynamicCache, GenerationConfig

from rcc_hf.modeling.cache_rcc import RCCCache


@pytest.fixture(scope="module")
def model():
    return never_ending(rcc_model())


@pytest.fixture(scope="module")
def base(model):
    return never_ending(base_with_weights_of(model))


@pytest.mark.parametrize("with_memory", [False, True])
@pytest.mark.parametrize("lengths", [(9, 4, 7), (5, WINDOW, 40)], ids=["short", "one is long"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": True, "max_new_tokens": 20}], ids=str)
def test_right_padded_prompts_equal_single_rows(model, with_memory, lengths, settings):
    rows = [tokens(1, n, seed=n) for n in lengths]
    memory = model.compress(tokens(3, 54)) if with_memory else None
    settings = {"do_sample": False, "max_new_tokens": NEW} | settings
    ids, mask = padded(rows, "right")
    new = model.generate(ids, attention_mask=mask, memory=memory, **settings)[:, ids.shape[1] :]
    for i, row in enumerate(rows):
        single = None if memory is None else memory.unstack()[i]
        assert torch.equal(new[i], model.generate(row, memory=single, **settings)[0, row.shape[1] :])


@pytest.mark.parametrize("mode", MODES)
def test_beam_sample_scores_are_those_of_the_text(model, mode):
    arguments, (local, memory) = case(model, mode)
    settings = {"num_beams": 3, "do_sample": True, "num_return_sequences": 2, "length_penalty": 0.0, "top_k": 0}
    torch.manual_seed(3)
    output = model.generate(
        **arguments, **settings, max_new_tokens=NEW, return_dict_in_generate=True, output_scores=True
    )
    new = output.sequences[:, -NEW:]
    for row, score in zip(new, output.sequences_scores, strict=True):
        logits = teacher_forced(model, local, row[None], memory).log_softmax(-1)
        assert score.item() == pytest.approx(logits.gather(2, row[None, :, None]).sum().item(), rel=1e-5)


@pytest.mark.parametrize("length", [7, 61])
def test_our_model_assists_the_base(model, base, length):
    prompt = tokens(1, length)
    settings = {"do_sample": False, "max_new_tokens": 12}
    assert torch.equal(base.generate(prompt, assistant_model=model, **settings), base.generate(prompt, **settings))


@pytest.mark.parametrize("mode", MODES)
def test_a_generate_of_the_callers_own(model, mode):
    """It finds the cache in its arguments and calls the model as the library's loops do."""
    seen = []

    def own(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        seen.append(type(model_kwargs["past_key_values"]))
        return model._sample(input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)

    arguments, _ = case(model, mode)
    settings = {"do_sample": False, "max_new_tokens": NEW}
    expected = model.generate(**arguments, **settings)
    assert torch.equal(model.generate(**arguments, **settings, custom_generate=own), expected)
    assert seen == [RCCCache]


def test_a_cache_made_by_hand(model):
    prompt, memory = tokens(1, 7), model.compress(tokens(1, 54))
    cache = RCCCache(3, memory, compress_prompt=True)
    expected, _ = decode(model, prompt, memory=memory)
    assert torch.equal(decode(model, prompt, past_key_values=cache)[0], expected)


def test_a_plain_cache_for_a_short_prompt(model, base):
    prompt = tokens(2, 7)
    results = [decode(one, prompt, past_key_values=DynamicCache())[0] for one in (model, base)]
    assert torch.equal(*results)


def test_settings_from_a_configuration_object(model):
    arguments, _ = case(model, "memory")
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, cache_implementation="dynamic", pad_token_id=0)
    assert torch.equal(model.generate(**arguments, generation_config=config)[:, -NEW:], decode(model, **arguments)[0])
    config.cache_implementation = "quantized"
    with pytest.raises(ValueError, match="does not work with cache_implementation='quantized'"):
        model.generate(**arguments, generation_config=config)


@pytest.mark.parametrize("mode", MODES)
def test_hidden_states_of_the_tokens_that_are_decoded(model, mode):
    arguments, (local, memory) = case(model, mode)
    output = model.generate(
        **arguments, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_hidden_states=True
    )
    with torch.no_grad():
        expected = model(local, memory=memory, compress=False, output_hidden_states=True).hidden_states
    for layer, other in zip(output.hidden_states[0], expected, strict=True):
        assert ratio_of_norms(layer[:, -local.shape[1] :], other) <= ROUNDED


def test_no_compression_keeps_a_long_prompt_raw(model, base):
    prompt = tokens(2, 61)
    assert torch.equal(decode(model, prompt, compress=False)[0], decode(base, prompt)[0])
    memory = model.compress(tokens(2, 54))
    new, _ = decode(model, prompt, memory=memory, compress=False)
    assert torch.equal(new, teacher_forced(model, prompt, new, memory).argmax(-1))
    assert torch.equal(decode(model, prompt, compress=False, use_cache=False)[0], decode(base, prompt)[0])


def test_early_exit_is_refused(model):
    for prompt in (tokens(1, 7), tokens(1, 61)):
        with pytest.raises(ValueError, match="assistant_early_exit does not work with RCC models"):
            model.generate(prompt, assistant_early_exit=1, max_new_tokens=4, do_sample=False)
