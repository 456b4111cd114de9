# SPDX-License-Identifier: Apache-2.0
"""Compression by compiled layers: what it computes, when it is compiled, and what it leaves behind."""

import threading

import pytest
import torch
from tiny import SEGMENT, WRITTEN_VARIANTS, base_model, ratio_of_norms, rcc_model, text_config, tokens
from torch import nn

from rcc_hf.compiling import compiled_compressor
from rcc_hf.training.compiling import compiled_blocks

pytestmark = pytest.mark.usefixtures("counters")

LENGTHS = (3, 6, 5, 4)
"""Segments of some contexts: with three segments a batch the last batch is of 3, 2 and 1."""


def graphs(counters) -> int:
    return counters["stats"]["unique_graphs"]


def compressor(layers: int = 3, **options):
    model = rcc_model(text_config=text_config(num_hidden_layers=layers), **options)
    model.config.encode_batch_tokens = 3 * SEGMENT
    return model


def kinds(model) -> list[type]:
    return [type(layer) for layer in model.model.language_model.layers]


def assert_same(actual, expected, bound: float = 1e-10) -> None:
    """Two memories are, up to rounding."""
    for parts, wanted in zip(actual.layers, expected.layers, strict=True):
        for part, like in zip(parts, wanted, strict=True):
            assert ratio_of_norms(part, like) <= bound


def assert_compresses(model, bound: float = 1e-10, **options) -> None:
    """As without compiling, contexts of several lengths."""
    contexts = [tokens(1, SEGMENT * n, seed=n) for n in LENGTHS]
    expected = [model.compress(ids) for ids in contexts]
    with compiled_compressor(model, **options):
        for ids, wanted in zip(contexts, expected, strict=True):
            assert_same(model.compress(ids), wanted, bound)


@pytest.mark.parametrize("variant", WRITTEN_VARIANTS)
def test_memories_are_the_same(variant, counters):
    assert_compresses(compressor(**WRITTEN_VARIANTS[variant]), backend="aot_eager")
    assert graphs(counters)
    assert not counters["graph_break"]


@pytest.mark.parametrize("scheme", ["rcc", "uio"])
@pytest.mark.parametrize("family", ["gemma3_text", "gpt_neox"])
def test_other_families(family, scheme, counters):
    assert_compresses(rcc_model(family, scheme=scheme), backend="eager")
    assert graphs(counters)


@pytest.mark.parametrize(("scheme", "most"), [("rcc", 6), ("uio", 13)])
def test_compilations_do_not_grow_with_layers(scheme, most, counters):
    found = set()
    for layers in (4, 6):
        torch._dynamo.reset()
        counters.clear()
        assert_compresses(compressor(layers, scheme=scheme), backend="eager")
        found.add(graphs(counters))
    assert len(found) == 1
    assert found.pop() <= most


@pytest.mark.parametrize("plain_first", [True, False])
@pytest.mark.parametrize("scheme", ["rcc", "uio"])
def test_the_plain_base_and_the_compressor_take_turns(scheme, plain_first):
    """Before the first compression there are no hooks; what is traced then must not serve afterwards."""
    ids, context = tokens(2, 9), tokens(1, SEGMENT * 3)
    reference = rcc_model(scheme=scheme)
    logits, memory = reference(ids).logits, reference.compress(context)
    model = rcc_model(scheme=scheme)
    with torch.no_grad(), compiled_compressor(model, backend="eager"):
        for _ in range(2):
            for plain in (plain_first, not plain_first):
                if plain:
                    assert torch.equal(model(ids).logits, logits)
                else:
                    assert_same(model.compress(context), memory)


def test_a_model_with_more_adapters_than_the_one_before():
    """Their layers differ in hooks alone, which the compiler would not look at."""
    for targets in (("q_proj",), ("v_proj", "up_proj"), None):
        assert_compresses(rcc_model(scheme_options={"targets": targets}), backend="eager")


