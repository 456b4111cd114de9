# SPDX-License-Identifier: Apache-2.0
"""Questions made of any text: a few words of a sentence are asked for by the words around them."""

import random
import re
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rcc_hf.evaluation.benchmark_qa import SHORT_ANSWER
from rcc_hf.evaluation.prompts import fill
from rcc_hf.objectives.base import Shape, build_example
from rcc_hf.objectives.checks import check_positive, check_share
from rcc_hf.objectives.haystacks import ShardWindows, python_random
from rcc_hf.objectives.prompting import Prompter
from rcc_hf.objectives.reconstruction import cut_at_times, pad_segment
from rcc_hf.texts import TokenShards

__all__ = ["Cloze"]

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'\u201d\u2019)]*\s+")
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_BLANKS = ("____", "...", "_", "[...]")
_ASKED = {"name": ("who", "what", "which", "where"), "number": ("how many", "when", "what number"), "other": ("what",)}
_MIN_WORDS, _MIN_LETTERS, _TRIES = 6, 4, 8


@dataclass(frozen=True)
class _Gap:
    """A sentence whose middle is asked for."""

    before: str
    answer: str
    after: str
    kind: str


class Cloze:
    """Sentences of the context come back with a gap, or as a question; what is missing is written down.

    Gaps are names and numbers where a sentence has any, else a few words. What is left of the sentence may lose its
    ends and single words, so that it has to be found by some of its words, as with a question (cloze questions for
    reading: https://arxiv.org/abs/1906.04980).

    Args:
        shards: Documents.
        tokenizer: Of the model.
        num_questions: So many behind one context, one behind the other; fewer where it has too few sentences.
        max_local: Tokens of all of them at most; what is more is left out, but for the first one.
        dropped: Share of the words of a question that are left out, at most.
        pad_share: Share of examples whose last segment is only partly text.
        chat_share: Share of prompts in the tokenizer's chat template.
        distill: Whether an uncompressed teacher reads the same, without what fills a segment up.
        name: For tables.

    Raises:
        ValueError: a number is out of range, or the tokenizer has no template or no end.
    """

    def __init__(
        self,
        shards: TokenShards,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_questions: int = 6,
        max_local: int = 384,
        dropped: float = 0.3,
        pad_share: float = 0.0,
        chat_share: float = 0.0,
        distill: bool = False,
        name: str = "cloze",
    ):
        for key, value in (("num_questions", num_questions), ("max_local", max_local)):
            check_positive(key, value)
        for key, share in (("dropped", dropped), ("pad_share", pad_share)):
            check_share(key, share)
        self.name = name
        self._windows, self._tokenizer = ShardWindows(shards), tokenizer
        self._num_questions, self._max_local, self._dropped = num_questions, max_local, dropped
        self._pad_share, self._distill = pad_share, distill
        self._prompter = Prompter(tokenizer, chat_share=chat_share)

    def example(self, rng: np.random.Generator, shape: Shape) -> dict[str, Tensor]:
        for _ in range(_TRIES):
            text = self._windows.draw(rng, shape.context_length)
            text = cut_at_times(rng, text, shape.segment_length, self._pad_share)
            parts = self._parts(python_random(rng), text, chat=self._prompter.draw_chat(rng))
            if parts:
                context = pad_segment(text, shape.segment_length, self._tokenizer.eos_token_id)
                return build_example(context, parts, teacher_context=text if self._distill else None)
        raise ValueError(
            f"{_TRIES} contexts of {shape.context_length} tokens had no sentence of {_MIN_WORDS} words to ask about; "
            "use more or longer segments, or other texts"
        )

    def _parts(self, generator: random.Random, text: np.ndarray, *, chat: bool) -> list[tuple[np.ndarray, bool]]:
        """Questions and answers, as parts of an example."""
        parts: list[tuple[np.ndarray, bool]] = []
        length = 0
        whole = str(self._tokenizer.decode(text, skip_special_tokens=True))
        for sentence in _draw_sentences(generator, whole, self._num_questions):
            gap = _draw_gap(generator, sentence)
            question, prefix = self._ask(generator, gap)
            prompt, answer = self._prompter.encode(question, prefix, gap.answer, chat=chat)
            length += len(prompt) + len(answer)
            if parts and length > self._max_local:
                break
            parts += [(prompt, False), (answer, True)]
        return parts

    def _ask(self, generator: random.Random, gap: _Gap) -> tuple[str, str]:
        """What is asked, and how the answer begins."""
        share = generator.uniform(0, self._dropped)
        before = _thin(generator, _cut(generator, gap.before.split(), at_end=False), share)
        after = _thin(generator, _cut(generator, gap.after.split(), at_end=True), share)
        if generator.random() < 0.5:
            asked = generator.choice(_ASKED[gap.kind])
            sentence = " ".join([*before, asked, *after]).rstrip(".!?\"'\u201d\u2019 ") + "?"
        else:
            sentence = " ".join([*before, generator.choice(_BLANKS), *after])
        if generator.random() < 0.7:
            example = fill(SHORT_ANSWER, "", [gap.answer], {"context": "", "question": sentence})
            return example.question, example.answer_prefix
        return f"\n\nWhat does the text say here? {sentence}\n", ""


def _draw_sentences(generator: random.Random, text: str, most: int) -> list[str]:
    """Sentences in any order, without those that the text's ends may have cut."""
    sentences = [" ".join(part.split()) for part in _SENTENCE_END.split(text)[1:-1]]
    possible = [one for one in sentences if len(_WORD.findall(one)) >= _MIN_WORDS]
    return generator.sample(possible, min(most, len(possible)))


def _draw_gap(generator: random.Random, sentence: str) -> _Gap:
    words = list(_WORD.finditer(sentence))
    found: dict[str, list[tuple[int, int]]] = {"name": [], "number": [], "other": []}
    at = 1  # a first word is capital in any case
    while at < len(words):
        end = at + 1
        if any(letter.isdigit() for letter in words[at].group()):
            found["number"].append((at, end))
        elif words[at].group()[0].isupper() and len(words[at].group()) > 1:
            while end < len(words) and end < at + 4 and _joined(sentence, words, end):
                end += 1
            found["name"].append((at, end))
        elif len(words[at].group()) >= _MIN_LETTERS:
            found["other"].append((at, min(len(words), at + generator.choice((1, 1, 2, 3)))))
        at = end
    kinds = [kind for kind in ("name", "number") if found[kind]]
    kind = generator.choice(kinds) if kinds and (generator.random() < 0.7 or not found["other"]) else "other"
    first, last = generator.choice(found[kind] or [(len(words) - 1, len(words))])
    begin, end = words[first].start(), words[last - 1].end()
    return _Gap(sentence[:begin], sentence[begin:end], sentence[end:], kind)


def _joined(sentence: str, words: list[re.Match[str]], at: int) -> bool:
    """Whether a word goes on a name."""
    between = sentence[words[at - 1].end() : words[at].start()]
    return between in (" ", ". ") and words[at].group()[0].isupper()


def _cut(generator: random.Random, words: list[str], *, at_end: bool) -> list[str]:
    """The words next to the gap: all of them, or a few."""
    if len(words) <= 3 or generator.random() < 0.5:
        return words
    kept = generator.randint(3, len(words))
    return words[:kept] if at_end else words[-kept:]


def _thin(generator: random.Random, words: list[str], share: float) -> list[str]:
    return [word for word in words if generator.random() >= share]
