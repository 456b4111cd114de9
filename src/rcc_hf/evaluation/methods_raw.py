# SPDX-License-Identifier: Apache-2.0
"""Methods that keep some tokens of a context as they are: all of them, none, or as many as the budget allows."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from rcc_hf.evaluation.methods_base import Reading
from rcc_hf.evaluation.methods_decoding import check_ids
from rcc_hf.evaluation.methods_entries import EntriesMethod, prefill

__all__ = ["Full", "Nothing", "TruncateHead", "TruncateTail", "WindowSink"]

_NUM_SINKS = 4


class _Kept(EntriesMethod):
    """Reads the tokens that `keep` leaves as if they were the whole text, at positions from 0 on."""

    @abstractmethod
    def keep(self, context: Tensor) -> Tensor:
        """The tokens of a context `[T]` that stay."""

    def read(self, contexts: Sequence[Tensor]) -> Reading:
        check_ids("contexts", contexts)
        return self._reading(prefill(self.model, [self.keep(context) for context in contexts]))


def _ends(context: Tensor, num_first: int, size: int) -> Tensor:
    """The first tokens, and as many of the last ones as make it `size`; all of a context that is no longer."""
    size = min(size, len(context))
    num_first = min(num_first, size)
    return torch.cat([context[:num_first], context[len(context) - (size - num_first) :]])


class Full(_Kept):
    """All tokens: the base's own cache. Contexts beyond the base's range are read all the same."""

    name = "full"

    def keep(self, context: Tensor) -> Tensor:
        return context


class Nothing(_Kept):
    """No token: what the model knows without the context."""

    name = "none"

    def keep(self, context: Tensor) -> Tensor:
        return context[: self.prefix_length]


class TruncateHead(_Kept):
    """The last tokens; the head of the text is cut off."""

    name = "truncate-head"

    def keep(self, context: Tensor) -> Tensor:
        return _ends(context, self.prefix_length, self.budget(len(context)))


class TruncateTail(_Kept):
    """The first tokens; the tail of the text is cut off."""

    name = "truncate-tail"

    def keep(self, context: Tensor) -> Tensor:
        return context[: self.budget(len(context))]


class WindowSink(_Kept):
    """The first four tokens and the last ones, read anew as contiguous text.

    StreamingLLM (https://arxiv.org/abs/2309.17453) keeps the same tokens, but their keys and values come from a pass
    over all of the text, in which each token saw sinks and window only. What is here is its "sliding window with
    re-computation" plus sinks: nothing of the tokens in between is left in the entries.
    """

    name = "window-sink"

    def keep(self, context: Tensor) -> Tensor:
        return _ends(context, max(_NUM_SINKS, self.prefix_length), self.budget(len(context)))
