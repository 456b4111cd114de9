# SPDX-License-Identifier: Apache-2.0
"""Phases, the mixture, and batches."""

from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from objective_data import counting, same
from tiny import SEGMENT, rcc_model
from torch.utils.data import DataLoader

from rcc_hf.objectives import IGNORED, Continuation, Mixture, Phase, Phases, Reconstruction, collate
from rcc_hf.texts import TokenShards

SHARDS = counting(300, 200)
OBJECTIVES = {
    "rebuild": Reconstruction(SHARDS, prompt_ids=[1, 2], end_id=9, pad_share=0.5),
    "go on": Continuation(SHARDS, local_length=7, distill=True),
}
CURRICULUM = """
- until: 0.25
  ratios: 4
  segments: [1]
  objectives: rebuild
- until: 1
  ratios: {2: 1, "4": 3}
  segments: {1: 0.5, 3: 1.5}
  objectives: {rebuild: 1, go on: 4}
"""


def mixture(phases=None, **changes):
    values = {"seed": 5, "num_steps": 200, "examples_per_step": 8, "group_size": 4, "segment_length": 16}
    return Mixture(OBJECTIVES, phases or Phases.parse(yaml.safe_load(CURRICULUM)), **values | changes)


def test_an_example_depends_on_seed_and_index_alone():
    one, other = mixture(), mixture()
    backwards = {i: other[i] for i in reversed(range(0, len(other), 37))}
    assert all(same(one[i], example) for i, example in backwards.items())
    assert not all(same(one[i], mixture(seed=6)[i]) for i in range(0, 400, 37))
    assert not same(one[3], one[2])


def test_the_number_of_workers_changes_nothing():
    data = mixture(num_steps=4)
    loaded = DataLoader(data, batch_size=None, num_workers=2)
    assert all(same(example, data[i]) for i, example in enumerate(loaded))


def test_a_group_shares_what_its_shapes_depend_on():
    data, kinds = mixture(), set()
    for start in range(0, len(data), 4):
        examples = [data[i] for i in range(start, start + 4)]
        kind = {(e["objective"], e["ratio"], len(e["context_ids"])) for e in examples}
        assert len(kind) == 1
        kinds |= kind
        assert len({tuple(e["context_ids"].tolist()) for e in examples}) > 1
    assert len(kinds) == 8  # of the second phase, the only kind of the first among them


def test_frequencies_are_the_weights():
    data, phase_starts = mixture(num_steps=2000), 500 * 8
    plans = [data.plan(i) for i in range(phase_starts, len(data), 4)]
    count = len(plans)
    objectives = Counter(name for name, _ in plans)
    segments, ratios = Counter(s.num_segments for _, s in plans), Counter(s.ratio for _, s in plans)
    assert objectives["go on"] / count == pytest.approx(0.8, abs=0.03)
    assert segments[3] / count == pytest.approx(0.75, abs=0.03)
    assert ratios[4] / count == pytest.approx(0.75, abs=0.03)


def test_an_objective_has_ratios_and_numbers_of_segments_of_its_own():
    phase = {"ratios": 4, "segments": 1, "objectives": ["go on", "rebuild"], "segments_of": {"go on": {"2": 1, 3: 1}}}
    data = mixture(Phases.parse(phase | {"ratios_of": {"rebuild": {"2": 1, 8: 1}}}), num_steps=200)
    found = {(name, shape.num_segments, shape.ratio) for name, shape in map(data.plan, range(0, len(data), 4))}
    assert found == {("rebuild", 1, 2), ("rebuild", 1, 8), ("go on", 2, 4), ("go on", 3, 4)}
    with pytest.raises(ValueError, match="phase 1: ratios 3 do not divide"):
        Phases.parse(phase | {"ratios_of": {"rebuild": 3}}).check(8, ["go on", "rebuild"])


