# SPDX-License-Identifier: Apache-2.0
"""Controls: the reading of another example's context, which an answer must not come from."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rcc_hf.evaluation.methods_base import ContextMethod, Reading
from rcc_hf.evaluation.methods_decoding import check_ids
from rcc_hf.evaluation.methods_raw import Full
from rcc_hf.evaluation.methods_rcc import Compressed

__all__ = ["Wrong", "WrongCompressed", "choose_others"]


def choose_others(contexts: Sequence[Tensor], others: Sequence[Tensor] = ()) -> list[Tensor]:
    """For each context another one: the next of the batch, around its end, or else of `others`, that differs from it.

    No context stays none: there is nothing that could be wrong.

    Raises:
        ValueError: if there is none.
    """
    chosen = []
    for index, context in enumerate(contexts):
        candidates = (*contexts[index + 1 :], *contexts[:index], *others)
        differing = (other for other in candidates if len(other) and not torch.equal(other.cpu(), context.cpu()))
        found = next(differing, None) if len(context) else context
        if found is None:
            raise ValueError(
                f"context {index} of {len(contexts)} has no other beside it to be read in its place; read at least two "
                "different contexts at a time, or give some as others="
            )
        chosen.append(found)
    return chosen


class _OfAnother(ContextMethod):
    """Reads another context in the place of each; the method beside it in the class says how.

    Args:
        model: as for `ContextMethod`.
        others: contexts `[T]` to take where a batch has no second one.
        options: as for `ContextMethod`.
    """

    def __init__(self, model: PreTrainedModel, *, others: Sequence[Tensor] = (), **options: Any):
        super().__init__(model, **options)
        self._others = tuple(others)

    def read(self, contexts: Sequence[Tensor]) -> Reading:
        check_ids("contexts", contexts)
        # that of Full or Compressed, which stand behind this class
        return super().read(choose_others(contexts, self._others))  # type: ignore[safe-super]


class Wrong(_OfAnother, Full):
    """`full` of another context; arguments are those of `_OfAnother`."""

    name = "wrong"


class WrongCompressed(_OfAnother, Compressed):
    """`rcc` of another context; arguments are those of `_OfAnother`."""

    name = "wrong-rcc"
