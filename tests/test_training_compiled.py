# SPDX-License-Identifier: Apache-2.0
"""Compiled decoder layers in training: what they compute, and how often they are compiled."""

import pytest
import torch
from tiny import SEGMENT, WRITTEN_VARIANTS, ratio_of_norms, rcc_model, text_config, tokens
from training_runs import Mixed, fresh, gradients, parameters, settings, trainer_of

from rcc_hf.modeling.adapters_rcc import LowRankAdapter
from rcc_hf.training import running as running_module
from rcc_hf.training import train
from rcc_hf.training.compiling import compiled_blocks

pytestmark = pytest.mark.usefixtures("counters")

STEPS = ((4, 1), (8, 1), (2, 1), (16, 1), (4, 2), (8, 2), (4, 1))
"""Ratio and segments of some steps."""


def step(model, ratio, segments):
    """Loss and gradients."""
    model.train()
    model.zero_grad()
    ids = tokens(2, 20, seed=1)
    loss = model(ids, context_ids=tokens(2, SEGMENT * segments), labels=ids, ratio=ratio).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(actual, expected, bound=1e-6):
    assert ratio_of_norms(actual[0], expected[0]) <= bound
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert ratio_of_norms(actual[1][name], gradient) <= bound, name


def trained_model(layers=6, **options):
    model = rcc_model(text_config=text_config(num_hidden_layers=layers), **options)
    model.freeze_base()
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", WRITTEN_VARIANTS)
def test_losses_and_gradients_are_the_same(variant, checkpointing):
    model = trained_model(4, **WRITTEN_VARIANTS[variant])
    if checkpointing:
        model.gradient_checkpointing_enable()
    expected = [step(model, *how) for how in STEPS[:2]]
    with compiled_blocks(model, backend="aot_eager"):
        actual = [step(model, *how) for how in STEPS[:2]]
    for found, wanted in zip(actual, expected, strict=True):
        assert_same(found, wanted)


@pytest.mark.parametrize(("dynamic", "most"), [(False, 3 + 4 + 3 + 2), (None, 3 + 3 + 2)])
def test_compilations_do_not_grow_with_layers(counters, dynamic, most):
    found = set()
    for layers in (6, 9):
        torch._dynamo.reset()
        counters.clear()
        model = trained_model(layers)
        with compiled_blocks(model, dynamic=dynamic, backend="eager"):
            for how in STEPS:
                step(model, *how)
        assert not counters["graph_break"]
        found.add(counters["stats"]["unique_graphs"])
    assert len(found) == 1
    assert found.pop() <= most


def test_adapters_are_merged_while_compiled_layers_are_trained(monkeypatch):
    model, merged = trained_model(3), []
    plain = LowRankAdapter.merge
    monkeypatch.setattr(LowRankAdapter, "merge", lambda *arguments: merged.append(1) or plain(*arguments))
    expected = step(model, 4, 1)
    assert not merged
    with compiled_blocks(model, backend="eager"):
        assert_same(step(model, 4, 1), expected)
        assert merged
        merged.clear()
        model.compress(tokens(1, SEGMENT))
        with torch.no_grad():
            model(tokens(1, 4), context_ids=tokens(1, SEGMENT))
    assert not merged


def test_nothing_is_compiled_in_evaluation_mode_and_nothing_left_behind(counters):
    model = trained_model(3)
    layer = model.model.language_model.layers[0]
    kind = type(layer)
    with compiled_blocks(model, backend="aot_eager"):
        assert type(layer) is not kind
        assert type(layer).__name__ == kind.__name__
        model.eval()
        model.compress(tokens(1, SEGMENT))
        assert not counters["stats"]["unique_graphs"]
    assert type(layer) is kind


def test_another_model_of_the_kind_is_not_compiled_again(counters):
    found = []
    for _ in range(2):
        model = trained_model(3)
        with compiled_blocks(model, dynamic=None, backend="eager"):
            for how in STEPS:
                step(model, *how)
        found.append(counters["stats"]["unique_graphs"])
    assert found[0] == found[1] > 0


def test_the_teacher_is_compiled_too(tmp_path):
    model = trained_model(3)
    trainer = trainer_of(model, settings(tmp_path, distillation_weight=1.0))
    batch = trainer.data_collator([Mixed()[i] for i in range(2)])
    model.train()
    expected = trainer.compute_loss(model, batch)
    with compiled_blocks(model, backend="aot_eager"):
        assert ratio_of_norms(trainer.compute_loss(model, batch), expected) <= 1e-6


def test_train_compiles_if_asked(tmp_path, monkeypatch, counters):
    """Weights after some steps are those of training without, up to rounding."""
    monkeypatch.setattr(
        running_module, "compiled_blocks", lambda *a, **k: compiled_blocks(*a, **k, backend="aot_eager")
    )
    found = []
    for compiled in (False, True):
        model = fresh(tmp_path)
        train(model, settings(tmp_path / str(compiled), max_steps=3, compile_blocks=compiled), Mixed())
        found.append(parameters(model))
        assert bool(counters["stats"]["unique_graphs"]) is compiled
    for name, parameter in found[0].items():
        torch.testing.assert_close(found[1][name], parameter, rtol=0, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_real_compiler(checkpointing):
    model = trained_model(3)
    if checkpointing:
        model.gradient_checkpointing_enable()
    expected = [step(model, *how) for how in STEPS[:2]]
    with compiled_blocks(model):
        for how, wanted in zip(STEPS[:2], expected, strict=True):
            # norms and rotary tables of the base are in float32, which compiled code rounds in its own order
            assert_same(step(model, *how), wanted, bound=1e-5)