def test_the_curriculum_switches_where_it_says():
    data = mixture()
    first = [data.plan(i) for i in range(50 * 8)]
    assert {(name, s.num_segments, s.ratio) for name, s in first} == {("rebuild", 1, 4)}
    then = [data.plan(i) for i in range(50 * 8, 60 * 8)]
    assert len({(name, s.num_segments, s.ratio) for name, s in then}) > 3


def test_contexts_are_whole_segments():
    data = mixture()
    for i in range(0, len(data), 13):
        _, planned = data.plan(i)
        assert len(data[i]["context_ids"]) == planned.num_segments * 16


def test_the_length_and_what_is_beyond_it():
    data = mixture(num_steps=3)
    assert len(data) == 24
    for index in (24, -1):
        with pytest.raises(IndexError, match="24 examples"):
            data[index]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 3}, "group_size=3 does not divide examples_per_step=8"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"segment_length": 18}, r"phase 1: ratios 4 do not divide segment_length=18"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_mixture_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        mixture(**changes)


def test_an_unknown_objective_is_named_with_those_that_there_are():
    with pytest.raises(ValueError, match="phase 1: there is no objective guess; there are rebuild, go on"):
        mixture(Phases.parse({"ratios": 4, "segments": 1, "objectives": {"guess": 1, "rebuild": 1}}))


FINE = {"ratios": [4], "segments": [1], "objectives": ["x"]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "give a list of mappings"),
        ("x", "give a list of mappings"),
        ([3], "phase 1: expected a mapping"),
        ({"ratios": [4], "segments": [1]}, "phase 1: no field unknown, objectives missing"),
        (FINE | {"rate": 1}, "phase 1: rate unknown, no field missing"),
        (FINE | {"ratios": {4: -1}}, "ratios: the weight of 4 is -1; it must be a positive number"),
        (FINE | {"ratios": {4: "much"}}, "ratios: the weight of 4 is 'much'"),
        (FINE | {"segments": {0: 1}}, "segments: 0 must be at least 1"),
        (FINE | {"segments": ["two"]}, "segments: 'two' is no whole number"),
        (FINE | {"objectives": {}}, "objectives are empty"),
        (FINE | {"segments_of": 3}, "segments_of is 3; give weights"),
        (FINE | {"ratios_of": {"y": 2}}, "ratios_of names y; the phase draws x"),
        (FINE | {"segments_of": {"x": {0: 1}}}, "segments_of x: 0 must be at least 1"),
        (FINE | {"segments_of": {"y": 2}}, "segments_of names y; the phase draws x"),
        (FINE | {"until": 0.5}, "phases end at 0.5; the last one must have until: 1"),
        (FINE | {"until": 1.5}, "phase 1: until is 1.5"),
        ([FINE | {"until": 0.5}, FINE | {"until": 0.5}, FINE], "phases end at 0.5, 0.5, 1.0; each must end after"),
    ],
)
def test_phases_that_cannot_be(data, message):
    with pytest.raises(ValueError, match=message):
        Phases.parse(data)


def test_phases_from_a_file_and_from_code_are_alike():
    found = Phases.parse(yaml.safe_load(CURRICULUM))
    first = Phase(until=0.25, ratios={4: 1.0}, segments={1: 1.0}, objectives={"rebuild": 1.0})
    assert len(found) == 2
    assert found[0] == first
    assert found[1].ratios == {2: 1, 4: 3}
    assert found.at(0.2499) is found[0]
    assert found.at(0.25) is found[1]
    assert found.at(1.0) is found[1]


def rows(*lengths):
    """Examples of so many context and local tokens, the last two of which are labelled."""
    made = []
    for context, local in lengths:
        ids = torch.arange(1, local + 1)
        labels = torch.where(ids > local - 2, ids, IGNORED)
        made.append(
            {"context_ids": torch.arange(1, context + 1), "input_ids": ids, "labels": labels, "ratio": 4,
             "objective": "x"}
        )  # fmt: skip
    return made


