# SPDX-License-Identifier: Apache-2.0
"""How the answer is read out of what was generated, and how much that may be."""

from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rcc_hf.evaluation.examples import Example

__all__ = ["AnswerReader", "PlainAnswers"]


class AnswerReader(Protocol):
    """Finds answers in generated ids."""

    def limit(self, example: Example) -> int:
        """Tokens to generate, at most."""

    def stop_ids(self, stop_ids: frozenset[int]) -> frozenset[int]:
        """Of the ids that end an answer those at which generation ends."""

    def read(self, example: Example, ids: Tensor, stop_ids: frozenset[int]) -> tuple[str, dict[str, Any]]:
        """The answer in ids `[T]`, at most `limit`, and further columns of its row.

        Args:
            example: What was asked.
            ids: Generated up to the first of `self.stop_ids`.
            stop_ids: Those that end an answer.
        """


class PlainAnswers:
    """All that was generated is the answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer

    def limit(self, example: Example) -> int:
        return example.max_new_tokens

    def stop_ids(self, stop_ids: frozenset[int]) -> frozenset[int]:
        return stop_ids

    def read(self, example: Example, ids: Tensor, stop_ids: frozenset[int]) -> tuple[str, dict[str, Any]]:
        return str(self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)), {}
