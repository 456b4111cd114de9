# SPDX-License-Identifier: Apache-2.0
"""What is kept of a context, and answering from it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rcc_hf.modeling.modeling_rcc import RCCForCausalLM

__all__ = ["METHODS", "ContextMethod", "Reading", "make_method"]


@dataclass(frozen=True)
class Reading:
    """What a method keeps of a batch of contexts.

    Attributes:
        nbytes: Of each row the bytes of what is kept.
        num_entries: Of each row the KV entries that are kept, per layer.
        kept: Private to the method.
    """

    nbytes: tuple[int, ...]
    num_entries: tuple[int, ...]
    kept: tuple[Any, ...]

    def select(self, rows: Sequence[int]) -> "Reading":
        """The given rows, in that order and as often as named."""
        return Reading(*(tuple(part[row] for row in rows) for part in (self.nbytes, self.num_entries, self.kept)))


class ContextMethod(ABC):
    """One way of keeping contexts."""

    name: ClassVar[str]

    def __init__(self, model: RCCForCausalLM | PreTrainedModel, *, ratio: int):
        self.model, self.ratio = model, ratio

    @abstractmethod
    def read(self, contexts: Sequence[Tensor]) -> Reading:
        """Keep contexts `[T_i]`."""

    def generate(
        self, reading: Reading, prompts: Sequence[Tensor], *, max_new_tokens: int, stop_ids: frozenset[int]
    ) -> list[Tensor]:
        """New ids behind a prompt `[T_i]` for each row, greedily, without the stop id."""
        made = []
        for kept, prompt in zip(reading.kept, prompts, strict=True):
            ids, ways = self._inputs(kept, prompt)
            untyped: Any = self.model
            eos = sorted(stop_ids) or None
            out = untyped.generate(ids, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos, **ways)
            new = out[0, ids.shape[1] :]
            stops = [place for place, token in enumerate(new.tolist()) if token in stop_ids]
            made.append(new[: stops[0]] if stops else new)
        return made

    @torch.no_grad()
    def nll(self, reading: Reading, targets: Sequence[Tensor]) -> list[Tensor]:
        """Nats of each token of the targets `[T_i]`; of the first not a number where nothing predicts it."""
        nats = []
        for kept, target in zip(reading.kept, targets, strict=True):
            ids, ways = self._inputs(kept, target)
            logits = self.model(ids, use_cache=False, **ways).logits[0, -len(target) - 1 : -1].double()
            behind = target[len(target) - len(logits) :]
            found = -logits.log_softmax(-1).gather(-1, behind[:, None])[:, 0]
            nats.append(torch.cat([found.new_full((len(target) - len(found),), torch.nan), found]))
        return nats

    def _inputs(self, kept: Any, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        ways = {"compress": False} if isinstance(self.model, RCCForCausalLM) else {}
        return torch.cat([kept, ids])[None], ways

    def _bytes(self, num_entries: int) -> int:
        text = self.model.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return 2 * text.num_hidden_layers * heads * width * num_entries * self.model.dtype.itemsize


class Full(ContextMethod):
    """Everything raw."""

    name = "full"

    def read(self, contexts: Sequence[Tensor]) -> Reading:
        lengths = tuple(map(len, contexts))
        return Reading(tuple(map(self._bytes, lengths)), lengths, tuple(contexts))


class Nothing(ContextMethod):
    """No context."""

    name = "none"

    def read(self, contexts: Sequence[Tensor]) -> Reading:
        zeros = (0,) * len(contexts)
        return Reading(zeros, zeros, tuple(context[:0] for context in contexts))


class Compressed(ContextMethod):
    """The slots of `model.compress`."""

    name = "rcc"

    def __init__(self, model: RCCForCausalLM | PreTrainedModel, *, ratio: int):
        if not isinstance(model, RCCForCausalLM):
            raise ValueError("the method rcc needs an RCC checkpoint, and this is a plain base; use rcc convert first")
        super().__init__(model, ratio=ratio)

    def read(self, contexts: Sequence[Tensor]) -> Reading:
        segment = self.model.config.segment_length
        kept = [
            context if len(context) < segment else self.model.compress(context[None], ratio=self.ratio)
            for context in contexts
        ]
        entries = tuple(len(k) if isinstance(k, Tensor) else k.num_slots + k.num_local for k in kept)
        return Reading(tuple(map(self._bytes, entries)), entries, tuple(kept))

    def _inputs(self, kept: Any, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        if isinstance(kept, Tensor):
            return super()._inputs(kept, ids)
        return ids[None], {"memory": kept}


METHODS: dict[str, type[ContextMethod]] = {method.name: method for method in (Compressed, Full, Nothing)}


def make_method(name: str, model: RCCForCausalLM | PreTrainedModel, ratio: int, **options: Any) -> ContextMethod:
    """The method of a name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in METHODS:
        raise ValueError(f"method is {name!r}; it must be one of {', '.join(METHODS)}")
    return METHODS[name](model, ratio=ratio)
