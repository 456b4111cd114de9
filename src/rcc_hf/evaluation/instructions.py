# SPDX-License-Identifier: Apache-2.0
"""Questions that are compressed with the context, and written down again or not before the answer: how RCC asks.

https://arxiv.org/abs/2406.06110, section 3.4. Training and evaluation have these words in common.
"""

from bisect import bisect_left
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rcc_hf.evaluation.encoding import check_template, encode_context, encode_prompt, encode_text, prompt_text
from rcc_hf.evaluation.examples import Example

__all__ = [
    "FOLLOW_CUE", "REPEAT_CUE", "SEPARATOR", "InstructionEncoder", "InstructionMode", "WrittenInstructions",
    "repeat_texts",
]  # fmt: skip

InstructionMode = Literal["reconstructed", "typed", "compressed"]
"""`reconstructed`: the decoder writes down the compressed instruction, then the answer. `typed`: the instruction is not
compressed, the decoder reads it. `compressed`: the decoder writes the answer at once."""

SEPARATOR = "\n\n"
"""Between the context and the instruction that is compressed with it."""
REPEAT_CUE = "\n\nRepeat the instruction in the text above, then follow it:\n"
"""Asks for it outside of chats; in a chat what opens the user's message does."""
FOLLOW_CUE = "\n\nFollow the instruction in the text above.\n"

_SPARE = 16
"""Tokens that an instruction may take beyond its own."""


def repeat_texts(
    tokenizer: PreTrainedTokenizerBase, question: str, answer_prefix: str, *, chat: bool
) -> tuple[str, str]:
    """What stands behind a memory whose instruction is to be written down, and what is written before the answer.

    Args:
        tokenizer: Of the model.
        question: The instruction, which is written down without the white space around it.
        answer_prefix: How the answer begins, which the decoder writes too.
        chat: Whether it writes a message in the tokenizer's chat template, and what opens the reply.
    """
    typed = prompt_text(tokenizer, question, answer_prefix, chat=chat)
    start = typed.index(question.strip())
    return typed[:start] if chat else REPEAT_CUE, typed[start:]


class InstructionEncoder:
    """Encodes the context with the question behind it, and what stands behind both.

    Args:
        tokenizer: Of the model.
        mode: Whether the question is to be written down before the answer: `reconstructed`, or `compressed`.
        chat: Whether prompt and answer are in the tokenizer's chat template.
        max_context_length: A longer context loses its end, the question never; tokens.

    Raises:
        ValueError: the mode is another one, or chat is wanted, and the tokenizer has no template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mode: InstructionMode,
        *,
        chat: bool = False,
        max_context_length: int | None = None,
    ):
        if mode not in ("reconstructed", "compressed"):
            raise ValueError(f"mode is {mode!r}; questions are compressed in the modes reconstructed and compressed")
        if chat:
            check_template(tokenizer)
        self._tokenizer, self._mode, self._chat, self._limit = tokenizer, mode, chat, max_context_length

    @staticmethod
    def with_question(example: Example) -> Example:
        """The example with the question at the end of its context: of questions about one text each has its own.

        Raises:
            ValueError: there is no question.
        """
        question = example.question.strip()
        if not question:
            raise ValueError(
                f"an example of task {example.task!r} has no question that could be compressed; leave out such "
                "examples, or have questions typed"
            )
        return replace(example, context=example.context + SEPARATOR + question)

    def __call__(self, example: Example) -> tuple[Tensor, Tensor]:
        """Ids of context and prompt, of an example as `with_question` makes it.

        Raises:
            ValueError: the prompt would be empty.
        """
        tokenizer, question = self._tokenizer, example.question.strip()
        text = example.context.removesuffix(SEPARATOR + question)
        added = [encode_text(tokenizer, part) for part in (SEPARATOR, question)]  # apart, as in training
        context = torch.cat([encode_context(tokenizer, text)[: self._limit], *added])
        prompt = encode_prompt(tokenizer, self._shown(example), chat=self._chat)
        if not len(prompt):
            raise ValueError(
                "the chat template has nothing in front of a user's message, and a model needs a prompt behind the "
                "memory; leave out chat, or have questions typed"
            )
        return context, prompt

    def _shown(self, example: Example) -> str:
        if self._mode == "reconstructed":
            return repeat_texts(self._tokenizer, example.question, example.answer_prefix, chat=self._chat)[0]
        return prompt_text(self._tokenizer, FOLLOW_CUE, example.answer_prefix, chat=self._chat)


class WrittenInstructions:
    """An `AnswerReader` of answers that stand behind instructions which the decoder has written down.

    What the template or the answer's prefix puts between the two tells where the answer begins. Without it there is no
    answer. Where it is white space at most, only an instruction that is written down exactly tells.

    Args:
        tokenizer: Of the model.
        chat: Whether prompt and answer are in its chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False):
        self._tokenizer, self._chat = tokenizer, chat

    def limit(self, example: Example) -> int:
        """Tokens of instruction and answer, at most."""
        written = encode_text(self._tokenizer, self._written(example))
        return len(written) + _SPARE + example.max_new_tokens

    def stop_ids(self, stop_ids: frozenset[int]) -> frozenset[int]:
        """None: what ends a reply ends the message with the instruction too."""
        return frozenset()

    def read(self, example: Example, ids: Tensor, stop_ids: frozenset[int]) -> tuple[str, dict[str, Any]]:
        """The answer, and of the row `instruction` as it was written and `instruction_match`, 1 if that is exact."""
        written = self._written(example)
        tail = written[len(example.question.strip()) :]
        mark = tail if tail.strip() else written
        ends = sum(token in stop_ids for token in encode_text(self._tokenizer, written).tolist())
        made = _until(ids.tolist(), stop_ids, ends)
        times = written.count(mark)  # a question may hold what ends it
        start = bisect_left(range(len(made) + 1), times, key=lambda end: self._decode(made[:end]).count(mark))
        front, answer = self._decode(made[:start]), made[start : start + example.max_new_tokens]
        text = str(self._tokenizer.decode(answer, skip_special_tokens=True))
        return text, {
            "instruction": front.rpartition(mark)[0] if mark == tail and mark in front else front,
            "instruction_match": float(front.startswith(written)),
        }

    def _written(self, example: Example) -> str:
        return repeat_texts(self._tokenizer, example.question, example.answer_prefix, chat=self._chat)[1]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _until(ids: list[int], stop_ids: frozenset[int], passed: int) -> list[int]:
    """Ids up to the first that stops, but for so many that are passed."""
    stops = [place for place, token in enumerate(ids) if token in stop_ids]
    return ids[: stops[passed]] if len(stops) > passed else ids
