# SPDX-License-Identifier: Apache-2.0
"""Recorded steps: what they compute, when they are recorded, and what is not. Without a GPU, a recording is a call."""

import pytest
import torch
from tiny import SEGMENT, ratio_of_norms, rcc_model, tokens
from training_runs import Mixed, fresh, parameters, settings

from rcc_hf.training import running as running_module
from rcc_hf.training import train
from rcc_hf.training import trainer as trainer_module
from rcc_hf.training.batches import Batches
from rcc_hf.training.graphs import FlatGradients, StepGraphs, can_record, causal_attention, check_recordable
from rcc_hf.training.losses import predicting_places


class Calls:
    """Stands for CUDA graphs: "records" a function by keeping it, and calls it when it is replayed."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, run):
        self.recorded += 1

        def replay():
            self.replayed += 1
            run()

        return replay


@pytest.fixture
def recorder(monkeypatch):
    calls = Calls()
    monkeypatch.setattr(trainer_module, "CudaRecorder", lambda parameters: calls)
    monkeypatch.setattr(running_module, "check_recordable", lambda model: None)
    return calls


def weights():
    return [torch.nn.Parameter(torch.tensor([2.0, 3.0])), torch.nn.Parameter(torch.tensor([[1.0]]))]


def compute_with(found):
    def compute(batch, num_items):
        loss = (batch["x"] * found[0]).sum() / num_items
        return loss, torch.stack([loss.detach(), num_items.float(), batch["x"].sum(), torch.zeros(())])

    return compute


def test_replays_read_new_batches_and_add_up():
    found, calls = weights(), Calls()
    gradients = FlatGradients(found)
    graphs = StepGraphs(compute_with(found), gradients, calls, warmups=1)
    gradients.attach()
    kept = [graphs.run({"x": torch.tensor([1.0, i])}, torch.tensor(i + 1)) for i in range(4)]
    assert (calls.recorded, calls.replayed) == (1, 3)
    for i, (loss, sums) in enumerate(kept):  # a later replay has not changed them
        assert loss.item() == pytest.approx((2 + 3 * i) / (i + 1))
        assert sums.tolist() == pytest.approx([(2 + 3 * i) / (i + 1), i + 1, 1 + i, 0])
    expected = [sum(1 / (i + 1) for i in range(4)), sum(i / (i + 1) for i in range(4))]
    assert found[0].grad.tolist() == pytest.approx(expected)
    assert found[1].grad.tolist() == [[0.0]]  # not in the graph
    for parameter in found:
        parameter.grad = None
    gradients.attach()
    graphs.run({"x": torch.tensor([1.0, 2.0])}, torch.tensor(1))
    assert found[0].grad.tolist() == [1.0, 2.0]


def test_each_shape_and_value_is_recorded_for_itself_up_to_a_limit():
    found, calls = weights(), Calls()
    graphs = StepGraphs(compute_with(found), FlatGradients(found), calls, warmups=0, limit=2)
    one = torch.tensor(1)
    graphs.run({"x": torch.ones(2), "ratio": 4}, one)
    graphs.run({"x": torch.ones(2), "ratio": 4}, one)
    assert graphs.num_recorded == 1
    graphs.run({"x": torch.ones(2), "ratio": 8}, one)
    graphs.run({"x": torch.ones(2, 2), "ratio": 8}, one)
    graphs.run({"x": torch.ones(2), "ratio": 2}, one, record=False)
    assert (graphs.num_recorded, calls.replayed) == (2, 3)


def test_gradients_are_of_one_kind():
    found = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))]
    with pytest.raises(ValueError, match="one dtype on one device"):
        FlatGradients(found)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_is_the_same(tmp_path, recorder, accumulation):
    found, graphs = [], settings(tmp_path).cuda_graphs
    assert graphs is False
    for recorded in (False, True):
        model = fresh(tmp_path)
        how = settings(tmp_path / str(recorded), max_steps=8, cuda_graphs=recorded, accumulation_steps=accumulation)
        metrics = train(model, how, Mixed(size=8 * 4 * accumulation), collate=Batches().collate)
        found.append((parameters(model), metrics["train_loss"]))
    assert recorder.recorded == 2  # two kinds of batch, after two that ran as usual
    assert recorder.replayed == 8 * accumulation - 2 * 2
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)
    for name, parameter in found[0][0].items():
        assert ratio_of_norms(found[1][0][name], parameter) <= 1e-4, name


def test_a_base_is_trained_the_same(tmp_path, recorder):
    """With what is left of its compressor, in float32 with products in bfloat16."""
    found, ranks = [], {"write_rank": 0, "read_rank": 0}
    for recorded in (False, True):
        model = fresh(tmp_path, torch.bfloat16, scheme_options=ranks)
        how = {"cuda_graphs": recorded, "train_parts": ["maps", "base"], "base_learning_rate": 1e-3, "bf16": True}
        train(model, settings(tmp_path / str(recorded), max_steps=8, **how), Mixed(), collate=Batches().collate)
        found.append(parameters(model))
    assert recorder.replayed
    for name, parameter in found[0].items():
        assert parameter.dtype == torch.bfloat16
        assert ratio_of_norms(found[1][name], parameter) <= 1e-2, name


def test_a_teacher_is_imitated_the_same(tmp_path, recorder):
    """A recorded batch has places added, which must not be imitated either."""
    found = []
    for recorded in (False, True):
        model = fresh(tmp_path)
        how = settings(tmp_path / str(recorded), max_steps=8, cuda_graphs=recorded, distillation_weight=1.0)
        metrics = train(model, how, Mixed())
        found.append((parameters(model), metrics["train_loss"]))
    assert recorder.replayed
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)
    for name, parameter in found[0][0].items():
        assert ratio_of_norms(found[1][0][name], parameter) <= 1e-4, name


def batch_for(segments=1, local=6, **more):
    return {"context_ids": tokens(2, segments * SEGMENT), "input_ids": tokens(2, local), "ratio": 4} | more


def test_what_can_be_recorded():
    model = rcc_model()
    assert can_record(model, batch_for())
    assert can_record(model, batch_for(segments=2))
    assert not can_record(model, batch_for(context_mask=torch.ones(2, SEGMENT)))
    assert can_record(model, batch_for(teacher_ids=tokens(2, model.config.max_positions)))
    assert not can_record(model, batch_for(teacher_ids=tokens(2, model.config.max_positions + 1)))
    assert not can_record(model, batch_for(teacher_ids=tokens(2, 5), teacher_mask=torch.ones(2, 5)))
    assert not can_record(model, {"input_ids": tokens(2, 5)})
    assert not can_record(model, {**batch_for(), "context_ids": tokens(2, SEGMENT - 1)})
    assert not can_record(model, batch_for(local=model.config.max_positions))
    model.config.head_length = 1
    assert not can_record(model, batch_for())
    model.config.head_length, model.config.spread_slots = 0, True
    assert can_record(model, batch_for(local=model.config.max_positions - SEGMENT))
    assert not can_record(model, batch_for(local=model.config.max_positions - SEGMENT + 1))
    model.config.text_config.sliding_window = SEGMENT - 1
    assert not can_record(model, batch_for())


@pytest.mark.parametrize("options", [{}, {"spread_slots": True}, {"scheme": "uio"}], ids=str)
def test_attention_without_masks_is_the_same(options):
    """A scheme that has a mask of its own keeps it."""
    model = rcc_model(dtype=torch.float32, **options)
    model.train()
    batch = batch_for(segments=2)
    expected = model(**batch).logits
    with causal_attention(model):
        actual = model(**batch).logits
    assert torch.equal(actual, expected)
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_other_attention_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = rcc_model()
    check_recordable(model)
    model.model.language_model.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="attn_implementation sdpa, and this one has eager"):
        check_recordable(model)


def test_rotary_positions_that_look_at_lengths_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = rcc_model()
    model.config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    check_recordable(model)
    for scaled in ({"rope_type": "dynamic"}, {"full_attention": {"rope_type": "longrope"}}):
        model.config.text_config.rope_parameters = scaled
        with pytest.raises(ValueError, match=r"rope_type (dynamic|longrope)"):
            check_recordable(model)


def test_no_device_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        train(fresh(tmp_path), settings(tmp_path / "out", cuda_graphs=True), Mixed())


def test_replayed_layers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="exclude each other"):
        settings(tmp_path, cuda_graphs=True, gradient_checkpointing=True)


def test_added_places_predict_nothing():
    labels = torch.tensor([[-100, 5, 6], [-100, -100, 7]])
    assert predicting_places(labels).tolist() == [0, 1, 4]
    assert predicting_places(labels, 4).tolist() == [0, 1, 4, 2]
