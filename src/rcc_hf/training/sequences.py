# SPDX-License-Identifier: Apache-2.0
"""Batches of long sequences, whose segments read the memories of all before them: the problem that engines solve."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rcc_hf.modeling.cache_rcc import RCCCache
from rcc_hf.modeling.decoding_rcc import decode_with_cache
from rcc_hf.modeling.modeling_rcc import RCCForCausalLM
from rcc_hf.modeling.positions_rcc import slot_positions
from rcc_hf.training.engines import Memory
from rcc_hf.training.losses import HeadLoss

__all__ = ["LongSequences"]


class LongSequences:
    """Sequences of whole segments; every segment but the first is read behind the slots of all before it.

    The first token of a segment is not predicted, since the last slot gives no logits. A memory is what a scheme keeps
    (`MemoryScheme.keep`), as a rule keys and values: made once, and read by every segment behind it.

    Attributes:
        num_segments: Of each sequence.
        at_a_time: Segments that are written together where their graph is given up at once.
        sums: `[4]`, the sums of `HeadLoss` over all segments read so far.

    Args:
        model: Compressor and decoder.
        ids: `[B, T * W]`.
        labels: The same, -100 where nothing is predicted, as in the first segment.
        ratio: Source tokens per slot; None: the model's.
        loss_of: From labels `[B, W]` of a segment to its loss.
        propagate: Runs backward from a loss; scales it if mixed precision asks for that.
        at_a_time: See above.

    Raises:
        ValueError: the length is no multiple of the segment length of at least two segments, or the scheme's segments
            depend on each other.
    """

    def __init__(
        self,
        model: RCCForCausalLM,
        ids: Tensor,
        labels: Tensor,
        *,
        ratio: int | None,
        loss_of: Callable[[Tensor], HeadLoss],
        propagate: Callable[[Tensor], None],
        at_a_time: int = 1,
    ):
        width = model.config.segment_length
        if ids.shape[1] % width or ids.shape[1] < 2 * width:
            raise ValueError(f"a sequence has {ids.shape[1]} tokens; it must be two or more whole segments of {width}")
        if not model.model.scheme.independent_writes:
            raise ValueError(
                f"scheme {model.config.scheme!r} writes a segment by looking at those before it, which gradient "
                "engines cannot take apart; train it by full backpropagation"
            )
        if model.config.head_length:
            raise ValueError(f"head_length={model.config.head_length}: train long sequences with head_length 0")
        self.num_segments, self.at_a_time = ids.shape[1] // width, at_a_time
        self._model, self._ratio = model, model.config.check_ratio(ratio)
        self._ids, self._labels = ids.split(width, 1), labels.split(width, 1)
        self._loss_of, self._propagate = loss_of, propagate
        self.sums = torch.zeros(4, device=ids.device)

    def write(self, segments: Sequence[int]) -> list[Memory]:
        scheme, decoder = self._model.model.scheme, self._model.model.language_model
        rows = torch.cat([self._ids[segment] for segment in segments])
        kept = scheme.keep(decoder, scheme.write(decoder, scheme.empty(decoder, len(rows)), rows, self._ratio))
        return list(zip(*(part.chunk(len(segments)) for layer in kept for part in layer), strict=True))

    def loss(self, segment: int, memories: Sequence[Memory]) -> Tensor:
        core, ids = self._model.model, self._ids[segment]
        parts = [torch.cat(part, -2) for part in zip(*memories, strict=True)]  # slots are on axis -2
        num_layers, num_slots = len(core.language_model.layers), parts[0].shape[-2]
        size = len(parts) // num_layers
        kept = tuple(tuple(parts[i : i + size]) for i in range(0, len(parts), size))
        tokens = [self._ratio] * num_slots
        positions, shift = slot_positions(core.config, None, (len(ids), num_slots), ids.device, tokens)
        cache = RCCCache(num_layers, read_only=True)
        entries = core.scheme.read(core.language_model, kept, positions, None)
        cache.start(entries, None, shift, local_length=ids.shape[1], input_length=ids.shape[1])
        measured = self._loss_of(self._labels[segment])
        loss = measured(decode_with_cache(core, cache, ids, None).last_hidden_state)
        assert measured.sums is not None
        self.sums = self.sums + measured.sums
        return loss

    def backward(self, loss: Tensor) -> None:
        self._propagate(loss)
