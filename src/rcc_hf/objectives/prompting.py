# SPDX-License-Identifier: Apache-2.0
"""Prompts and answers as ids, in the words of evaluation: plain, or in the tokenizer's chat template."""

from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from rcc_hf.evaluation.encoding import check_template, encode_text, prompt_text
from rcc_hf.evaluation.prompts import Subset, fill
from rcc_hf.objectives.checks import check_positive, check_share
from rcc_hf.objectives.turns import closing_id
from rcc_hf.texts import QARow

__all__ = ["Prompter", "Template", "encode_behind", "phrase"]

Template = Callable[[Sequence[str]], Subset]
"""What of evaluation a question with these answers is put into, such as `template_of`."""


def phrase(row: QARow, template: Template | None) -> tuple[str, str]:
    """What is asked, and how the answer begins.

    Args:
        row: One with a prefix is phrased already.
        template: Of the answers, for a question that is not; None leaves all as they are.
    """
    if template is None or row.answer_prefix:
        return row.question, row.answer_prefix
    example = fill(template(row.answers), "", list(row.answers), {"context": "", "question": row.question})
    return example.question, example.answer_prefix


class Prompter:
    """Encodes what stands behind a context.

    Args:
        tokenizer: Of the model; needs an end-of-text token.
        chat_share: Share of prompts that are in its chat template.
        max_answer: Tokens of an answer; of a longer one the beginning is predicted, and no end. None: no limit.

    Raises:
        ValueError: a number is out of range, or the tokenizer has no template or no end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat_share: float = 0.0, max_answer: int | None = None):
        check_share("chat_share", chat_share)
        if max_answer is not None:
            check_positive("max_answer", max_answer)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-text token, so no answer would end; set tokenizer.eos_token")
        if chat_share:
            check_template(tokenizer)
        self.tokenizer = tokenizer
        self._chat_share, self._max_answer = chat_share, max_answer
        self._end_id = tokenizer.eos_token_id
        self._chat_end_id = closing_id(tokenizer, self._end_id) if chat_share else self._end_id

    def draw_chat(self, rng: np.random.Generator) -> bool:
        """Whether the next prompt is in the chat template."""
        return bool(rng.random() < self._chat_share)

    def encode(self, question: str, prefix: str, answer: str, *, chat: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the prompt `[P]`, which are those of evaluation, and of the answer with its end `[A]`."""
        return self.encode_answer(prompt_text(self.tokenizer, question, prefix, chat=chat), answer, chat=chat)

    def encode_answer(self, prompt: str, answer: str, *, chat: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a finished prompt `[P]`, and of the answer with its end `[A]`."""
        space = "" if not prompt or prompt[-1].isspace() or answer[:1].isspace() else " "
        prompt_ids, answer_ids = encode_behind(self.tokenizer, prompt, space + answer)
        if self._max_answer is not None and len(answer_ids) > self._max_answer:
            return prompt_ids, answer_ids[: self._max_answer]
        return prompt_ids, np.append(answer_ids, self._chat_end_id if chat else self._end_id)


def encode_behind(tokenizer: PreTrainedTokenizerBase, first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a text, which are its own, and of another behind it.

    The second is tokenized as what follows the first, unless a token would reach across, which a model that is given
    the first cannot write.
    """
    front, whole = (encode_text(tokenizer, text).numpy() for text in (first, first + second))
    if np.array_equal(whole[: len(front)], front):
        return front, whole[len(front) :]
    return front, encode_text(tokenizer, second).numpy()
