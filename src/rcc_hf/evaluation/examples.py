# SPDX-License-Identifier: Apache-2.0
"""The example, which is what every task is made of, and its JSON lines."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rcc_hf.texts.rows import expect, read_rows

__all__ = ["Example", "read_examples", "write_examples"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question about one context.

    The first five fields are the columns of kvpress's data sets. A model reads `context`, which may be compressed, then
    `question`, and continues `answer_prefix`.

    Attributes:
        context: What is compressed; may be empty.
        question: What follows the context.
        answer_prefix: How the answer begins.
        answer: The answer, or several. The metric says whether each one of them is right, or all are asked for.
        max_new_tokens: Upper limit of the generated answer, in tokens.
        task: Group in which scores are averaged.
        metric: Name in `rcc_hf.evaluation.scoring.SCORERS`.
        metadata: Further facts for tables and metrics, such as length, depth and filler; JSON values.

    Raises:
        ValueError: a field has the wrong type, there is no answer, or one is empty.
    """

    context: str
    question: str
    answer_prefix: str = ""
    answer: str | tuple[str, ...]
    max_new_tokens: int
    task: str = ""
    metric: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.answer, list):
            object.__setattr__(self, "answer", tuple(self.answer))
        for name in ("context", "question", "answer_prefix", "task", "metric"):
            expect(name, getattr(self, name), isinstance(getattr(self, name), str), "a string")
        expect(
            "answer",
            self.answer,
            isinstance(self.answer, (str, tuple))
            and bool(self.answers)
            and all(isinstance(answer, str) and answer for answer in self.answers),
            "a string or a list of strings, none of them empty",
        )
        is_count = isinstance(self.max_new_tokens, int) and not isinstance(self.max_new_tokens, bool)
        expect("max_new_tokens", self.max_new_tokens, is_count and self.max_new_tokens > 0, "a positive integer")
        expect("metadata", self.metadata, isinstance(self.metadata, Mapping), "a dictionary")

    @property
    def answers(self) -> tuple[str, ...]:
        """`answer` as a tuple, also where there is one."""
        return (self.answer,) if isinstance(self.answer, str) else self.answer

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Example":
        """An example from a row of a file or data set; columns that are no fields go into `metadata`.

        Raises:
            ValueError: a field is missing, or has the wrong type.
        """
        names = {item.name for item in fields(cls)}
        required = ("context", "question", "answer", "max_new_tokens")
        missing = [name for name in required if name not in row]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing; found {', '.join(row) or 'nothing'}")
        values = {name: value for name, value in row.items() if name in names}
        expect("metadata", values.get("metadata", {}), isinstance(values.get("metadata", {}), Mapping), "a dictionary")
        extra = {name: value for name, value in row.items() if name not in names}
        return cls(**values | {"metadata": extra | dict(values.get("metadata", {}))})

    def to_row(self) -> dict[str, Any]:
        """The fields as JSON values."""
        row = {item.name: getattr(self, item.name) for item in fields(self)}
        answer = self.answer if isinstance(self.answer, str) else list(self.answer)
        return row | {"answer": answer, "metadata": dict(self.metadata)}


def read_examples(path: str | Path) -> list[Example]:
    """The examples of a JSON-lines file.

    Raises:
        ValueError: a line is no example; the message has the file, the line and the field. Or there is none.
    """
    examples = []
    for place, row in read_rows(path):
        try:
            examples.append(Example.from_row(row))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    if not examples:
        raise ValueError(f"{path} holds no examples; expected one JSON object a line")
    return examples


def write_examples(path: str | Path, examples: Iterable[Example]) -> int:
    """Write examples as JSON lines, and return how many."""
    count = 0
    with Path(path).open("w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(example.to_row(), ensure_ascii=False) + "\n")
            count += 1
    return count
