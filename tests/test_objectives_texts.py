# SPDX-License-Identifier: Apache-2.0
"""Reconstruction and continuation against examples worked by hand, and accuracy."""

import numpy as np
import pytest
import torch
from evaluating import byte_tokenizer
from objective_data import EOS, counting, labelled, shape

from rcc_hf.evaluation.passages import ReconstructionEncoder
from rcc_hf.evaluation.passages import reconstruction_example as evaluated
from rcc_hf.objectives import (
    IGNORED,
    Continuation,
    PassageReconstruction,
    Reconstruction,
    Shape,
    build_example,
    reconstruction_example,
    token_accuracy,
)
from rcc_hf.texts import TokenShards


def draws(objective, count=60, of=None):
    return [objective.example(np.random.default_rng([7, i]), of or shape(2, 4, 2)) for i in range(count)]


def test_reconstruction_asks_for_every_context_token_and_for_none_of_the_prompt():
    context = torch.tensor([5, 6, 7, 8])
    example = reconstruction_example(context, [1, 2])
    assert example["context_ids"].tolist() == [5, 6, 7, 8]
    assert example["input_ids"].tolist() == [1, 2, 5, 6, 7, 8]
    assert example["labels"].tolist() == [IGNORED, IGNORED, 5, 6, 7, 8]


def test_the_whole_context_and_an_end_are_predicted():
    for example in draws(Reconstruction(counting(8), prompt_ids=[1, 2], end_id=9)):
        text = list(range(1000, 1008))
        assert example["context_ids"].tolist() == text
        assert example["input_ids"].tolist() == [1, 2, *text, 9]
        assert example["labels"].tolist() == [IGNORED, IGNORED, *text, 9]


def test_only_the_beginning_of_a_long_context_is_predicted_and_no_end():
    example = draws(Reconstruction(counting(8), prompt_ids=[1], end_id=9, max_target=3), 1)[0]
    assert example["labels"].tolist() == [IGNORED, 1000, 1001, 1002]
    assert len(example["context_ids"]) == 8
    whole = draws(Reconstruction(counting(8), prompt_ids=[1], end_id=9, max_target=8), 1)[0]
    assert whole["labels"].tolist() == [IGNORED, *range(1000, 1008), 9]


def test_contexts_are_windows_of_one_document_and_all_of_them_come_up():
    objective = Reconstruction(counting(3, 10, 9), prompt_ids=[1], end_id=9)
    found = {example["context_ids"][0].item() for example in draws(objective, 200)}
    assert found == {2000, 2001, 2002, 3000, 3001}


def test_a_padded_segment_is_that_of_evaluation():
    letters, text = byte_tokenizer(), "abcdefghijkl"
    shards = TokenShards.of_documents([letters(text)["input_ids"]])
    objective = Reconstruction(shards, prompt_ids=[3], end_id=EOS, pad_share=1.0)
    seen = set()
    for example in draws(objective, 40, shape(3, 4, 2)):
        target = labelled(example)
        assert target[-1] == EOS
        written = letters.decode(target[:-1])
        assert len(written) in (9, 10, 11)
        made = evaluated(written, letters, 4, "Repeat:", tail="pad")
        read, _ = ReconstructionEncoder(letters, [3])(made)  # which the method fills up
        assert torch.equal(example["context_ids"], torch.cat([read, read.new_full((12 - len(read),), EOS)]))
        assert made.answer == written
        seen.add(len(written))
    assert seen == {9, 10, 11}


def test_the_share_of_padded_segments():
    objective = Reconstruction(counting(8), prompt_ids=[1], end_id=9, pad_share=0.25)
    padded = sum(example["context_ids"][-1].item() == 9 for example in draws(objective, 400))
    assert 70 < padded < 130


