# SPDX-License-Identifier: Apache-2.0
"""Gradients through long sequences: every engine against one graph of everything, and what it keeps in memory."""

import random
import weakref
from functools import partial

import pytest
import torch
from tiny import SEGMENT, ratio_of_norms, rcc_model, tokens
from torch import nn

from rcc_hf.objectives import IGNORED
from rcc_hf.training.engines import full, reservoir, truncated, two_pass
from rcc_hf.training.losses import HeadLoss
from rcc_hf.training.sequences import LongSequences

T = 7


class Toy:
    """Memories of random vectors, and a reader by attention; in float64."""

    def __init__(self, num_segments=T, dropout=0.0, at_a_time=1):
        torch.manual_seed(0)
        self.num_segments, self.at_a_time = num_segments, at_a_time
        self.writer = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 8)).double()
        self.reader = nn.Linear(8, 8).double()
        shape = (num_segments, 3, 8)
        self.texts, self.wanted, self.asked = (torch.randn(shape, dtype=torch.float64) for _ in range(3))

    def write(self, segments):
        # the first tensor depends on no weight, as embeddings do
        return [(self.texts[s], self.writer(self.texts[s])) for s in segments]

    def loss(self, segment, memories):
        plain, made = (torch.cat(layer) for layer in zip(*memories, strict=True))
        weights = torch.softmax(self.asked[segment] @ self.reader(made + plain).T, -1)
        return (weights @ made - self.wanted[segment]).pow(2).sum()

    def backward(self, loss):
        loss.backward()

    def gradients(self, engine):
        parameters = [*self.writer.parameters(), *self.reader.parameters()]
        for parameter in parameters:
            parameter.grad = None
        total = engine(self)
        return [torch.cat([p.grad.flatten() for p in part.parameters()]) for part in (self.writer, self.reader)], total


def test_two_passes_are_exact():
    for at_a_time in (1, 2, 4, 10):
        toy = Toy(at_a_time=at_a_time)
        expected, loss = toy.gradients(full)
        actual, total = toy.gradients(two_pass)
        assert ratio_of_norms(total, loss) <= 1e-14
        for one, other in zip(actual, expected, strict=True):
            assert ratio_of_norms(one, other) <= 1e-13


def test_dropout_is_the_same_in_both_passes():
    """The first pass of two draws what one graph of everything draws, and the second draws it again."""
    toy = Toy(dropout=0.5, at_a_time=T)
    found = []
    for engine in (full, two_pass):
        torch.manual_seed(3)
        found.append((*toy.gradients(engine), torch.rand(1)))
    (expected, loss, after), (actual, total, then) = found
    assert total == pytest.approx(loss.item(), rel=1e-13)
    assert ratio_of_norms(actual[0], expected[0]) <= 1e-13
    assert torch.equal(after, then)


@pytest.mark.parametrize("corrected", [False, True])
def test_a_reservoir_of_all_is_exact(corrected):
    toy = Toy()
    expected, _ = toy.gradients(full)
    for size in (T - 1, T, 3 * T):
        actual, _ = toy.gradients(partial(reservoir, size=size, generator=random.Random(1), corrected=corrected))
        for one, other in zip(actual, expected, strict=True):
            assert ratio_of_norms(one, other) <= 1e-13


@pytest.mark.parametrize("size", [1, 2])
def test_the_mean_of_reservoirs_is_the_gradient_with_the_factor_alone(size):
    toy, errors = Toy(), {}
    (expected, read), _ = toy.gradients(full)
    for corrected in (True, False):
        draws = []
        for seed in range(400):
            engine = partial(reservoir, size=size, generator=random.Random(seed), corrected=corrected)
            (written, reading), _ = toy.gradients(engine)
            assert ratio_of_norms(reading, read) <= 1e-13  # exact in every draw
            draws.append(written)
        stack = torch.stack(draws)
        error = (stack.mean(0) - expected).norm() / expected.norm()
        chance = (stack.std(0).norm() / len(draws) ** 0.5) / expected.norm()
        errors[corrected] = (float(error), float(chance))
    assert errors[True][0] < 3 * errors[True][1]
    assert errors[False][0] > 5 * errors[False][1]
    assert errors[False][0] > 0.2


def test_truncation_drops_what_is_older():
    toy = Toy()
    (expected, read), _ = toy.gradients(full)
    errors = []
    for size in (1, 3, T - 1, T):
        (written, reading), _ = toy.gradients(partial(truncated, size=size))
        assert ratio_of_norms(reading, read) <= 1e-13
        errors.append(ratio_of_norms(written, expected))
    assert errors[0] > errors[1] > 1e-3
    assert max(errors[2:]) <= 1e-13


