# SPDX-License-Identifier: Apache-2.0
"""Passes over the decoder in which adapters are on and layer inputs are tapped.

One set of weights serves as compressor and decoder; what differs is the *pass*: which adapters are added to the base's
linear maps, and what is read from or put into the input of each layer. The running pass is per thread, set by a `with`
block, and entered again when activation checkpointing replays a layer. Modules keep no state of it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

ADAPTERS = ("write", "read")
"""The kinds of adapters: the compressor's, and those that are on while decoding with memory."""

_RUNNING = threading.local()


class EndOfPass(Exception):  # no error
    """Raised by a tap that has seen all that its pass is for; the pass stands in `with suppress(EndOfPass)`."""


Tap = Callable[[int, nn.Module, Tensor], Tensor | None]
"""Called with layer index, layer and layer input `[B, T, D]`; a returned tensor takes the input's place."""


@dataclass(frozen=True, eq=False)
class Pass:
    """One way to run the decoder.

    Attributes:
        adapter: which adapters are on, one of `ADAPTERS`.
        tap: sees, and may replace, the input of every layer.
        rows: 0 where adapters stay off: for rows of the batch that have no memory `[B, 1, 1]`, or for all but slots
            `[1, T, 1]`; None for all on.
    """

    adapter: str
    tap: Tap | None = None
    rows: Tensor | None = None


def running_pass() -> Pass | None:
    """The pass that this thread is in, or None: the plain base model."""
    return getattr(_RUNNING, "value", None)


@contextmanager
def enter_pass(value: Pass | None) -> Iterator[None]:
    """Run the block in pass `value`; the former pass comes back however the block ends."""
    before = running_pass()
    _RUNNING.value = value
    try:
        yield
    finally:
        _RUNNING.value = before
