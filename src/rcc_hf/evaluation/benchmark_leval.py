# SPDX-License-Identifier: Apache-2.0
"""L-Eval (https://arxiv.org/abs/2307.11088): how its twenty subsets are asked and scored.

Records are those of https://github.com/OpenLMLab/LEval. The wording of the prompts is this package's own, so that
scores can be compared with each other but not exactly with published ones. As there, open-ended tasks are told the
length of the reference, and records that people or models judge are left out.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.prompts import Subset, fill

__all__ = ["CLOSED", "OPEN", "examples"]

_MAX_NEW_TOKENS = 512
_LETTER = "Read the document and answer the question with the letter of the right option, and nothing else."


def _closed(instruction: str, metric: str) -> Subset:
    return Subset(
        template=f"{instruction}\n\n{{context}}\n\nQuestion: {{question}}\nAnswer:",
        answer_prefix="Answer:",
        max_new_tokens=_MAX_NEW_TOKENS,
        metric=metric,
    )


CLOSED = {
    "coursera": _closed(
        "Read the document and answer the question with the letters of all right options, such as A or BD.",
        "leval_choices",
    ),
    "quality": _closed(_LETTER, "leval_choice"),
    "tpo": _closed(_LETTER, "leval_choice"),
    "gsm100": _closed(
        'Solve the last problem in the way of the solved ones. End with "The answer is" and the number.', "leval_number"
    ),
    "codeU": _closed(
        "Read the code, then say what the call of its functions gives. End with the final output.", "leval_code"
    ),
    "sci_fi": _closed(
        'Read the story and answer the question with "True" or "False", by what the story says.', "leval_true_false"
    ),
    "topic_retrieval_longchat": _closed(
        "Read the record of a conversation on several topics and remember them in their order.", "leval_contains"
    ),
}
"""Closed-ended subsets."""
OPEN = (
    "financial_qa", "gov_report_summ", "legal_contract_qa", "meeting_summ", "multidoc_qa", "narrative_qa",
    "natural_question", "news_summ", "paper_assistant", "patent_summ", "review_summ", "scientific_qa", "tv_show_summ",
)  # fmt: skip
"""Open-ended subsets; each record says whether F1 or ROUGE is its metric."""
_OPEN_METRICS = {"f1": "squad", "rouge": "rouge"}


def examples(row: Mapping[str, Any], subset: str) -> Iterator[Example]:
    """The examples of one record `{"input", "instructions", "outputs", "evaluation"}`, one for each instruction.

    Raises:
        KeyError: a field is missing.
        ValueError: there are not as many outputs as instructions.
    """
    if len(row["instructions"]) != len(row["outputs"]):
        raise ValueError(f"{len(row['instructions'])} instructions for {len(row['outputs'])} outputs; expected as many")
    metadata = {name: row[name] for name in ("source", "evaluation") if name in row}
    for question, output in zip(row["instructions"], row["outputs"], strict=True):
        values = {"context": row["input"], "question": question}
        if subset in CLOSED:
            yield fill(CLOSED[subset], subset, [output], values, metadata)
        elif metric := _OPEN_METRICS.get(row["evaluation"]):
            asked = Subset(
                template=(
                    "Read the document, then follow the instruction.\n\n{context}\n\nInstruction: {question}\n"
                    "Write {num_words} words.\nAnswer:"
                ),
                answer_prefix="Answer:",
                max_new_tokens=_MAX_NEW_TOKENS,
                metric=metric,
            )
            yield fill(asked, subset, [output], values | {"num_words": str(len(output.split()))}, metadata)
