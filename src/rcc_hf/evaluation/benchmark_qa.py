# SPDX-License-Identifier: Apache-2.0
"""Questions about one document: files like those of SQuAD, Natural Questions, PolicyQA, SQuALITY and QMSum.

Formats: https://rajpurkar.github.io/SQuAD-explorer/, https://github.com/wasiahmad/PolicyQA (as SQuAD),
https://github.com/nyu-mll/SQuALITY, https://github.com/Yale-LILY/QMSum. These have no prompts of their own. `flat` are
files with rows of several such sources: context, question, answers, source, and long where the answers are summaries.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.prompts import Subset, fill

__all__ = [
    "CLOSED_ANSWER", "CLOSED_ANSWERS", "FORMATS", "SHORT_ANSWER", "SUMMARY", "flat", "qmsum", "questions", "squad",
    "squality", "template_of",
]  # fmt: skip

SHORT_ANSWER = Subset(
    template=(
        "{context}\n\nAnswer the question about the text above with a few words of it, and nothing else."
        "\n\nQuestion: {question}\nAnswer:"
    ),
    answer_prefix="Answer:",
    max_new_tokens=32,
    metric="squad",
)
CLOSED_ANSWERS = frozenset({"yes", "no", "maybe"})
"""Of closed questions: words that any document may hold without answering anything."""
CLOSED_ANSWER = Subset(
    template=(
        "{context}\n\nAnswer the question about the text above with yes, no or maybe, and nothing else."
        "\n\nQuestion: {question}\nAnswer:"
    ),
    answer_prefix="Answer:",
    max_new_tokens=8,
    metric="squad",
)
SUMMARY = Subset(
    template="{context}\n\nAnswer the question about the text above in a paragraph.\n\nQuestion: {question}\nAnswer:",
    answer_prefix="Answer:",
    max_new_tokens=512,
    metric="rouge_stemmed",
)


def questions(row: Mapping[str, Any], subset: str) -> Iterator[Example]:
    """The example of one flat record: a context (or document, passage), a question, and answers (or answer).

    Answers are a text, a list, or SQuAD's `{"text": [...]}`; a question without any is left out. Where the record says
    `"long": true` a paragraph is asked for, and where each answer is yes, no or maybe, one of these.

    Raises:
        KeyError: a field is missing.
    """
    answers = row["answers"] if "answers" in row else row["answer"]
    texts = _texts(answers)
    if texts:
        context = next((row[name] for name in ("context", "document", "passage") if name in row), None)
        if context is None:
            raise KeyError("context")
        metadata = {name: row[name] for name in ("id", "source") if name in row}
        asked = template_of(texts, is_long=bool(row.get("long")))
        yield fill(asked, subset, texts, {"context": context, "question": row["question"]}, metadata)


def template_of(answers: Sequence[str], *, is_long: bool = False) -> Subset:
    """How a question with these answers is asked: for a summary, for yes, no or maybe, or for a few words."""
    if all(text.strip().lower() in CLOSED_ANSWERS for text in answers):
        return CLOSED_ANSWER
    return SUMMARY if is_long else SHORT_ANSWER


def flat(row: Mapping[str, Any], subset: str) -> Iterator[Example]:
    """As `questions`, if the record's `source` begins with the subset's name; without one, the source is the task.

    Raises:
        KeyError: a field is missing.
    """
    source = str(row["source"])
    if subset == "flat":
        yield from questions(row, source)
    elif source.startswith(subset):
        yield from questions(row, subset)


def _texts(answers: Any) -> list[str]:
    if isinstance(answers, Mapping):
        answers = answers["text"]
    if isinstance(answers, str):
        answers = [answers]
    texts = (answer["text"] if isinstance(answer, Mapping) else answer for answer in answers)
    return list(dict.fromkeys(text for text in texts if text))


def squad(row: Mapping[str, Any], subset: str) -> Iterator[Example]:
    """The examples of a SQuAD file, or of one of its articles, paragraphs or flat records.

    Raises:
        KeyError: a field is missing.
    """
    if "data" in row or "paragraphs" in row:
        for inner in row["data"] if "data" in row else row["paragraphs"]:
            yield from squad(inner, subset)
    elif "qas" in row:
        for asked in row["qas"]:
            if not asked.get("is_impossible"):
                yield from questions({**asked, "context": row["context"]}, subset)
    else:
        yield from questions(row, subset)


def squality(row: Mapping[str, Any], subset: str) -> Iterator[Example]:
    """The examples of one story, each question with the summaries of all writers.

    Raises:
        KeyError: a field is missing.
    """
    for asked in row["questions"]:
        answers = [response["response_text"] for response in asked["responses"]]
        values = {"context": row["document"], "question": asked["question_text"]}
        yield fill(SUMMARY, subset, answers, values)


def qmsum(row: Mapping[str, Any], subset: str) -> Iterator[Example]:
    """The examples of one meeting: its general and its specific queries.

    Raises:
        KeyError: a field is missing.
    """
    transcript = "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in row["meeting_transcripts"])
    for kind in ("general", "specific"):
        for asked in row[f"{kind}_query_list"]:
            values = {"context": transcript, "question": asked["query"]}
            yield fill(SUMMARY, subset, [asked["answer"]], values, {"kind": kind})


FORMATS: dict[str, Callable[[Mapping[str, Any], str], Iterator[Example]]] = {
    "squad": squad,
    "nq": questions,
    "policyqa": squad,
    "squality": squality,
    "qmsum": qmsum,
    "flat": flat,
}
"""Of each format the function that makes examples of a record."""
