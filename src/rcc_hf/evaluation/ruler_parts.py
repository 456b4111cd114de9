# SPDX-License-Identifier: Apache-2.0
"""What RULER's tasks are made of: an example that is still to be cut to length, and the cutting."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.lengths import TokenCounter, fit_units

__all__ = ["Draft", "cut_to_length"]


@dataclass(frozen=True, kw_only=True)
class Draft:
    """An example that can be made of any length.

    Attributes:
        render: The context with a given number of units.
        sizes: Tokens that each unit adds, about.
        question: Follows the context.
        answer_prefix: How the answer begins.
        answers: What has to be found.
        max_new_tokens: Tokens left for the answer, as published.
        metric: Name of the metric.
        check: Raises ValueError if that many units leave the answer ambiguous.
        metadata: Further facts.
    """

    render: Callable[[int], str]
    sizes: Sequence[float]
    question: str
    answer_prefix: str
    answers: Sequence[str]
    max_new_tokens: int
    metric: str = "string_match_all"
    check: Callable[[int], None] = lambda num_units: None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def cut_to_length(draft: Draft, counter: TokenCounter, length: int, task: str, **metadata: Any) -> Example:
    """The longest example within `length` tokens: context, question, prefix and `max_new_tokens`, as RULER counts.

    Raises:
        ValueError: the length is too short for the task.
    """
    prompt = draft.question + draft.answer_prefix
    try:
        num_units, text, tokens = fit_units(
            lambda number: draft.render(number) + prompt, draft.sizes, counter, length - draft.max_new_tokens
        )
        draft.check(num_units)
    except ValueError as error:
        raise ValueError(f"{task} at length {length}: {error}. Give a greater length") from error
    return Example(
        context=text[: len(text) - len(prompt)],
        question=draft.question,
        answer_prefix=draft.answer_prefix,
        answer=tuple(draft.answers),
        max_new_tokens=draft.max_new_tokens,
        task=task,
        metric=draft.metric,
        metadata={
            "length": length,
            "tokens": tokens + draft.max_new_tokens,
            "units": num_units,
            **draft.metadata,
            **metadata,
        },
    )
