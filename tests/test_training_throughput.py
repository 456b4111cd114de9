# SPDX-License-Identifier: Apache-2.0
"""How fast training is said to be: operations against those that torch counts, and what the log has."""

import time
from collections import Counter

import pytest
import torch
from tiny import SEGMENT, rcc_model, text_config, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from training_runs import Mixed, fresh, settings, trainer_of
from transformers import TrainerCallback

from rcc_hf.training import explain, train
from rcc_hf.training.flops import FlopsCounter, matmul_rate
from rcc_hf.training.parts import choose_parts
from rcc_hf.training.throughput import Throughput

LAYERS = 12


class Counting(TorchDispatchMode):
    """As torch's `FlopCounterMode`, which cannot stand gradients that are taken in forward."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        packet = function._overloadpacket
        if packet in flop_registry:
            self.found[packet.__name__] += flop_registry[packet](*args, **(kwargs or {}), out_val=output)
        return output


def counted(trainer, batch):
    """Operations of linear maps, and of attention, that are done."""
    with Counting() as counter:
        trainer.compute_loss(trainer.model, batch).backward()
    return counter.found["mm"], counter.found["bmm"]


@pytest.mark.parametrize(
    ("parts", "distillation"),
    [
        *(
            (parts, weight)
            for parts in (["write", "read", "maps"], ["read"], ["read", "maps"])
            for weight in (0.0, 1.0)
        ),
        (["write", "read", "base"], 0.0),  # a base that is trained is no teacher
    ],
)
def test_operations_are_those_that_torch_counts(tmp_path, parts, distillation):
    """But for the first and last layers, whose work is a little less, and masks, which attention does not skip here."""
    shape = text_config(num_hidden_layers=LAYERS, hidden_size=64, intermediate_size=160)
    model = rcc_model(text_config=shape, attn="eager", dtype=torch.float32, window=64)
    trainer = trainer_of(model, settings(tmp_path, train_parts=parts, distillation_weight=distillation))
    model.train()
    batch = trainer.data_collator([Mixed(segments=(3, 3))[i] for i in range(4)])
    if not distillation:
        batch = {name: value for name, value in batch.items() if not name.startswith("teacher")}
    counter = FlopsCounter(model)
    linear, attention = counted(trainer, batch)
    everything = sum(map(counter.count, counter.works(batch)))
    without = FlopsCounter(model)
    without.attention = 0
    expected = sum(map(without.count, without.works(batch)))
    assert linear == pytest.approx(expected, rel=2 / LAYERS if parts != ["read"] else 0.05)
    assert attention / 2 == pytest.approx(everything - expected, rel=2 / LAYERS)


def test_work_of_a_batch_with_a_tail_and_a_head():
    model = rcc_model(head_length=3)
    (work,) = FlopsCounter(model).works(
        {"context_ids": tokens(2, 3 + 2 * SEGMENT + 5), "input_ids": tokens(2, 7), "ratio": 8}
    )
    assert work.written == 2 * 2 * SEGMENT
    assert work.slots == 2 * 2 * 2
    assert work.read == 3 + 4 + 5 + 7
    assert (work.rows, work.predicted, work.taught) == (2, 14, 0)


class Lines(TrainerCallback):
    def __init__(self):
        self.lines = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append(logs)


def test_the_log_has_speed_losses_and_accuracy(tmp_path):
    look = Lines()
    how = settings(tmp_path / "out", logging_steps=1, ceiling_tflops=0.1, distillation_weight=1.0, max_steps=4)
    train(fresh(tmp_path), how, Mixed(), Mixed(8), callbacks=[look])
    lines = [line for line in look.lines if "loss" in line]
    assert len(lines) == 4
    for line in look.lines:
        for name in line:
            assert explain(name)
    for line, kind in zip(lines, ("copy", "tell", "copy", "tell"), strict=True):
        # without the objective's name the means are over all of them, and here is one
        assert line["cross_entropy"] == line[f"cross_entropy_{kind}"]
        assert line["loss"] == pytest.approx(line["cross_entropy"] + line["distillation"], rel=1e-4)
        assert 0 <= line[f"token_accuracy_{kind}"] <= 1
        assert line["ceiling_share"] == pytest.approx(line["tflops_per_device"] / 0.1)
        source = SEGMENT * (1 if kind == "copy" else 2)
        assert line["tokens_per_second"] / line["source_tokens_per_second"] == pytest.approx((source + 9) / source)
        assert "peak_memory_gib" not in line


def test_pauses_do_not_count():
    model = rcc_model()
    choose_parts(model, ["read"])
    throughput = Throughput(model)
    assert throughput.take() == {}
    throughput.begin()
    throughput.count({"input_ids": tokens(1, 10), "context_ids": tokens(1, SEGMENT)})
    time.sleep(0.05)
    with throughput.paused():
        time.sleep(0.5)
    assert SEGMENT / 0.4 < throughput.take()["source_tokens_per_second"] < SEGMENT / 0.05


def test_a_rate_of_matrix_products():
    assert 1e6 < matmul_rate(torch.device("cpu"), size=64, dtype=torch.float32, repeats=2) < 1e13
