# SPDX-License-Identifier: Apache-2.0
"""Compiled decoding steps in a static cache behind memory: what they compute, and how often they are compiled."""

import pytest
import torch
from generating import MODES, NEW, assert_decoded, case, decode, never_ending
from test_static_cache import GREEDY, STATIC, ragged, whole
from tiny import SEGMENT, VARIANTS, WINDOW, ratio_of_norms, rcc_model, tokens
from transformers import CompileConfig, StaticCache

from rcc_hf.modeling import generation_rcc


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return never_ending(rcc_model(**VARIANTS[request.param]))


def compiled(backend="eager"):
    """Arguments of `generate` that compile the decoding step on any device, as is done on a GPU by default."""
    config = CompileConfig(fullgraph=True, mode="default", backend=backend)
    config._compile_all_devices = True
    return {**STATIC, "compile_config": config}


def graphs(counters) -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def test_one_graph_for_all_steps_and_calls(model, counters):
    for mode in MODES:
        arguments, _ = case(model, mode)
        for ratio in (None, 8) if mode != "memory" else (None,):
            settings = {**arguments, "ratio": ratio}
            actual = decode(model, **settings, **compiled(), max_cache_len=120)
            assert_decoded(actual, decode(model, **settings))
            assert graphs(counters) == 1


def test_a_step_looks_at_no_value(model, counters):
    """It would wait for the device, and could not become a CUDA graph."""
    operations = set()

    def backend(graph, inputs):
        operations.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    arguments, _ = case(model, "memory")
    decode(model, **arguments, **compiled(backend))
    assert "index_copy_" in operations
    assert not operations & {"item", "tolist"}


def test_without_a_given_length_few_longer_calls_compile_once_more(monkeypatch, counters):
    monkeypatch.setattr(generation_rcc, "STATIC_STEP", 16)
    model = never_ending(rcc_model())
    # new tokens, and how many graphs there are after that call; 24 entries are slots and the prompt but for one token
    expected = {8: 1, 5: 1, 3: 1, 9: 2, 24: 2, 25: 2, 50: 2}
    arguments, _ = case(model, "memory")
    for count, number in expected.items():
        assert_decoded(decode(model, **arguments, **compiled(), count=count), decode(model, **arguments, count=count))
        assert graphs(counters) == number


def test_memories_and_prompts_of_many_lengths_have_one_graph(counters):
    model = never_ending(rcc_model())
    for segments in (1, 2, 5, 9):
        memory = model.compress(tokens(1, segments * SEGMENT + segments))
        for length in (3, 8):
            arguments = {"input_ids": tokens(1, length), "memory": memory}
            assert_decoded(decode(model, **arguments, **compiled()), decode(model, **arguments))
    assert graphs(counters) == 1


@pytest.mark.parametrize("mode", MODES)
def test_compiled_steps_of_a_ragged_batch_with_beams(model, counters, mode):
    arguments = ragged(model, mode)
    assert_decoded(decode(model, **arguments, **compiled()), decode(model, **arguments))
    equal, _ = case(model, mode, 3)
    assert_decoded(decode(model, **equal, **compiled()), decode(model, **equal))
    assert graphs(counters) == 2  # where rows differ in having slots, adapters are on in some: a step of its own
    settings = {"num_beams": 3, **GREEDY}
    assert torch.equal(model.generate(**arguments, **settings, **compiled()), model.generate(**arguments, **settings))


def test_compiled_sampling_and_continuing(model, counters):
    arguments, outputs = ragged(model, "memory"), []
    more = tokens(6, 9, seed=8)
    for settings in ({**compiled(), "max_cache_len": 120}, {}):
        torch.manual_seed(3)
        first = whole(model, **arguments, **settings, do_sample=True, num_return_sequences=2)
        mask = arguments["attention_mask"].repeat_interleave(2, 0)
        mask = torch.cat([mask, torch.ones(6, NEW + 9, dtype=torch.long)], 1)
        asked = torch.cat([first.sequences, more], 1)
        settings = {name: value for name, value in settings.items() if name == "compile_config"}
        outputs.append(decode(model, asked, attention_mask=mask, past_key_values=first.past_key_values, **settings))
    assert_decoded(*outputs)
    assert graphs(counters) == 1


def test_short_prompts_keep_the_cache_of_the_library(model, counters):
    prompt = tokens(2, WINDOW)
    output = whole(model, input_ids=prompt, **compiled())
    assert type(output.past_key_values) is StaticCache
    assert graphs(counters) == 1
    assert torch.equal(output.sequences, model.generate(prompt, **GREEDY))


@pytest.mark.slow
def test_real_compiler(model, counters):
    for mode in MODES:
        arguments = ragged(model, mode)
        (new, logits), expected = decode(model, **arguments, **compiled("inductor")), decode(model, **arguments)
        assert torch.equal(new, expected[0])
        # the base makes its rotary tables in float32, and compiled code rounds them in its own way
        assert ratio_of_norms(logits, expected[1]) <= 1e-6
    assert graphs(counters) <= 3


@pytest.mark.gpu
def test_on_a_gpu_steps_are_compiled_without_being_asked_for(model, counters):
    """With CUDA graphs, the library's default. Rotary tables are in float32, on each device with its own rounding."""
    gpu = rcc_model(scheme_options=model.config.scheme_options).to("cuda")
    never_ending(gpu)
    for mode in MODES:
        arguments = ragged(model, mode)
        there = {name: value.to("cuda") for name, value in arguments.items()}
        (new, logits), expected = decode(gpu, **there, **STATIC), decode(model, **arguments)
        assert torch.equal(new.cpu(), expected[0])
        assert ratio_of_norms(logits.cpu(), expected[1]) <= 1e-6
        settings = {"num_beams": 3, **GREEDY}
        assert torch.equal(gpu.generate(**there, **settings, **STATIC).cpu(), model.generate(**arguments, **settings))
    assert 1 <= graphs(counters) <= 4
