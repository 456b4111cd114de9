# SPDX-License-Identifier: Apache-2.0
"""Pass keys and other needles planted in text at random places; their values are asked for."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rcc_hf.evaluation.encoding import encode_text
from rcc_hf.objectives.base import Shape, build_example
from rcc_hf.objectives.checks import check_positive
from rcc_hf.objectives.haystacks import Haystack, python_random
from rcc_hf.objectives.phrasings import PHRASINGS, Phrasing, Planted
from rcc_hf.objectives.prompting import Prompter

__all__ = ["Needles"]

_TRIES = 8
_ENDS = (".", "!", "?", "\n", '."', '!"', '?"', ".\n", ".\n\n", "\n\n")


class Needles:
    """Sentences with values are hidden in text, and one or several of the values have to be written down.

    They stand behind ends of sentences, where the text has any.

    Args:
        haystacks: Where the text around them comes from, each as often as any other.
        tokenizer: Of the model.
        phrasings: How they are worded, each as often as any other; all known ones by default.
        max_needles: At most so many in one context; as many as its length has room for.
        chat_share: Share of prompts in the tokenizer's chat template.
        distill: Whether an uncompressed teacher reads the same.
        name: For tables.

    Raises:
        ValueError: there is no haystack, a number is out of range, or the tokenizer has no template or no end.
    """

    def __init__(
        self,
        haystacks: Sequence[Haystack],
        tokenizer: PreTrainedTokenizerBase,
        *,
        phrasings: Mapping[str, Phrasing] | None = None,
        max_needles: int = 8,
        chat_share: float = 0.0,
        distill: bool = False,
        name: str = "needles",
    ):
        check_positive("max_needles", max_needles)
        if not haystacks:
            raise ValueError("there is no haystack; give at least one, for example ShardText(shards)")
        self.name = name
        self._haystacks, self._tokenizer = list(haystacks), tokenizer
        self._phrasings = list((PHRASINGS if phrasings is None else phrasings).values())
        self._max_needles, self._distill = max_needles, distill
        self._prompter = Prompter(tokenizer, chat_share=chat_share)
        self._end_ids = _find_ends(tokenizer)

    def example(self, rng: np.random.Generator, shape: Shape) -> dict[str, Tensor]:
        planted, intro, needles = self._draw(rng, shape)
        room = shape.context_length - len(intro) - sum(map(len, needles))
        haystack = self._haystacks[int(rng.integers(len(self._haystacks)))]
        context = np.concatenate([intro, *self._plant(rng, haystack.draw(rng, room), needles)])
        answer = ", ".join(planted.answers)
        prompt, target = self._prompter.encode(
            planted.question, planted.answer_prefix, answer, chat=self._prompter.draw_chat(rng)
        )
        teacher = context if self._distill else None
        return build_example(context, [(prompt, False), (target, True)], teacher_context=teacher)

    def _draw(self, rng: np.random.Generator, shape: Shape) -> tuple[Planted, np.ndarray, list[np.ndarray]]:
        """What is planted, and the ids of introduction and needles, which leave room for half as much text again."""
        generator, most = python_random(rng), self._max_needles
        for _ in range(_TRIES):
            planted = self._phrasings[int(rng.integers(len(self._phrasings)))](generator, most)
            intro, *needles = (encode_text(self._tokenizer, t).numpy() for t in (planted.intro, *planted.needles))
            if 3 * (len(intro) + sum(map(len, needles))) <= 2 * shape.context_length:
                return planted, intro, needles
            most = max(1, most // 2)
        raise ValueError(
            f"a context of {shape.context_length} tokens has no room for needles; use more or longer segments"
        )

    def _plant(self, rng: np.random.Generator, text: np.ndarray, needles: Sequence[np.ndarray]) -> list[np.ndarray]:
        ends = np.flatnonzero(np.isin(text, self._end_ids)) + 1
        possible = np.append(ends, 0) if len(ends) else np.arange(len(text) + 1)
        wanted = np.sort(rng.integers(0, len(text) + 1, len(needles)))
        places = np.sort([possible[np.abs(possible - place).argmin()] for place in wanted])
        pieces = np.split(text, places)
        between = [part for pair in zip(pieces, needles, strict=False) for part in pair]
        return [*between, pieces[-1]]


def _find_ends(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The tokens that end a sentence."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return np.array([token for token, text in enumerate(texts) if text in _ENDS], dtype=np.int64)
