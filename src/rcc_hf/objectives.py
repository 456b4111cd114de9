# SPDX-License-Identifier: Apache-2.0
"""What the compressor is trained for, as examples: a context, local tokens, and labels."""

from collections.abc import Sequence

import torch
from torch import Tensor

IGNORED = -100
"""The label of tokens that are not predicted."""

RECONSTRUCTION_PROMPT = "\n\nRepeat the text above:\n"


def reconstruction_example(context_ids: Tensor, prompt_ids: Sequence[int]) -> dict[str, Tensor]:
    """Full auto-encoding: behind the compressed context and a prompt, every token of the context is predicted.

    Args:
        context_ids: `[N]`, whole segments.
        prompt_ids: the prompt `[P]` that asks for it (`RCCConfig.reconstruction_prompt_ids`).

    Returns:
        `context_ids` `[N]`, `input_ids` and `labels` `[P + N]`.
    """
    prompt = torch.tensor(list(prompt_ids), dtype=context_ids.dtype)
    return {
        "context_ids": context_ids,
        "input_ids": torch.cat([prompt, context_ids]),
        "labels": torch.cat([torch.full_like(prompt, IGNORED), context_ids]),
    }


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
