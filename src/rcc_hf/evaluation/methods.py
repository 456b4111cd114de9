# SPDX-License-Identifier: Apache-2.0
"""The methods that an evaluation compares, by name: the compressor, what bounds it from both sides, and baselines.

All bounded ones (`truncate-head`, `truncate-tail`, `window-sink`, `mean-pool`) keep as many entries of keys and values
as `rcc` does, slots and raw tokens together; see `budget`.
"""

from typing import Any

from transformers import PreTrainedModel

from rcc_hf.evaluation.methods_base import ContextMethod, Reading, budget
from rcc_hf.evaluation.methods_pool import MeanPool
from rcc_hf.evaluation.methods_raw import Full, Nothing, TruncateHead, TruncateTail, WindowSink
from rcc_hf.evaluation.methods_rcc import Compressed
from rcc_hf.evaluation.methods_wrong import Wrong, WrongCompressed

__all__ = ["METHODS", "ContextMethod", "Reading", "budget", "make_method"]

METHODS: dict[str, type[ContextMethod]] = {
    method.name: method
    for method in (
        Compressed,
        Full,
        Nothing,
        TruncateHead,
        TruncateTail,
        WindowSink,
        MeanPool,
        Wrong,
        WrongCompressed,
    )
}


def make_method(name: str, model: PreTrainedModel, ratio: int, **options: Any) -> ContextMethod:
    """The method of that name.

    Args:
        name: one of `METHODS`.
        model: an `RCCForCausalLM`, or a base model for any method that does not compress with it.
        ratio: source tokens per slot.
        options: `segment_length` and `head_length` for the budget with a base model (1024 and 0); for `wrong` and
            `wrong-rcc` further contexts, `others`; `prefix_length`, the tokens that begin every context (0).

    Raises:
        ValueError: if there is no such method, it needs another model, or the ratio is impossible.
    """
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name](model, ratio=ratio, **options)
