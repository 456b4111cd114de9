# SPDX-License-Identifier: Apache-2.0
"""Questions with answers, and conversations, as rows of files and data sets have them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcc_hf.texts.rows import expect, rows_as

__all__ = ["ChatRow", "QARow", "read_chat_rows", "read_qa_rows"]


@dataclass(frozen=True, kw_only=True)
class QARow:
    """A question about a context: a model reads `context`, then `question`, and continues `answer_prefix`.

    Attributes:
        context: What is compressed.
        question: What follows it.
        answer_prefix: How the answer begins.
        answers: Right ones, of which one is enough.
        max_new_tokens: Upper limit of a generated answer, in tokens, where the row has one.

    Raises:
        ValueError: a field has the wrong type, there is no answer, or one is empty.
    """

    context: str
    question: str
    answer_prefix: str = ""
    answers: tuple[str, ...]
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("context", "question", "answer_prefix"):
            expect(name, getattr(self, name), isinstance(getattr(self, name), str), "a string")
        is_right = isinstance(self.answers, tuple) and bool(self.answers)
        is_right = is_right and all(isinstance(answer, str) and answer for answer in self.answers)
        expect("answer", self.answers, is_right, "a string or a list of strings, none of them empty")
        limit = self.max_new_tokens
        is_count = isinstance(limit, int) and not isinstance(limit, bool) and limit > 0
        expect("max_new_tokens", limit, limit is None or is_count, "a positive integer")

    @property
    def answer(self) -> str:
        """The first of `answers`."""
        return self.answers[0]

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "QARow":
        """From a row with `context`, `question`, `answer` (a string or a list) or `answers` (also as SQuAD has them,
        `{"text": [...]}`), and perhaps `answer_prefix` and `max_new_tokens`. Other columns are left out.

        Raises:
            ValueError: a column is missing, or has the wrong type.
        """
        missing = [name for name in ("context", "question") if name not in row]
        missing += [] if "answer" in row or "answers" in row else ["answer"]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing; found {', '.join(row) or 'nothing'}")
        answers: Any = row["answer"] if "answer" in row else row["answers"]
        answers = answers.get("text") if isinstance(answers, Mapping) else answers
        answers = (answers,) if isinstance(answers, str) else answers
        return cls(
            context=row["context"],
            question=row["question"],
            answer_prefix=row.get("answer_prefix") or "",
            answers=tuple(answers) if isinstance(answers, list) else answers,
            max_new_tokens=row.get("max_new_tokens"),
        )


@dataclass(frozen=True, kw_only=True)
class ChatRow:
    """A conversation, perhaps about a context.

    Attributes:
        messages: In order, each with `role` and `content`, and whatever else a chat template reads.
        context: What is compressed; None: only the conversation itself can be.

    Raises:
        ValueError: a field or message has the wrong form, or the assistant says nothing.
    """

    messages: tuple[Mapping[str, Any], ...]
    context: str | None = None

    def __post_init__(self) -> None:
        expect("context", self.context, self.context is None or isinstance(self.context, str), "a string")
        is_right = isinstance(self.messages, tuple) and bool(self.messages)
        expect("messages", self.messages, is_right, 'a list of {"role": ..., "content": ...}, with one or more')
        for number, message in enumerate(self.messages, 1):
            expect(f"message {number}", message, isinstance(message, Mapping), 'an object with "role" and "content"')
            for name in ("role", "content"):
                value = message.get(name)
                expect(f"{name} of message {number}", value, isinstance(value, str), "a string")
        roles = [message["role"] for message in self.messages]
        expect("messages", roles, "assistant" in roles, "a conversation in which the role assistant says something")

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "ChatRow":
        """From a row with `messages`, and perhaps `context`. Other columns are left out.

        Raises:
            ValueError: `messages` are missing, or something has the wrong type.
        """
        if "messages" not in row:
            raise ValueError(f"messages missing; found {', '.join(row) or 'nothing'}")
        messages = row["messages"]
        return cls(messages=tuple(messages) if isinstance(messages, list) else messages, context=row.get("context"))


def read_qa_rows(source: str | Path) -> list[QARow]:
    """The questions of a `.jsonl` file, or of `datasets:NAME?...` as `read_documents` has it, but without `field`.

    Questions about the same context share it in memory.

    Raises:
        ValueError: a row is no question, and the message has file, line and column; or there is none.
        OSError: there is no such file or data set.
    """
    contexts: dict[str, str] = {}

    def make(row: Mapping[str, Any]) -> QARow:
        context = row.get("context")
        if isinstance(context, str):
            row = {**row, "context": contexts.setdefault(context, context)}
        return QARow.from_row(row)

    return list(rows_as(make, source))


def read_chat_rows(source: str | Path) -> list[ChatRow]:
    """The conversations of a `.jsonl` file, or of `datasets:NAME?...` as `read_documents` has it, without `field`.

    Raises:
        ValueError: a row is no conversation, and the message has file, line and column; or there is none.
        OSError: there is no such file or data set.
    """
    return list(rows_as(ChatRow.from_row, source))
