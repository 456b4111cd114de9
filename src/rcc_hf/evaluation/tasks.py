# SPDX-License-Identifier: Apache-2.0
"""The tasks that are made of examples, and the examples that their settings give."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from rcc_hf.evaluation.distractors import Distractors
from rcc_hf.evaluation.examples import Example, read_examples
from rcc_hf.evaluation.fillers import FILLERS, book_paragraphs
from rcc_hf.evaluation.needles import KeyType, NeedleTask, needle_grid
from rcc_hf.evaluation.passages import passages, read_texts, reconstruction_example
from rcc_hf.evaluation.readers import BENCHMARKS, read_benchmark, read_qa_records
from rcc_hf.evaluation.ruler import ESSAY_TASKS, QA_TASKS, RULER_TASKS, ruler_examples
from rcc_hf.evaluation.settings import TaskSettings

__all__ = ["GROUP_BY", "TaskSettings", "build_examples", "check_data", "choose", "take_fraction"]

Cell = Callable[[], list[Example]]
"""Makes the examples of one place in a grid."""

GROUP_BY = {
    "reconstruction": ("length",),
    "passkey": ("filler", "key_type", "length", "depth"),
    "needles": ("filler", "key_type", "length", "depth"),
    "ruler": ("length",),
    "qa": ("length",),
    "benchmark": (),
}
"""Of each task the metadata by which scores are grouped, beside the task that an example names."""


def build_examples(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: TaskSettings,
    *,
    segment_length: int = 1024,
    prompt: str = "",
) -> list[Example]:
    """The examples of a task, the same ones for the same settings.

    Args:
        task: One of `GROUP_BY`.
        tokenizer: By which lengths are measured.
        settings: What is asked.
        segment_length: For reconstruction: tokens that are compressed together.
        prompt: For reconstruction: what asks for it.

    Raises:
        ValueError: the task is unknown, settings exclude each other, or data are missing or wrong.
        ModuleNotFoundError: the bundled prose is needed and not installed.
    """
    check_data(task, settings)
    if task not in GROUP_BY:
        raise ValueError(f"{task} is not made of examples; the tasks that are: {', '.join(GROUP_BY)}")
    if task == "reconstruction":
        cells = _reconstruction(tokenizer, settings, segment_length, prompt)
    elif task in ("qa", "benchmark"):
        cells = _from_file(task, tokenizer, settings)
    else:
        cells = {"passkey": _passkey, "needles": _needles, "ruler": _ruler}[task](tokenizer, settings)
    examples = [example for cell in take_fraction(cells, settings) for example in cell()]
    if settings.max_new_tokens is not None and task != "reconstruction":
        examples = [replace(example, max_new_tokens=settings.max_new_tokens) for example in examples]
    return examples


def check_data(task: str, settings: TaskSettings) -> None:
    """Refuse what cannot work before a model is loaded.

    Raises:
        ValueError: the task is unknown, or asks about data and none are given.
    """
    known = (*GROUP_BY, "perplexity", "cost")
    if task not in known:
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(known)}")
    if task in ("qa", "benchmark") and settings.data is None:
        raise ValueError(
            f"{task} needs data: JSON lines with context, question, answer_prefix, answer and max_new_tokens, or those "
            "of a benchmark"
        )
    if task != "qa" and settings.context_tokens is not None:
        raise ValueError(f"context_tokens fills up contexts of qa, not of {task}; leave it out (lengths may be meant)")
    if task == "benchmark" and settings.benchmark is None:
        raise ValueError(f"benchmark is not given; it must be one of {', '.join(BENCHMARKS)}")


def take_fraction(items: Sequence[Any], settings: TaskSettings) -> list[Any]:
    """The share of `settings.fraction`, at least one, chosen by the seed and in order."""
    count = max(1, round(len(items) * settings.fraction))
    return choose(items, count, settings.seed)


def choose(items: Sequence[Any], count: int, seed: int) -> list[Any]:
    """So many of the items, by the seed and in their order."""
    chosen = random.Random(seed).sample(range(len(items)), count)
    return [items[index] for index in sorted(chosen)]


def _passkey(tokenizer: PreTrainedTokenizerBase, settings: TaskSettings) -> list[Cell]:
    return _needles(tokenizer, replace(settings, num_needles=1, num_queries=1))


def _needles(tokenizer: PreTrainedTokenizerBase, settings: TaskSettings) -> list[Cell]:
    kinds: list[NeedleTask] = []
    for name in settings.fillers:
        filler = FILLERS[name]()
        for key_type in settings.key_types:
            kind: KeyType = "uuid" if key_type == "uuid" else "number"
            kinds.append(
                NeedleTask(
                    filler=filler,
                    key_type=kind,
                    num_needles=settings.num_needles,
                    num_queries=settings.num_queries,
                    num_digits=settings.num_digits,
                )
            )

    def make(task: NeedleTask, length: int, depth: float) -> list[Example]:
        count = settings.num_examples or 1
        grid = needle_grid(task, tokenizer, lengths=[length], depths=[depth], num_repeats=count, seed=settings.seed)
        return list(grid)

    lengths = settings.lengths or [2048, 8192, 32768]
    return [partial(make, task, length, depth) for task in kinds for length in lengths for depth in settings.depths]


def _ruler(tokenizer: PreTrainedTokenizerBase, settings: TaskSettings) -> list[Cell]:
    names = settings.ruler_tasks or [name for name in RULER_TASKS if settings.data or name not in QA_TASKS]
    records = read_qa_records(settings.data) if settings.data else None
    paragraphs = book_paragraphs() if any(name in ESSAY_TASKS for name in names) else None

    def make(name: str, length: int) -> list[Example]:
        return list(
            ruler_examples(
                name,
                tokenizer,
                length=length,
                num_examples=settings.num_examples or 8,
                seed=settings.seed,
                paragraphs=paragraphs,
                records=records,
            )
        )

    return [partial(make, name, length) for length in settings.lengths or [4096] for name in names]


def _from_file(task: str, tokenizer: PreTrainedTokenizerBase, settings: TaskSettings) -> list[Cell]:
    check_data(task, settings)
    source = str(settings.data)
    subsets: Sequence[str | None] = settings.subsets or (None,)
    if settings.benchmark is not None:
        found = [
            example
            for subset in subsets
            for example in read_benchmark(settings.benchmark, source, subset, split=settings.split)
        ]
    else:
        found = [
            replace(example, task=example.task or task, metric=example.metric or "squad")
            for example in read_examples(source)
        ]
    if settings.metric is not None:
        found = [replace(example, metric=settings.metric) for example in found]
    if settings.context_tokens is None:
        return _cells(found, settings)
    others = Distractors(found, tokenizer, settings.context_tokens, settings.seed)
    return _cells(found, settings, lambda example: [others.fill(example)])


def _cells(
    examples: list[Example],
    settings: TaskSettings,
    make: Callable[[Example], list[Example]] = lambda example: [example],
) -> list[Cell]:
    """One for each example, of which there are at most as many as asked for."""
    if settings.num_examples is not None:
        examples = choose(examples, min(settings.num_examples, len(examples)), settings.seed)
    return [partial(make, example) for example in examples]


def _reconstruction(
    tokenizer: PreTrainedTokenizerBase, settings: TaskSettings, segment_length: int, prompt: str
) -> list[Cell]:
    make = partial(
        reconstruction_example,
        tokenizer=tokenizer,
        segment_length=segment_length,
        prompt=prompt,
        tail=settings.tail,
        max_new_tokens=settings.max_new_tokens,
    )
    if settings.data is not None and settings.lengths is None:
        return _cells([make(text, place=place) for place, text in read_texts(settings.data)], settings)
    texts = [text for _, text in read_texts(settings.data or "prose-held-out")]
    found = []
    for length in settings.lengths or [segment_length, 2 * segment_length]:
        if length % segment_length and settings.tail == "cut":
            raise ValueError(
                f"length {length} is no whole number of segments of {segment_length}; give one that is, or keep the "
                "tail raw or padded"
            )
        chosen = passages(texts, tokenizer, length, settings.num_examples or 8, settings.seed)
        found += [make(text, length=length) for text in chosen]
    return _cells(found, replace(settings, num_examples=None))
