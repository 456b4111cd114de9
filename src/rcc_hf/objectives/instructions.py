# SPDX-License-Identifier: Apache-2.0
"""Instructions that are compressed with the context, which RCC has the decoder write down before it follows them.

https://arxiv.org/abs/2406.06110, section 3.4.
"""

from collections.abc import Sequence
from typing import get_args

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rcc_hf.evaluation.benchmark_qa import template_of
from rcc_hf.evaluation.encoding import encode_text, prompt_text
from rcc_hf.evaluation.instructions import FOLLOW_CUE, REPEAT_CUE, SEPARATOR, InstructionMode, repeat_texts
from rcc_hf.objectives.base import Ids, Shape, build_example
from rcc_hf.objectives.gold import GoldContexts
from rcc_hf.objectives.haystacks import Haystack
from rcc_hf.objectives.prompting import Prompter, Template, encode_behind, phrase
from rcc_hf.objectives.questions import draw_answer
from rcc_hf.objectives.reconstruction import pad_segment
from rcc_hf.texts import QARow

__all__ = ["FOLLOW_CUE", "REPEAT_CUE", "InstructionMode", "Instructions"]


class Instructions:
    """Questions that stand in front of or behind the text, and are compressed with it.

    Args:
        rows: Instructions with contexts and answers.
        tokenizer: Of the model.
        mode: What becomes of the instruction.
        template: Of the answers, for rows without an answer prefix; None: their questions are phrased already.
        chat_share: Share of prompts in the tokenizer's chat template.
        haystack: Where other passages come from; None: contexts of other rows.
        alone_share: Share of examples whose passage stays alone, as far as there are rows of the right length.
        fill_id: Fills up the last segment of these; the end-of-text token by default.
        max_answer: Tokens of an answer, at most.
        distill: Whether an uncompressed teacher reads the same.
        name: For tables; `instructions_<mode>` by default.
        progress: Whether a bar is shown while contexts are tokenized.

    Raises:
        ValueError: there is no row, a value is out of range, or the tokenizer has no template or no end.
    """

    def __init__(
        self,
        rows: Sequence[QARow],
        tokenizer: PreTrainedTokenizerBase,
        *,
        mode: InstructionMode = "reconstructed",
        template: Template | None = template_of,
        chat_share: float = 0.0,
        haystack: Haystack | None = None,
        alone_share: float = 0.0,
        fill_id: int | None = None,
        max_answer: int = 256,
        distill: bool = False,
        name: str | None = None,
        progress: bool = True,
    ):
        if mode not in get_args(InstructionMode):
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(get_args(InstructionMode))}")
        self.name = name or f"instructions_{mode}"
        self._mode, self._distill = mode, distill
        self._prompter = Prompter(tokenizer, chat_share=chat_share, max_answer=max_answer)
        self._fill_id = tokenizer.eos_token_id if fill_id is None else fill_id
        self._phrased = [phrase(row, template) for row in rows]
        self._separator = encode_text(tokenizer, SEPARATOR).numpy()
        added = [self._added(index) for index in range(len(rows))]
        self._contexts = GoldContexts(
            rows, tokenizer, haystack=haystack, alone_share=alone_share, reserved=list(map(len, added)),
            progress=progress,
        )  # fmt: skip

    def example(self, rng: np.random.Generator, shape: Shape) -> dict[str, Tensor]:
        found = self._contexts.draw(rng, shape)
        added, is_first = self._added(found.index), bool(rng.random() < 0.5)
        text = self._join(added, found.ids, is_first)
        answer, chat = draw_answer(rng, found.row), self._prompter.draw_chat(rng)
        return build_example(
            pad_segment(text, shape.segment_length, self._fill_id),
            self._parts(*self._phrased[found.index], answer, chat),
            teacher_context=text if self._distill else None,
        )

    def _added(self, index: int) -> np.ndarray:
        """Ids of what is compressed beside the passages, the separator included."""
        if self._mode == "typed":
            return np.zeros(0, dtype=np.int64)
        question = self._phrased[index][0].strip()
        return np.concatenate([encode_text(self._prompter.tokenizer, question).numpy(), self._separator])

    def _join(self, added: np.ndarray, ids: np.ndarray, is_first: bool) -> np.ndarray:
        if is_first or not len(added):
            return np.concatenate([added, ids])
        question = added[: len(added) - len(self._separator)]
        return np.concatenate([ids, self._separator, question])

    def _parts(self, question: str, prefix: str, answer: str, chat: bool) -> list[tuple[Ids, bool]]:
        """Local tokens, and whether they are predicted."""
        tokenizer = self._prompter.tokenizer
        if self._mode == "compressed":
            prompt, target = self._prompter.encode(FOLLOW_CUE, prefix, answer, chat=chat)
            return [(prompt, False), (target, True)]
        if self._mode == "typed":
            typed = prompt_text(tokenizer, question, prefix, chat=chat)
            prompt, target = self._prompter.encode_answer(typed, answer, chat=chat)
            return [(prompt, False), (target, True)]
        cue, typed = repeat_texts(tokenizer, question, prefix, chat=chat)
        _, target = self._prompter.encode_answer(cue + typed, answer, chat=chat)
        shown, written = encode_behind(tokenizer, cue, typed)
        return [(shown, False), (written, True), (target, True)]