class Saved:
    """Most bytes that graphs hold at a time."""

    def __init__(self):
        self.now = self.most = 0

    def __enter__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda box: box[0])
        self._hooks.__enter__()
        return self

    def __exit__(self, *error):
        self._hooks.__exit__(*error)

    def _pack(self, tensor):
        class Box(list):
            __hash__ = object.__hash__

        # an output that knows its graph, which holds the box, would never be let go
        box, size = Box([tensor.detach()]), tensor.numel() * tensor.element_size()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(box, self._free, size)
        return box

    def _free(self, size):
        self.now -= size


def long_sequences(model, num_segments, *, batch=2, ratio=None, at_a_time=1):
    ids = tokens(batch, num_segments * SEGMENT, seed=num_segments)
    labels = ids.clone()
    labels[:, :SEGMENT] = IGNORED
    scored = batch * (num_segments - 1) * (SEGMENT - 1)

    def loss_of(part):
        return HeadLoss(model.lm_head, list(model.lm_head.parameters()), part, num_items=scored)

    return LongSequences(
        model, ids, labels, ratio=ratio, loss_of=loss_of, propagate=torch.Tensor.backward, at_a_time=at_a_time
    )


def gradients(model, problem, engine):
    model.zero_grad(set_to_none=True)
    total = engine(problem)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, total


@pytest.mark.parametrize(
    ("options", "ratio"),
    [
        ({}, None),
        ({"spread_slots": True}, 8),
        ({"scheme_options": {"wiring": "add"}}, 4),
        ({"scheme": "uio", "scheme_options": {}}, 4),
    ],
    ids=["rcc", "spread", "add", "uio"],
)
def test_a_compressor_has_the_gradients_of_one_graph(options, ratio):
    model = rcc_model(**options)
    expected, loss = gradients(model, long_sequences(model, 4, ratio=ratio), full)
    assert any(".rcc.write." in name for name in expected)
    exact = {
        "two passes": two_pass,
        "reservoir": partial(reservoir, size=3, generator=random.Random(0)),
        "truncated": partial(truncated, size=3),
    }
    for name, engine in exact.items():
        problem = long_sequences(model, 4, ratio=ratio, at_a_time=2)
        actual, total = gradients(model, problem, engine)
        assert ratio_of_norms(total, loss) <= 1e-12, name
        assert problem.sums[3] == 2 * 3 * (SEGMENT - 1)
        assert actual.keys() == expected.keys(), name
        for key, gradient in expected.items():
            assert ratio_of_norms(actual[key], gradient) <= 1e-10, (name, key)


def test_layers_may_be_replayed():
    model = rcc_model()
    expected, _ = gradients(model, long_sequences(model, 4), full)
    model.train()
    model.gradient_checkpointing_enable()
    actual, _ = gradients(model, long_sequences(model, 4), two_pass)
    for name, gradient in expected.items():
        assert ratio_of_norms(actual[name], gradient) <= 1e-10, name


def test_the_loss_is_that_of_training_behind_a_context():
    """Of one segment behind two: what `model(local, context_ids=...)` gives."""
    model = rcc_model()
    problem = long_sequences(model, 3)
    ids = tokens(2, 3 * SEGMENT, seed=3)
    with torch.no_grad():
        loss = problem.loss(2, problem.write([0, 1]))
        logits = model(ids[:, 2 * SEGMENT :], context_ids=ids[:, : 2 * SEGMENT]).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 2 * SEGMENT + 1 :].flatten(), reduction="sum")
    assert ratio_of_norms(loss, expected / (2 * 2 * (SEGMENT - 1))) <= 1e-10


def test_two_passes_hold_no_more_of_a_longer_sequence():
    """But for the slots themselves, of which there is one a segment here."""
    model, most = rcc_model(), {}
    for name, engine in (("full", full), ("two passes", two_pass)):
        for num_segments in (3, 12):
            with Saved() as saved:
                gradients(model, long_sequences(model, num_segments, batch=1, ratio=SEGMENT), engine)
            most[name, num_segments] = saved.most
    assert most["full", 12] > 4 * most["full", 3]
    assert most["two passes", 12] < 1.1 * most["two passes", 3]


def test_sequences_that_cannot_be_taken_apart_are_refused(monkeypatch):
    model = rcc_model()
    for width in (SEGMENT, 2 * SEGMENT + 1):
        with pytest.raises(ValueError, match="two or more whole segments"):
            LongSequences(model, tokens(1, width), tokens(1, width), ratio=None, loss_of=None, propagate=None)
    ids = tokens(1, 2 * SEGMENT)
    monkeypatch.setattr(type(model.model.scheme), "independent_writes", False)
    with pytest.raises(ValueError, match="looking at those before it"):
        LongSequences(model, ids, ids, ratio=None, loss_of=None, propagate=None)
    monkeypatch.undo()
    model.config.head_length = 1
    with pytest.raises(ValueError, match="head_length 0"):
        LongSequences(model, ids, ids, ratio=None, loss_of=None, propagate=None)
