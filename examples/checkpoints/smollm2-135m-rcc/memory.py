# SPDX-License-Identifier: Apache-2.0
"""What a memory scheme is: verbs over a value.

`empty -> write, write, ... -> keep -> read -> keys and values the decoder attends to -> refresh`; training goes
`write -> decode` with the graph kept.

Letters for shapes, the same everywhere: `B` batch, `T` tokens, `S` segments, `W` tokens of a segment, `M` slots,
`L` layers, `H` key/value heads, `D` width (of a head in `[B, H, M, D]`).
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

State = Any
"""A pytree of tensors, one entry per layer, batch first and slots on axis -2: all that a scheme remembers."""


class MemoryScheme(ABC):
    """One way to remember. It owns no weights: those sit in the decoder's layers, where `build` puts them."""

    name: ClassVar[str]
    independent_writes: ClassVar[bool] = True
    """Whether a segment is written without looking at earlier ones; then many are written as rows of one batch."""
    nested_ratios: bool = False
    """Whether every second kept slot of a segment is what `write` gives at twice the ratio."""
    query_dependent: ClassVar[bool] = False
    """Whether what `read` shows changes with the tokens that follow; then `refresh` does something."""
    adapts_tokens: ClassVar[bool] = True
    """Whether read adapters act on tokens around the slots too; otherwise these are decoded by the plain base."""

    Options: ClassVar[type]
    """A frozen, keyword-only dataclass: the scheme's entries of `RCCConfig.scheme_options`."""
    options: Any

    def __init__(self, options: Any):
        self.options = options

    @abstractmethod
    def build(self, decoder: nn.Module) -> None:
        """Add what is trained inside the decoder's layers, as `layer.rcc`; the base's own weights keep their names."""

    @abstractmethod
    def empty(self, decoder: nn.Module, batch_size: int) -> State:
        """The memory of nothing."""

    @abstractmethod
    def write(self, decoder: nn.Module, state: State, segment: Tensor, ratio: int) -> State:
        """Remember one more segment in every row: ids `[B, W]` or embeddings `[B, W, D]`. `state` stays as it was."""

    @abstractmethod
    def keep(self, decoder: nn.Module, state: State) -> State:
        """The form in which a memory stores a state: free of positions, as small as `read` allows."""

    @abstractmethod
    def read(
        self,
        decoder: nn.Module,
        kept: State,
        position_ids: Tensor,
        mask: Tensor | None,
        head: list[tuple[Tensor, Tensor]] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys and values `[B, H, M, D]` of every layer for slots at `position_ids` `[B, M]`.

        `head` are those of raw tokens in front of the slots. `mask` is over head and slots, 0 at padding.
        """

    def refresh(self, decoder: nn.Module, cache: Any, input_ids: Tensor) -> None:
        """Called before each decoder step of a query-dependent scheme, with the tokens about to be decoded `[B, T]`."""

    @abstractmethod
    def decode(
        self,
        decoder: nn.Module,
        state: State,
        inputs_embeds: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        num_head: int = 0,
        rows: Tensor | None = None,
        **kwargs,
    ) -> Any:
        """The training path: decode `[B, H + T, D]` around `state` in one pass that keeps the graph and no cache.

        The slots stand behind the first `num_head` embeddings. `mask` and `position_ids` are `[B, H + M + T]`, and so
        are the rows of the output. Neither is given if all entries are real and positions count up from 0. `rows`
        `[B, 1, 1]` is 0 where a row has no slot, which is then decoded by the plain base.
        """
