# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a training step, by formula; and the rate at which a device multiplies matrices."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from rcc_hf.modeling.modeling_rcc import RCCForCausalLM
from rcc_hf.training.parts import part_of

__all__ = ["FlopsCounter", "Work", "matmul_rate"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a batch asks for, in tokens.

    Attributes:
        written: Tokens that are compressed.
        slots: What they are compressed to.
        rows: Rows of the batch.
        read: Entries of a row in the decoder's pass: slots and raw tokens.
        predicted: Tokens whose logits are computed.
        taught: Entries of a row in the teacher's pass; 0 without a teacher.
    """

    written: int
    slots: int
    rows: int
    read: int
    predicted: int
    taught: int = 0


class FlopsCounter:
    """Counts what a step needs, not what it does: recomputed layers count once, padding and slots as tokens.

    With P the parameters of the base's linear maps, W and R those of write and read adapters, M those of the slot maps,
    H those of the head, and a multiplication with an addition as 2:

    - forward: 2 (P + W) a compressed token, 2 (P + R) an entry of the decoder's pass, 2 M a slot, 2 H a prediction;
    - backward, for the gradient of inputs: as much again, in each pass in which anything is trained. There is none of
      weights that are frozen, so this is all of it for the base;
    - backward, for the gradient of weights: as much again, for adapters, maps or base that are trained;
    - attention, causal: 2 s^2 A forward for a sequence of s entries, with A query heads x their width x layers, and
      twice that backward, in passes that have a backward;
    - teacher: forward alone, and the head once more.

    Mixtures of experts count with all of their experts, which is too much.
    """

    def __init__(self, model: RCCForCausalLM):
        self.config, self.head = model.config, model.lm_head.weight.numel()
        sizes = dict.fromkeys(("write", "read", "maps", "base"), 0)
        self.trained = dict.fromkeys(sizes, False)
        for name, parameter in model.model.language_model.layers.named_parameters():
            part = part_of(f"layers.{name}")
            if parameter.ndim > 1:
                sizes[part] += parameter.numel()
            self.trained[part] |= parameter.requires_grad
        self.sizes = sizes
        text = model.config.text_config
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.attention = text.num_attention_heads * width * text.num_hidden_layers

    def works(self, batch: dict[str, object]) -> list[Work]:
        """The work of a batch, from the shapes of its tensors; of long texts, that of each segment."""
        sequences, ratio = batch.get("sequence_ids"), batch.get("ratio") or self.config.ratio
        if not isinstance(sequences, Tensor):
            return [self._work(batch)]
        assert isinstance(ratio, int)
        rows, width = len(sequences), self.config.segment_length
        count, slots = sequences.shape[1] // width, width // ratio
        written = rows * (count - 1)
        writing = Work(written=written * width, slots=written * slots, rows=0, read=0, predicted=0)
        read = [
            Work(written=0, slots=0, rows=rows, read=t * slots + width, predicted=rows * (width - 1))
            for t in range(1, count)
        ]
        return [writing, *read]

    def _work(self, batch: dict[str, object]) -> Work:
        local = batch["input_ids"]
        assert isinstance(local, Tensor)
        context, ratio = batch.get("context_ids"), batch.get("ratio") or self.config.ratio
        rows, length = len(local), context.shape[1] if isinstance(context, Tensor) else 0
        head = min(length, self.config.head_length)
        segments = (length - head) // self.config.segment_length
        compressed = segments * self.config.segment_length
        assert isinstance(ratio, int)
        places, taught = batch.get("label_places"), batch.get("teacher_ids")
        return Work(
            written=rows * compressed,
            slots=rows * compressed // ratio,
            rows=rows,
            read=compressed // ratio + length - compressed + local.shape[1],
            predicted=len(places) if isinstance(places, Tensor) else local.numel(),
            taught=taught.shape[1] if isinstance(taught, Tensor) else 0,
        )

    def count(self, work: Work) -> float:
        """Operations of forward and backward."""
        sizes, trained, segment = self.sizes, self.trained, self.config.segment_length
        writes_back = trained["write"] or trained["base"]  # a slot map is behind the write pass
        total = 0.0
        for tokens, adapter, length, goes_back in (
            (work.written, "write", segment, writes_back),
            (work.rows * work.read, "read", work.read, True),
        ):
            forward = 2.0 * tokens * (sizes["base"] + sizes[adapter])
            total += forward * (2 if goes_back else 1)
            total += 2.0 * tokens * sum(sizes[part] for part in ("base", adapter) if trained[part] and goes_back)
            total += 2.0 * tokens * length * self.attention * (3 if goes_back else 1)
        total += 2.0 * work.slots * sizes["maps"] * (1 + writes_back + trained["maps"])
        total += 2.0 * work.predicted * self.head * (2 + trained["base"])
        if work.taught:
            tokens = work.rows * work.taught
            total += 2.0 * tokens * sizes["base"] + 2.0 * tokens * work.taught * self.attention
            total += 2.0 * work.predicted * self.head
        return total


def matmul_rate(
    device: torch.device, size: int = 8192, dtype: torch.dtype = torch.bfloat16, repeats: int = 20
) -> float:
    """Operations a second of multiplying square matrices: the most that a step could reach on this device."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        left @ right
    _wait(device)
    return 2.0 * size**3 * repeats / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
