# SPDX-License-Identifier: Apache-2.0
"""How fast a run is: tokens a second, the share of what the device could multiply, and memory.

Time in which nothing is trained (evaluations, writing checkpoints) does not count. The first line of a run has the
time in it that compiling and allocating take.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rcc_hf.modeling.modeling_rcc import RCCForCausalLM
from rcc_hf.training.flops import FlopsCounter, matmul_rate
from rcc_hf.training.meters import of_all_processes

__all__ = ["Throughput"]


class Throughput:
    """Counts batches of all processes between two lines of the log."""

    def __init__(self, model: RCCForCausalLM, *, ceiling: float | None = None):
        """Args:
        model: What is trained, with its frozen parts frozen.
        ceiling: Operations a second that a device can do at most; None: measured on CUDA, else not known.
        """
        self._model, self._ceiling, self._flops = model, ceiling, FlopsCounter(model)
        self._reset()

    def _reset(self) -> None:
        self._source, self._tokens, self._operations, self._paused = 0, 0, 0.0, 0.0
        self._start: float | None = None

    def begin(self) -> None:
        """Start the clock if it is not running, and measure the ceiling if it is not given."""
        if self._start is not None:
            return
        device = self._model.device
        if self._ceiling is None and device.type == "cuda":
            self._ceiling = matmul_rate(device)
        self._reset()
        self._start = self._now()

    def count(self, batch: dict[str, Any]) -> None:
        """Add a batch; from shapes alone, so that the device is not waited for."""
        if self._start is None:
            return
        self._source += sum(batch[name].numel() for name in ("context_ids", "sequence_ids") if name in batch)
        self._tokens += sum(batch[name].numel() for name in ("input_ids", "sequence_ids") if name in batch)
        self._operations += self.operations(batch)

    def operations(self, batch: dict[str, Any]) -> float:
        """Floating-point operations that a batch asks for (see `FlopsCounter`)."""
        return sum(map(self._flops.count, self._flops.works(batch)))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block takes time that does not count."""
        start = self._now()
        try:
            yield
        finally:
            self._paused += self._now() - start

    def take(self) -> dict[str, float]:
        """What was counted since the last call, and start anew; all processes have to call it.

        Returns:
            `source_tokens_per_second`, `tokens_per_second`, `tflops_per_device` and, where they are known,
            `ceiling_share` and `peak_memory_gib`.
        """
        if self._start is None:
            return {}
        seconds = self._now() - self._start - self._paused
        own = (self._source, self._tokens, self._operations, self._peak())
        source, tokens, operations, peaks = zip(*of_all_processes(own), strict=True)
        rate = sum(operations) / seconds / len(operations)
        found = {
            "source_tokens_per_second": sum(source) / seconds,
            "tokens_per_second": (sum(source) + sum(tokens)) / seconds,
            "tflops_per_device": rate / 1e12,
        }
        found |= {"ceiling_share": rate / self._ceiling} if self._ceiling else {}
        found |= {"peak_memory_gib": max(peaks)} if max(peaks) else {}
        self._reset()
        self._start = self._now()
        return found

    def _peak(self) -> float:
        device = self._model.device
        return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0

    def _now(self) -> float:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return time.perf_counter()
