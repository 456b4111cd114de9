# SPDX-License-Identifier: Apache-2.0
"""Examples for training, and the accuracy that is reported."""

import pytest
import torch

from rcc_hf.objectives import IGNORED, reconstruction_example, token_accuracy


def test_reconstruction_asks_for_every_context_token_and_for_none_of_the_prompt():
    context = torch.tensor([5, 6, 7, 8])
    example = reconstruction_example(context, [1, 2])
    assert example["context_ids"].tolist() == [5, 6, 7, 8]
    assert example["input_ids"].tolist() == [1, 2, 5, 6, 7, 8]
    assert example["labels"].tolist() == [IGNORED, IGNORED, 5, 6, 7, 8]


def test_token_accuracy_against_a_hand_worked_example():
    # position t predicts token t + 1; labels 9, 4, 7 are asked, and the first two are hit
    labels = torch.tensor([[IGNORED, 9, 4, 7]])
    predictions = torch.tensor([[9, 4, 0, 7]])
    assert token_accuracy(predictions, labels) == pytest.approx(2 / 3)


def test_token_accuracy_without_labels_is_an_error():
    with pytest.raises(ValueError, match="no token is labelled"):
        token_accuracy(torch.zeros(1, 3), torch.full((1, 3), IGNORED))
