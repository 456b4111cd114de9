# SPDX-License-Identifier: Apache-2.0
"""How many labelled tokens were predicted."""

from torch import Tensor

from rcc_hf.objectives.base import IGNORED

__all__ = ["token_accuracy"]


def token_accuracy(predictions: Tensor, labels: Tensor) -> float:
    """The share of labelled tokens that were predicted, each from the true tokens before it.

    Args:
        predictions: `[B, T]`, the most likely next token at each position.
        labels: `[B, T]`, -100 where nothing is asked.

    Raises:
        ValueError: if no token is labelled.
    """
    predicted, expected = predictions[:, :-1], labels[:, 1:]
    asked = expected != IGNORED
    if not asked.any():
        raise ValueError("no token is labelled, so there is no accuracy; labels must hold token ids behind -100s")
    return (predicted == expected)[asked].double().mean().item()