def test_a_piece_of_the_context_is_shown_and_its_continuation_predicted():
    objective = PassageReconstruction(counting(64), target_length=5, min_shown=2, max_shown=4, cue_ids=[3])
    starts, sizes = set(), set()
    for example in draws(objective, 300, shape(4, 16, 2)):
        assert example["input_ids"][0] == 3
        shown = len(example["input_ids"]) - 5 - 1
        begin = example["input_ids"][1].item()
        assert example["input_ids"][1:].tolist() == list(range(begin, begin + shown + 5))
        assert example["labels"].tolist() == [IGNORED] * (1 + shown) + list(range(begin + shown, begin + shown + 5))
        starts.add(begin - 1000)
        sizes.add(shown)
    assert sizes == {2, 3, 4}
    assert min(starts) == 0
    assert max(starts) == 64 - 5 - 2


def test_several_pieces_stand_one_behind_the_other():
    objective = PassageReconstruction(counting(64), num_pieces=3, target_length=5, min_shown=2, max_shown=2)
    begins = set()
    for example in draws(objective, 30, shape(4, 16, 2)):
        for ids, labels in zip(example["input_ids"].split(7), example["labels"].split(7), strict=True):
            begin = ids[0].item()
            assert ids.tolist() == list(range(begin, begin + 7))
            assert labels.tolist() == [IGNORED] * 2 + ids[2:].tolist()
            begins.add(begin)
    assert len(begins) > 20


def test_a_target_ends_with_the_context_and_a_piece_must_fit():
    objective = PassageReconstruction(counting(8), target_length=50, min_shown=3, max_shown=3)
    assert draws(objective, 1)[0]["labels"].tolist() == [IGNORED] * 3 + list(range(1003, 1008))
    with pytest.raises(ValueError, match="lower max_shown"):
        draws(PassageReconstruction(counting(8), min_shown=8, max_shown=8), 1)


def test_a_continuation_follows_its_context_and_its_first_token_is_given():
    example = draws(Continuation(counting(11), local_length=3), 1)[0]
    assert example["context_ids"].tolist() == list(range(1000, 1008))
    assert example["input_ids"].tolist() == [1008, 1009, 1010]
    assert example["labels"].tolist() == [IGNORED, 1009, 1010]
    assert "teacher_ids" not in example


def test_the_teacher_reads_the_context_raw():
    example = draws(Continuation(counting(11), local_length=3, distill=True), 1)[0]
    assert example["teacher_ids"].tolist() == list(range(1000, 1011))
    assert example["teacher_labels"].tolist() == [IGNORED] * 9 + [1009, 1010]


def test_nothing_to_predict_is_an_error():
    with pytest.raises(ValueError, match="no token to predict"):
        build_example([1, 2], [([3], True)])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Reconstruction(counting(8), prompt_ids=[1], end_id=9, pad_share=2),
        lambda: Reconstruction(counting(8), prompt_ids=[1], end_id=9, max_target=0),
        lambda: PassageReconstruction(counting(8), min_shown=9, max_shown=3),
        lambda: PassageReconstruction(counting(8), num_pieces=0),
        lambda: Continuation(counting(8), local_length=1),
        lambda: Shape(num_segments=1, segment_length=6, ratio=4),
        lambda: Shape(num_segments=0, segment_length=6, ratio=3),
    ],
)
def test_numbers_out_of_range_are_errors(make):
    with pytest.raises(ValueError, match=r"must|divide"):
        make()


def test_documents_that_are_too_short_are_named():
    with pytest.raises(ValueError, match="no document has 8 tokens, the longest has 7"):
        draws(Reconstruction(counting(7), prompt_ids=[1], end_id=9), 1)


def test_token_accuracy_against_a_hand_worked_example():
    # position t predicts token t + 1; labels 9, 4, 7 are asked, and the first two are hit
    labels = torch.tensor([[IGNORED, 9, 4, 7]])
    predictions = torch.tensor([[9, 4, 0, 7]])
    assert token_accuracy(predictions, labels) == pytest.approx(2 / 3)


def test_token_accuracy_without_labels_is_an_error():
    with pytest.raises(ValueError, match="no token is labelled"):
        token_accuracy(torch.zeros(1, 3), torch.full((1, 3), IGNORED))
