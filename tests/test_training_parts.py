# SPDX-License-Identifier: Apache-2.0
"""What of a model is trained, at which rate, and what a frozen part costs."""

import weakref

import pytest
import torch
from tiny import SEGMENT, rcc_model, tokens
from training_runs import Examples, Mixed, fresh, parameters, settings, trainer_of

from rcc_hf import RCCForCausalLM
from rcc_hf.training import choose_parts, parameter_groups, part_of, train


@pytest.mark.parametrize("parts", [["read"], ["write", "maps"], ["maps"], ["base"], ["write", "read", "maps", "base"]])
def test_what_is_chosen_changes_and_the_rest_does_not(tmp_path, parts):
    model = fresh(tmp_path)
    before = parameters(model)
    train(model, settings(tmp_path / "out", train_parts=parts), Examples())
    for name, after in parameters(model).items():
        assert torch.equal(before[name], after) != (part_of(name) in parts), name


def test_every_part_has_its_rate():
    model = rcc_model(scheme_options={"map_rank": None})
    how = settings("out", weight_decay=0.3, write_learning_rate=1.0, maps_learning_rate=2.0)
    choose_parts(model, how.train_parts)
    groups = {group["name"]: group for group in parameter_groups(model, how)}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "write": 1.0,
        "read": 1e-2,
        "maps without decay": 2.0,
    }
    assert [group["weight_decay"] for group in groups.values()] == [0.3, 0.3, 0.0]
    trained = {p for p in model.parameters() if p.requires_grad}
    assert {p for group in groups.values() for p in group["params"]} == trained
    maps = {layer.rcc.slot_map.weight for layer in model.model.language_model.layers}
    assert set(groups["maps without decay"]["params"]) == maps


def test_norms_of_a_trained_base_do_not_decay():
    model = rcc_model()
    how = settings("out", train_parts=["base"])
    choose_parts(model, how.train_parts)
    spared = {group["name"]: group for group in parameter_groups(model, how)}["base without decay"]["params"]
    norms = [p for name, p in model.named_parameters() if name.endswith("norm.weight")]
    assert set(spared) == set(norms)


def test_rates_reach_the_optimizer_and_its_schedule(tmp_path):
    model = rcc_model(dtype=torch.float32)
    trainer = trainer_of(model, settings(tmp_path, read_learning_rate=1e-4, warmup_steps=2), Mixed())
    trainer.create_optimizer_and_scheduler(6)
    rates = []
    for _ in range(3):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[0] == [0, 0, 0]
    assert rates[1] == pytest.approx([5e-3, 5e-5, 5e-3])
    assert rates[2] == pytest.approx([1e-2, 1e-4, 1e-2])


def states_and_graph(model):
    """Whether states of the compressor have a graph, and how many tensors of its pass are kept for backward."""
    kept, graphs = [], []
    write = model.model.scheme.write

    def spy(*args):
        state = write(*args)
        graphs.extend(tensor.requires_grad for tensor in state)
        return state

    model.model.scheme.write = spy
    ids = tokens(2, 5)

    def pack(tensor):
        kept.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, context_ids=tokens(2, 2 * SEGMENT), labels=ids).loss
    alive = [tensor for tensor in (reference() for reference in kept) if tensor is not None]
    written = sum(tensor.ndim == 3 and tensor.shape[:2] == (4, SEGMENT) for tensor in alive)
    loss.backward()
    del model.model.scheme.write
    return any(graphs), written


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_compressor_builds_no_graph(checkpointing):
    """Nothing of its pass is kept for backward: the second stage costs what decoding costs."""
    model = rcc_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    choose_parts(model, ["write", "read", "maps"])
    has_graph, kept = states_and_graph(model)
    assert has_graph
    assert kept
    choose_parts(model, ["read"])
    assert states_and_graph(model) == (False, 0)
    assert all((p.grad is not None) == (part_of(n) == "read") for n, p in model.named_parameters() if p.requires_grad)


def test_a_trained_base_is_saved_with_the_compressor_and_resumed(tmp_path):
    parts = ["write", "read", "maps", "base"]
    whole, half = fresh(tmp_path), fresh(tmp_path)
    train(whole, settings(tmp_path / "whole", train_parts=parts), Mixed())
    loaded = RCCForCausalLM.from_pretrained(tmp_path / "whole")
    for name, parameter in parameters(whole).items():
        assert torch.equal(parameters(loaded)[name], parameter), name
    train(half, settings(tmp_path / "half", train_parts=parts, max_steps=6), Mixed())
    resumed = fresh(tmp_path)
    (tmp_path / "half" / "checkpoint-6").rename(tmp_path / "gone")
    train(resumed, settings(tmp_path / "half", train_parts=parts, resume=True), Mixed())
    for name, parameter in parameters(resumed).items():
        assert torch.equal(parameters(whole)[name], parameter), name


def test_impossible_choices_are_errors():
    for changes, message in (
        ({"train_parts": ["reed"]}, r"reed.*write, read, maps, base"),
        ({"train_parts": []}, "one or more"),
        ({"base_learning_rate": 1e-5}, "no effect"),
        ({"read_learning_rate": -1.0}, "negative"),
        ({"schedule": "steps"}, "linear"),
        ({"distillation_temperature": 0.0}, "above 0"),
        ({"compile_static": True}, "no effect"),
        ({"train_parts": ["base"], "distillation_weight": 1.0}, "takes the frozen base for a teacher"),
    ):
        with pytest.raises(ValueError, match=message):
            settings("out", **changes)
    with pytest.raises(ValueError, match="ranks are 0"):
        choose_parts(rcc_model(scheme_options={"read_rank": 0}), ["read"])
    with pytest.raises(ValueError, match="no known part"):
        part_of("model.layers.0.rcc.gate.weight")
