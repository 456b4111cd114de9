# SPDX-License-Identifier: Apache-2.0
"""Questions about a compressed context, in the words of evaluation; the answer is predicted."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rcc_hf.evaluation.benchmark_qa import template_of
from rcc_hf.objectives.base import Shape, build_example
from rcc_hf.objectives.gold import GoldContexts, contains
from rcc_hf.objectives.haystacks import Haystack
from rcc_hf.objectives.prompting import Prompter, Template, phrase
from rcc_hf.objectives.reconstruction import pad_segment
from rcc_hf.texts import QARow

__all__ = ["QuestionAnswering", "draw_answer"]


class QuestionAnswering:
    """The passage that has the answer stands among others, or alone in a padded segment, and is compressed.

    Args:
        rows: Questions with contexts and answers.
        tokenizer: Of the model.
        template: Of the answers, for rows without an answer prefix; None: their questions are phrased already.
        chat_share: Share of prompts in the tokenizer's chat template.
        haystack: Where other passages come from; None: contexts of other rows.
        alone_share: Share of examples whose passage stays alone, as far as there are rows of the right length.
        fill_id: Fills up the last segment of these; the end-of-text token by default, as in evaluation.
        max_answer: Tokens of an answer, at most.
        distill: Whether an uncompressed teacher reads the same, without what fills a segment up.
        name: For tables.
        progress: Whether a bar is shown while contexts are tokenized.

    Raises:
        ValueError: there is no row, a number is out of range, or the tokenizer has no template or no end.
    """

    def __init__(
        self,
        rows: Sequence[QARow],
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: Template | None = template_of,
        chat_share: float = 0.0,
        haystack: Haystack | None = None,
        alone_share: float = 0.0,
        fill_id: int | None = None,
        max_answer: int = 256,
        distill: bool = False,
        name: str = "questions",
        progress: bool = True,
    ):
        self.name = name
        self._prompter = Prompter(tokenizer, chat_share=chat_share, max_answer=max_answer)
        self._contexts = GoldContexts(rows, tokenizer, haystack=haystack, alone_share=alone_share, progress=progress)
        self._template, self._distill = template, distill
        self._fill_id = tokenizer.eos_token_id if fill_id is None else fill_id

    def example(self, rng: np.random.Generator, shape: Shape) -> dict[str, Tensor]:
        found = self._contexts.draw(rng, shape)
        answer = draw_answer(rng, found.row)
        question, prefix = phrase(found.row, self._template)
        prompt, target = self._prompter.encode(question, prefix, answer, chat=self._prompter.draw_chat(rng))
        return build_example(
            pad_segment(found.ids, shape.segment_length, self._fill_id),
            [(prompt, False), (target, True)],
            teacher_context=found.ids if self._distill else None,
        )


def draw_answer(rng: np.random.Generator, row: QARow) -> str:
    """One of the answers, of those that stand in the context if any does."""
    standing = [answer for answer in row.answers if contains(row.context, [answer])]
    answers = standing or list(row.answers)
    return answers[int(rng.integers(len(answers)))]
