# SPDX-License-Identifier: Apache-2.0
"""The compressor itself as a method: contexts become memories, from which the model answers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rcc_hf.evaluation.methods_base import ContextMethod, Reading, entry_nbytes, is_rcc
from rcc_hf.evaluation.methods_decoding import Step, check_ids, pad_front
from rcc_hf.modeling.compressed_rcc import RCCMemory

__all__ = ["Compressed"]


class Compressed(ContextMethod):
    """`model.compress` at the ratio, then decoding with `memory=`.

    What is behind the last whole segment stays raw, and so does a context of less than a segment, unless segments are
    filled up. An entry counts the same as one of the base: slots are keys and values once they are decoded from.
    """

    name = "rcc"

    def __init__(self, model: PreTrainedModel, **options: Any):
        if not is_rcc(model):
            raise ValueError(
                f"method {self.name!r} needs a model that compresses, and {type(model).__name__} is a base model; make "
                "one with RCCForCausalLM.from_base, or choose another method"
            )
        super().__init__(model, **options)
        for name in ("segment_length", "head_length"):
            given, own = getattr(self, name), getattr(model.config, name)
            if given != own:
                raise ValueError(f"{name}={given} is not that of the model, {own}; leave it out")

    @torch.no_grad()
    def read(self, contexts: Sequence[Tensor]) -> Reading:
        check_ids("contexts", contexts)
        contexts = [self._fill(context) for context in contexts]
        # with a window of one segment, nothing to compress is no error
        is_short = max(map(len, contexts)) - self.head_length < self.segment_length
        window = self.segment_length if is_short else None
        ids, mask = pad_front(contexts, self.model.device)
        model: Any = self.model  # whose class is its own if its code came with the checkpoint
        memories = model.compress(ids, attention_mask=mask, ratio=self.ratio, window=window).unstack()
        sizes = tuple(memory.num_head + memory.num_slots + memory.num_local for memory in memories)
        return Reading(tuple(size * entry_nbytes(self.model) for size in sizes), sizes, tuple(memories))

    def _fill(self, context: Tensor) -> Tensor:
        """A context `[T]` whose last segment is filled up, if that is wished for."""
        behind = max(0, len(context) - self.head_length)
        if self.fill_id is None or not behind:
            return context
        return torch.cat([context, context.new_full((-behind % self.segment_length,), self.fill_id)])

    def _start(self, rows: Sequence[RCCMemory]) -> Step:
        memory, cache = RCCMemory.stack(rows), None

        def step(ids: Tensor, mask: Tensor | None, keep: int) -> Tensor:
            nonlocal cache
            front = {"memory": memory} if cache is None else {"past_key_values": cache}
            outputs = self.model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=keep, **front)
            cache = outputs.past_key_values
            return outputs.logits

        return step

    def _split(self, row: RCCMemory) -> tuple[RCCMemory, Tensor]:
        last = row.local_ids[0, -1:]
        return (replace(row, local_ids=row.local_ids[:, :-1]) if len(last) else row), last
