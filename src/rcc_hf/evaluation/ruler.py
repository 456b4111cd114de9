# SPDX-License-Identifier: Apache-2.0
"""RULER's thirteen tasks (https://arxiv.org/abs/2404.06654), made in code at any length.

Parameters, texts of the prompts, and lengths of the answers are those of https://github.com/NVIDIA/RULER (Apache-2.0);
context, question and prefix are divided as in kvpress's data set. Differences from that repository:

- keys and words are drawn from lists of this package, and no needle or common word can be mistaken for another;
- text for haystacks and records for questions are given by the caller;
- real text begins at a random paragraph, and needles stand at a share of tokens instead of sentences.
"""

import random
from collections.abc import Callable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.fillers import TextFiller
from rcc_hf.evaluation.lengths import TokenCounter
from rcc_hf.evaluation.ruler_aggregation import common_words, frequent_words, variable_tracking
from rcc_hf.evaluation.ruler_needles import NIAH_TASKS
from rcc_hf.evaluation.ruler_parts import Draft, cut_to_length
from rcc_hf.evaluation.ruler_qa import QARecord, question_answering

__all__ = ["ESSAY_TASKS", "QA_TASKS", "RULER_TASKS", "ruler_examples"]

QA_TASKS = ("qa_1", "qa_2")
"""In the paper SQuAD and HotpotQA; here the records that are given."""
_AGGREGATION: dict[str, Callable[[random.Random, TokenCounter, int], Draft]] = {
    "vt": variable_tracking,
    "cwe": common_words,
    "fwe": frequent_words,
}
RULER_TASKS = (*NIAH_TASKS, *_AGGREGATION, *QA_TASKS)
"""Names as in the paper's tables."""
ESSAY_TASKS = tuple(name for name, task in NIAH_TASKS.items() if task.haystack == "essay")
"""Those that need paragraphs."""


def ruler_examples(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    num_examples: int,
    seed: int = 0,
    paragraphs: Sequence[str] | None = None,
    records: Sequence[QARecord] | None = None,
    first: int = 0,
) -> Iterator[Example]:
    """Examples of one task, one at a time; each depends on its index and the seed, not on those before it.

    Args:
        task: One of `RULER_TASKS`.
        tokenizer: By which lengths are measured.
        length: Tokens of context, question, prefix and `max_new_tokens` together, at most; the last unit of filler
            that would have been too much is left out.
        num_examples: How many.
        seed: Other examples for another one.
        paragraphs: Real text, for `ESSAY_TASKS`.
        records: Questions with documents, for `QA_TASKS`; see `rcc_hf.evaluation.readers.read_qa_records`.
        first: Index of the first example.

    Raises:
        ValueError: the task is unknown, the length too short for it, or what it needs was not given.
    """
    if task not in RULER_TASKS:
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(RULER_TASKS)}")
    if task in ESSAY_TASKS and not paragraphs:
        raise ValueError(f"{task} hides needles in real text; give paragraphs, for example of rcc_hf.prose")
    if task in QA_TASKS and not records:
        raise ValueError(f"{task} asks questions about documents; give records, for example of read_qa_records")
    essay = TextFiller(paragraphs) if task in ESSAY_TASKS and paragraphs else None
    records = records or ()
    pool = list(dict.fromkeys(text for record in records for text in (*record.documents, *record.related)))
    counter = TokenCounter(tokenizer)
    for index in range(first, first + num_examples):
        generator = random.Random(f"{seed}|{task}|{length}|{index}")
        if task in NIAH_TASKS:
            draft = NIAH_TASKS[task].draft(generator, counter, length, essay)
        elif task in _AGGREGATION:
            draft = _AGGREGATION[task](generator, counter, length)
        else:
            draft = question_answering(records[index % len(records)], pool, generator, counter, length)
        yield cut_to_length(draft, counter, length, task, seed=seed, index=index)
