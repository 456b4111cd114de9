# SPDX-License-Identifier: Apache-2.0
"""RULER's question answering: the documents with the answer among others, up to the length."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from rcc_hf.evaluation.lengths import TokenCounter, take_units
from rcc_hf.evaluation.ruler_parts import Draft

__all__ = ["QARecord", "question_answering"]

_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


@dataclass(frozen=True)
class QARecord:
    """A question with its documents.

    Attributes:
        question: Text.
        answers: Each of them is right.
        documents: What the answer follows from.
        related: Documents on the same subject, which are the first distractors.
    """

    question: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]
    related: tuple[str, ...] = ()


def question_answering(
    record: QARecord, pool: Sequence[str], generator: random.Random, counter: TokenCounter, length: int
) -> Draft:
    """`qa_1`, `qa_2`: the record's documents, related ones, then others of the pool, in random order.

    A pool that is too small is repeated, as RULER does.
    """
    own = {*record.documents, *record.related}
    # Drawn one at a time: the pool may have ten thousand times what is needed.
    strangers = [document for document in generator.sample(pool, len(pool)) if document not in own]
    others = [*generator.sample(record.related, len(record.related)), *strangers]
    endless = cycle(f"\n\nDocument 100:\n{document}" for document in others)
    _, sizes = take_units(endless, counter, length)
    order = generator.random()

    def render(number: int) -> str:
        documents = [*record.documents, *islice(cycle(others), number)]
        random.Random(order).shuffle(documents)
        listed = "\n\n".join(f"Document {place}:\n{document}" for place, document in enumerate(documents, 1))
        return f"{_INSTRUCTION}\n\nThe following are given documents.\n\n{listed}\n\n"

    return Draft(
        render=render,
        sizes=sizes,
        question=f"{_INSTRUCTION}\n\nQuestion: {record.question} ",
        answer_prefix="Answer:",
        answers=record.answers,
        max_new_tokens=32,
        metric="string_match_part",
    )