def test_it_compiles_in_other_threads_as_in_this_one():
    models = [rcc_model(scheme_options={"targets": targets}) for targets in (("q_proj",), None)]
    context, found = tokens(1, SEGMENT * 3), []
    expected = [model.compress(context) for model in models]
    thread = threading.Thread(target=lambda: found.extend(model.compress(context) for model in models))
    with compiled_compressor(models[0], backend="eager"), compiled_compressor(models[1], backend="eager"):
        thread.start()
        thread.join()
    for memory, wanted in zip(found, expected, strict=True):
        assert_same(memory, wanted)


def test_decoding_and_the_base_run_plain(counters):
    model = compressor()
    memory, ids = model.compress(tokens(1, SEGMENT * 2)), tokens(1, 5)
    expected = model.generate(ids, memory=memory, max_new_tokens=4, do_sample=False)
    with torch.no_grad(), compiled_compressor(model, backend="eager"):
        assert torch.equal(model.generate(ids, memory=memory, max_new_tokens=4, do_sample=False), expected)
        model(ids)
    assert not graphs(counters)


def test_a_model_in_training_mode_runs_plain(counters):
    model = compressor().train()
    with compiled_compressor(model, backend="eager"):
        model.compress(tokens(1, SEGMENT))
    assert not graphs(counters)


def test_nothing_is_left_behind(counters):
    model = compressor()
    before, limit = kinds(model), torch._dynamo.config.recompile_limit

    def stop():
        with compiled_compressor(model, backend="eager"):
            assert [kind.__name__ for kind in kinds(model)] == [kind.__name__ for kind in before]
            assert not set(kinds(model)) & set(before)
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        stop()
    assert kinds(model) == before
    assert (torch._dynamo.config.recompile_limit, torch._dynamo.config.skip_nnmodule_hook_guards) == (limit, True)
    model.compress(tokens(1, SEGMENT))
    assert not graphs(counters)


def test_nested_blocks(counters):
    model, context = compressor(), tokens(1, SEGMENT * 3)
    before, expected = kinds(model), model.compress(context)
    with compiled_compressor(model, backend="eager"):
        model.compress(context)
        count = graphs(counters)
        with compiled_compressor(model, backend="eager"):
            assert_same(model.compress(context), expected)
        assert_same(model.compress(context), expected)
        assert graphs(counters) == count > 0  # the inner block is the outer one
    assert kinds(model) == before


def test_within_compiled_training(counters):
    """Both hold: a pass is compiled in training mode, and the compressor's outside of it."""
    model, context, ids = compressor(), tokens(1, SEGMENT * 3), tokens(1, 6)
    before, expected = kinds(model), model.compress(context)
    with compiled_blocks(model, backend="eager"), compiled_compressor(model, backend="eager"):
        assert_same(model.compress(context), expected)
        compressing = graphs(counters)
        model.train()(ids, context_ids=context, labels=ids).loss.backward()
        assert graphs(counters) > compressing > 0
    assert kinds(model) == before


def test_later_blocks_compile_no_more(counters):
    found = []
    for _ in range(2):
        assert_compresses(compressor(), backend="eager")
        found.append(graphs(counters))
    assert found[0] == found[1] > 0


def test_peft_around_the_model(counters):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "up_proj"])
    model = peft.get_peft_model(rcc_model(), lora).eval()
    context = tokens(1, SEGMENT * 3)
    expected = model.compress(context)
    with compiled_compressor(model, backend="aot_eager"):
        assert_same(model.compress(context), expected)
    assert graphs(counters)


@pytest.mark.parametrize("thing", [base_model, lambda: nn.Linear(2, 2), lambda: "model"])
def test_other_models_are_refused(thing):
    with pytest.raises(TypeError, match="takes an RCCForCausalLM or RCCModel of this package"):
        compiled_compressor(thing())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["rcc", "uio"])
def test_real_compiler(scheme):
    assert_compresses(rcc_model(scheme=scheme, dtype=torch.float32), bound=1e-5)
