# SPDX-License-Identifier: Apache-2.0
"""InfiniteBench (https://arxiv.org/abs/2402.13718): prompts, lengths of answers and metrics of its twelve subsets.

The texts are data of https://github.com/OpenBMB/InfiniteBench (MIT): its templates for open models ("yarn-mistral").
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.prompts import Subset, fill

__all__ = ["SUBSETS", "examples"]

_HIDDEN = "There is an important info hidden inside a lot of irrelevant text. Find it"
_LETTERS = "A. {OPTION_A}\nB. {OPTION_B}\nC. {OPTION_C}\nD. {OPTION_D}\n\n"

SUBSETS = {
    "passkey": Subset(
        template=(
            f"{_HIDDEN} and memorize it. I will quiz you about the important information.\n\n{{context}}\n\n{{input}}"
            "\n\nThe pass key is"
        ),
        answer_prefix="The pass key is",
        max_new_tokens=6,
        metric="infinitebench_integer",
    ),
    "number_string": Subset(
        template=(
            f"{_HIDDEN}. I will quiz you about the important information there.\n\n{{context}}\n\n{{input}}"
            "\n\nThe sequence of digits is"
        ),
        answer_prefix="The sequence of digits is",
        max_new_tokens=12,
        metric="infinitebench_integer",
    ),
    "kv_retrieval": Subset(
        template=(
            "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}\n\n{input}"
        ),
        max_new_tokens=50,
        metric="infinitebench_word",
    ),
    "longbook_sum_eng": Subset(
        template="Summarize the book below.\n\n{context}\n\nSummary:",
        answer_prefix="Summary:",
        max_new_tokens=1200,
        metric="infinitebench_summary",
    ),
    "longbook_choice_eng": Subset(
        template=(
            "Read the book and answer the question.\n\n{context}\n\nQuestion: {input}\n"
            f"{_LETTERS}The letter of the correct answer is"
        ),
        answer_prefix="The letter of the correct answer is",
        max_new_tokens=40,
        metric="infinitebench_choice",
    ),
    "longbook_qa_eng": Subset(
        template=(
            "Read the book and answer the question. Be very concise in your answer.\n\n{context}\n\n"
            "Question: {input}\nAnswer:"
        ),
        answer_prefix="Answer:",
        max_new_tokens=40,
        metric="squad",
    ),
    "longbook_qa_chn": Subset(
        template="阅读以下书籍然后回答问题。\n\n{context}\n\n问题：{input}\n答案：",  # noqa: RUF001
        answer_prefix="答案：",  # noqa: RUF001
        max_new_tokens=40,
        metric="longbench_f1_zh",
    ),
    "longdialogue_qa_eng": Subset(
        template=(
            'Below is a dialogue script where one random occurrence of a character name is replaced with "$$MASK$$", '
            "and you should try to guess who that character is.\n\n{context}\n\n"
            "The name that has been replaced with $$MASK$$ is likely"
        ),
        answer_prefix="The name that has been replaced with $$MASK$$ is likely",
        max_new_tokens=40,
        metric="infinitebench_contains",
    ),
    "math_find": Subset(
        template="{prefix}\n\n{context}\n\n{input}",
        max_new_tokens=3,
        metric="infinitebench_number",
    ),
    "math_calc": Subset(
        template=(
            "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
            "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: {context}\nValues:"
        ),
        answer_prefix="Values:",
        max_new_tokens=30_000,
        metric="infinitebench_calculation",
    ),
    "code_run": Subset(
        template=(
            "There is a function called {func} in the following Python code.\n\n{context}\n\n"
            "Please compute the exact value of {func_call}. The value of {func_call} is"
        ),
        max_new_tokens=5,
        metric="infinitebench_code_run",
    ),
    "code_debug": Subset(
        template=(
            "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes "
            f"it crash.\n\n{{context}}\n\nOptions:\n{_LETTERS}The correct option is:"
        ),
        answer_prefix="The correct option is:",
        max_new_tokens=5,
        metric="infinitebench_choice",
    ),
}


def examples(row: Mapping[str, Any], subset: str) -> Iterator[Example]:
    """The example of one record `{"id", "context", "input", "answer", "options"}`.

    Raises:
        KeyError: a field is missing.
        ValueError: the options are not four, or the answer is none of them; or the input has not what its subset needs.
    """
    given = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    answers = [str(answer) for answer in given]
    values = {"context": row["context"], "input": row["input"]}
    if SUBSETS[subset].metric == "infinitebench_choice":
        options = list(row["options"])
        if len(options) != 4 or answers[0] not in options:
            raise ValueError(f"expected four options with the answer {answers[0]!r} among them, found {options}")
        answers = [answers[0], "ABCD"[options.index(answers[0])]]
        values |= {f"OPTION_{letter}": option for letter, option in zip("ABCD", options, strict=True)}
    elif subset == "math_calc":
        numbers = given[0] if isinstance(given[0], list) else given
        answers = [", ".join(map(str, numbers))]
    elif subset == "math_find":
        values["prefix"] = f"What is {_found(r'The .+ of', row['input'])[:-3].lower()} in the following list?"
    elif subset == "code_run":
        call = _found(r"func_[0-9]+\(-?[0-9]+\)", row["input"])
        values |= {"func": call.partition("(")[0], "func_call": call}
    metadata = {"id": row["id"]} if "id" in row else {}
    yield fill(SUBSETS[subset], subset, answers, values, metadata)


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the input {text[:80]!r} has nothing of the form {pattern}")
    return found[0]
