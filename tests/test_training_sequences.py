# SPDX-License-Identifier: Apache-2.0
"""Training on long texts: by every engine as by one graph, among other batches, and from a recipe."""

import numpy as np
import pytest
import torch
from objective_data import counting, shape
from tiny import SEGMENT, ratio_of_norms, rcc_model, tokens
from training_runs import Long, fresh, parameters, settings

from rcc_hf.objectives import IGNORED, LongText, collate
from rcc_hf.training import train
from rcc_hf.training.flops import FlopsCounter


def trained(folder, **changes):
    """Weights, and the log without what takes time."""
    model = fresh(folder)
    metrics = train(model, settings(folder / "out", logging_steps=1, **changes), Long())
    return parameters(model), metrics["train_loss"]


@pytest.mark.parametrize(
    "how",
    [
        {"gradient_engine": "two-pass"},
        {"gradient_engine": "two-pass", "engine_segments": 1, "compile_blocks": False},
        {"gradient_engine": "reservoir", "engine_segments": 3},
        {"gradient_engine": "truncated", "engine_segments": 3},
    ],
    ids=lambda how: "-".join(map(str, how.values())),
)
def test_training_is_that_by_one_graph(tmp_path, how):
    (tmp_path / "full").mkdir()
    expected, loss = trained(tmp_path / "full", gradient_engine="full")
    actual, total = trained(tmp_path, **how)
    assert total == pytest.approx(loss, rel=1e-5)
    for name, weight in expected.items():
        assert ratio_of_norms(actual[name], weight) <= 1e-4, name


def test_a_small_reservoir_differs_and_goes_on_where_it_was_killed(tmp_path):
    how = {"gradient_engine": "reservoir", "engine_segments": 1}
    for name in ("full", "whole"):
        (tmp_path / name).mkdir()
    exact, _ = trained(tmp_path / "full", gradient_engine="full")
    whole, _ = trained(tmp_path / "whole", **how)
    key = next(name for name in whole if ".rcc.write." in name)
    assert ratio_of_norms(whole[key], exact[key]) > 1e-4
    model = fresh(tmp_path)
    model.load_compressor(str(tmp_path / "whole" / "out" / "checkpoint-3"))
    train(model, settings(tmp_path / "whole" / "out", logging_steps=1, resume=True, **how), Long())
    for name, weight in parameters(model).items():
        assert torch.equal(weight, whole[name]), name


def test_long_texts_without_an_engine_are_refused(tmp_path):
    with pytest.raises(ValueError, match="give gradient_engine, of full, truncated, two-pass, reservoir"):
        train(fresh(tmp_path), settings(tmp_path / "out"), Long())
    for wrong in ({"gradient_engine": "three"}, {"engine_segments": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            settings(tmp_path / "out", **wrong)


def test_a_long_text_predicts_all_but_its_first_segment_and_first_tokens():
    objective = LongText(counting(30))
    example = objective.example(np.random.default_rng(0), shape(3, 4, 2))
    ids = example["sequence_ids"].tolist()
    assert ids == list(range(ids[0], ids[0] + 12))
    expected = [IGNORED] * 5 + ids[5:8] + [IGNORED] + ids[9:]
    assert example["labels"].tolist() == expected
    with pytest.raises(ValueError, match="segments of 2 and more"):
        objective.example(np.random.default_rng(0), shape(1, 4, 2))
    batch = collate([example | {"ratio": 2, "objective": "long_text"}] * 2, pad_id=0)
    assert batch["sequence_ids"].tolist() == [ids, ids]
    assert batch["labels"].tolist() == [expected, expected]


def test_operations_of_a_long_text_are_those_of_its_segments():
    model = rcc_model()
    counter, ids = FlopsCounter(model), tokens(2, 3 * SEGMENT)
    written, *read = counter.works({"sequence_ids": ids, "labels": ids, "ratio": 4})
    assert (written.written, written.slots) == (2 * 2 * SEGMENT, 2 * 2 * SEGMENT // 4)
    assert [one.read for one in read] == [SEGMENT + SEGMENT // 4, SEGMENT + SEGMENT // 2]
    assert {one.predicted for one in read} == {2 * (SEGMENT - 1)}
    apart = counter.works({"context_ids": ids[:, :SEGMENT], "input_ids": ids[:, SEGMENT : 2 * SEGMENT], "ratio": 4})
    assert counter.count(read[0]) < counter.count(apart[0]) < counter.count(read[0]) + counter.count(written)