def test_a_batch_is_padded_on_the_right():
    batch = collate(rows((4, 3), (4, 5)), pad_id=99)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 99, 99], [1, 2, 3, 4, 5]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3, IGNORED, IGNORED], [IGNORED, IGNORED, IGNORED, 4, 5]]
    assert "attention_mask" not in batch
    assert batch["context_ids"].tolist() == [[1, 2, 3, 4]] * 2
    assert "context_mask" not in batch
    assert (batch["ratio"], batch["objective"]) == (4, "x")


def test_ragged_contexts_and_masks_of_contexts_are_kept():
    batch = collate(rows((2, 3), (4, 3)), pad_id=99)
    assert batch["context_ids"].tolist() == [[1, 2, 99, 99], [1, 2, 3, 4]]
    assert batch["context_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    first, second = rows((4, 3), (4, 3))
    masked = collate([first | {"context_mask": torch.tensor([0, 1, 1, 1])}, second], pad_id=99)
    assert masked["context_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]


def test_teachers_are_padded_and_agree_with_their_students():
    data = mixture(Phases.parse({"ratios": 4, "segments": 2, "objectives": "go on"}))
    batch = collate([data[i] for i in range(4)], pad_id=0)
    assert batch["teacher_ids"].shape == batch["teacher_labels"].shape == (4, 39)
    for student, teacher in zip(batch["labels"], batch["teacher_labels"], strict=True):
        # what is left after the shift of the model, where the first place has no prediction
        student, teacher = student[1:], teacher[1:]
        assert student[student != IGNORED].tolist() == teacher[teacher != IGNORED].tolist()
        assert (student != IGNORED).sum() == 6


def test_a_batch_trains_a_model():
    tokens = TokenShards.of_documents([np.arange(3, 127)])
    objectives = {"rebuild": Reconstruction(tokens, prompt_ids=[1, 2], end_id=2, pad_share=0.5)}
    phases = Phases.parse({"ratios": 2, "segments": 2, "objectives": "rebuild"})
    data = Mixture(objectives, phases, seed=0, num_steps=1, examples_per_step=4, group_size=4, segment_length=SEGMENT)
    batch = collate([data[i] for i in range(4)], pad_id=0)
    assert len({len(data[i]["input_ids"]) for i in range(4)}) > 1
    del batch["objective"]
    loss = rcc_model()(**batch).loss
    alone = [rcc_model()(**{k: v for k, v in collate([data[i]], 0).items() if k != "objective"}) for i in range(4)]
    counts = [int((data[i]["labels"] != IGNORED).sum()) for i in range(4)]
    expected = sum(a.loss * n for a, n in zip(alone, counts, strict=True)) / sum(counts)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(("length", "width"), [(5, 32), (33, 64), (128, 128), (129, 136)])
def test_lengths_are_rounded_up(length, width):
    """Short ones more coarsely, for few shapes."""
    batch = collate(rows((4, 3), (4, length)), pad_id=99, multiple=8)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, width)
    assert batch["context_ids"].shape == (2, 4)


@pytest.mark.parametrize(("length", "width"), [(5, 20), (20, 20), (25, 25)])
def test_lengths_are_not_rounded_beyond_what_there_is(length, width):
    batch = collate(rows((4, 3), (4, length)), pad_id=99, multiple=8, most=20)
    assert batch["input_ids"].shape == (2, width)


def test_examples_that_do_not_belong_together():
    one, two = rows((4, 3), (4, 3))
    with pytest.raises(ValueError, match=r"different values of ratio: 2, 4.*group_size"):
        collate([one, two | {"ratio": 2}], pad_id=0)
    with pytest.raises(ValueError, match="different values of objective: x, y"):
        collate([one, two | {"objective": "y"}], pad_id=0)
    with pytest.raises(ValueError, match="different keys"):
        collate([one, two | {"teacher_ids": torch.ones(2)}], pad_id=0)
    with pytest.raises(ValueError, match="no example"):
        collate([], pad_id=0)
