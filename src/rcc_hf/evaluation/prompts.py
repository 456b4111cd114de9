# SPDX-License-Identifier: Apache-2.0
"""Prompts of benchmarks as templates, divided into what is compressed, the question, and how the answer begins."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rcc_hf.evaluation.examples import Example

__all__ = ["Subset", "fill"]


@dataclass(frozen=True, kw_only=True)
class Subset:
    """How one subset of a benchmark is asked and scored.

    Attributes:
        template: The whole prompt, with `{context}` and further fields in braces.
        answer_prefix: The end of the template, or of the filled one, that begins the answer.
        max_new_tokens: As published.
        metric: Name of the metric.
    """

    template: str
    answer_prefix: str = ""
    max_new_tokens: int
    metric: str


def fill(
    subset: Subset, task: str, answers: list[str], values: Mapping[str, str], metadata: Mapping[str, Any] | None = None
) -> Example:
    """An example whose context, question and prefix, one behind the other, are the filled template.

    The context ends with the document: instructions behind it belong to the question, which no compressor has to keep.

    Raises:
        KeyError: a field of the template has no value.
        ValueError: there is no answer.
    """
    before, _, after = subset.template.partition("{context}")
    question = after.format(**values)
    is_prefix = bool(subset.answer_prefix) and question.endswith(subset.answer_prefix)
    return Example(
        context=before.format(**values) + values["context"],
        question=question.removesuffix(subset.answer_prefix),
        answer_prefix=subset.answer_prefix if is_prefix else "",
        answer=tuple(answers),
        max_new_tokens=subset.max_new_tokens,
        task=task,
        metric=subset.metric,
        metadata=dict(metadata or {}),
    )
