# SPDX-License-Identifier: Apache-2.0
"""Examples as token ids: what is compressed, and the prompt behind it."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rcc_hf.evaluation.examples import Example

__all__ = [
    "Encoder", "TextEncoder", "check_template", "encode_context", "encode_prompt", "encode_text", "prefix_ids",
    "prompt_text",
]  # fmt: skip

Encoder = Callable[[Example], tuple[Tensor, Tensor]]
"""Gives the ids of the context `[T]` and of the prompt `[t]`."""


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Ids `[T]` without special tokens."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Ids `[k]` that the tokenizer puts in front of every text unless told not to: often none, for Llama 3 its BOS."""
    text = "."
    plain, whole = encode_text(tokenizer, text).tolist(), tokenizer(text, verbose=False)["input_ids"]
    places = range(len(whole) - len(plain) + 1)
    start = next(place for place in places if whole[place : place + len(plain)] == plain)
    return torch.tensor(whole[:start], dtype=torch.long)


def encode_context(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Ids `[T]` of a text that comes first: as `encode_text`, behind `prefix_ids`.

    Every method reads them, so that they are in front of the whole text, or in the first segment (or in the head).
    """
    return torch.cat([prefix_ids(tokenizer), encode_text(tokenizer, text)])


def prompt_text(tokenizer: PreTrainedTokenizerBase, question: str, answer_prefix: str, *, chat: bool) -> str:
    """What stands between the context and the answer.

    Args:
        tokenizer: Of the model.
        question: Follows the context; in a chat it is the user's message, without the white space around it.
        answer_prefix: How the answer begins.
        chat: Whether the tokenizer's chat template is put around the question.
    """
    if chat:
        message = [{"role": "user", "content": question.strip()}]
        question = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    return question + answer_prefix


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool) -> Tensor:
    """Ids `[t]` of what stands behind a context, which has `prefix_ids` already: of a chat template's none are kept."""
    prompt, begin = encode_text(tokenizer, text), prefix_ids(tokenizer)
    is_twice = chat and len(begin) > 0 and torch.equal(prompt[: len(begin)], begin)
    return prompt[len(begin) :] if is_twice else prompt


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without a chat template.

    Raises:
        ValueError: it has none.
    """
    if not tokenizer.chat_template:
        raise ValueError("chat needs a chat template, and this tokenizer has none; leave it out")


class TextEncoder:
    """Encodes the context alone, and question and prefix as one text."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, chat: bool = False, max_context_length: int | None = None
    ):
        """Args:
            tokenizer: Of the model.
            chat: Whether the question is a message in the tokenizer's chat template, and the prefix how its answer
                begins. The context stands in front of both, outside the template, as with `rcc generate --chat`.
            max_context_length: What is longer loses its end, as in kvpress; tokens.

        Raises:
            ValueError: chat is wanted, and the tokenizer has no template.
        """
        if chat:
            check_template(tokenizer)
        self._tokenizer, self._chat, self._max_context_length = tokenizer, chat, max_context_length

    def __call__(self, example: Example) -> tuple[Tensor, Tensor]:
        """Ids of context and prompt.

        Raises:
            ValueError: the prompt would be empty.
        """
        text = prompt_text(self._tokenizer, example.question, example.answer_prefix, chat=self._chat)
        prompt = encode_prompt(self._tokenizer, text, chat=self._chat)
        if not len(prompt):
            raise ValueError(
                f"an example of task {example.task!r} has neither question nor answer_prefix; a model needs a prompt "
                "behind the context, so give at least one of them"
            )
        return encode_context(self._tokenizer, example.context)[: self._max_context_length], prompt
