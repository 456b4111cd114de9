# SPDX-License-Identifier: Apache-2.0
"""Times two sides in turns: medians of repeated runs, memory, and what to do when one side fails or time runs out."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

OK, NO_MEMORY, FAILED, SKIPPED, UNAVAILABLE = "ok", "out of memory", "failed", "skipped", "unavailable"
CRASHED = "crashed"
"""Of an error after which a process cannot use its GPU any more."""
FINAL = (OK, NO_MEMORY)
"""What was measured."""


@dataclass(frozen=True)
class Sample:
    """One run: the seconds that count, what else was seen, and seconds of compiling in front of it."""

    seconds: float
    facts: Mapping[str, Any] = field(default_factory=dict)
    preparing: float = 0.0


class Budget:
    """Seconds that a call may take in all; None: as many as it needs."""

    def __init__(self, seconds: float | None = None):
        self._end = None if seconds is None else time.perf_counter() + seconds

    def left(self) -> float:
        return float("inf") if self._end is None else self._end - time.perf_counter()


@dataclass(frozen=True)
class Limits:
    """How often a side runs.

    Attributes:
        repeats: Runs that count, at most. There is one more in front of them, to warm up.
        row_seconds: Where runs are long, no further one is begun that would end after so many seconds; if that leaves
            the first alone, it counts.
        budget: Of the whole call.
    """

    repeats: int
    row_seconds: float
    budget: Budget


def wait(device: torch.device) -> None:
    """Until all is done that the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What a function returns, and the seconds until its work on the device is done."""
    wait(device)
    start = time.perf_counter()
    result = function()
    wait(device)
    return result, time.perf_counter() - start


def free(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def forget_peak(device: torch.device) -> None:
    """The peak of allocated memory is counted from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so; on a CPU, and in cuBLAS, no class of its own does."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("can't allocate memory", "not enough memory", "ALLOC_FAILED", "out of memory")
    )


def status_of(error: BaseException) -> tuple[str, str]:
    """What an error means for a row, and its first line."""
    status = NO_MEMORY if is_out_of_memory(error) else CRASHED if "CUDA error" in str(error) else FAILED
    return status, f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median and quartiles of at least one run."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"seconds": seconds, "median_seconds": middle, "quartiles_seconds": [low, high]}


class Side:
    """The runs of one side."""

    def __init__(self, function: Callable[[], Sample], device: torch.device, warm_up: bool):
        self.function, self.device, self.warm_up = function, device, warm_up
        self.status, self.reason = OK, ""
        self.samples: list[Sample] = []
        self.walls: list[float] = []
        self.peak = 0

    def give_up(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason

    def wants_more(self, limits: Limits) -> bool:
        """Whether there is another run, and time for it."""
        if self.status != OK:
            return False
        if not self.walls:
            return True
        last = self.walls[-1]
        spent = sum(self.walls[1:] if self.warm_up else self.walls)
        if self.warm_up and len(self.walls) == 1:  # that one does not count, and compiling may have been most of it
            return limits.budget.left() > 0
        return len(self.walls) <= limits.repeats and spent + last <= limits.row_seconds and limits.budget.left() > last

    def run(self) -> None:
        """Once; a second time if there was too little memory, which may have been the other side's."""
        for _ in range(2):
            status, reason = self._attempt()
            if status != NO_MEMORY:
                break
            free(self.device)
        if status != OK:
            self.give_up(status, reason)

    def _attempt(self) -> tuple[str, str]:
        forget_peak(self.device)
        try:
            sample, wall = timed(self.function, self.device)
        except Exception as error:  # noqa: BLE001 -- that a side fails is a result, and its reason is written down
            return status_of(error)
        self.samples.append(sample)
        self.walls.append(wall - sample.preparing)
        self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0)
        return OK, ""

    def result(self) -> dict[str, Any]:
        """For the row: status, times, facts of the last run."""
        found: dict[str, Any] = {"status": self.status}
        if self.reason:
            found["reason"] = self.reason
        if self.status == OK:
            counted = self.samples[1:] or self.samples
            found |= summary([sample.seconds for sample in counted])
            found |= {"warmed_up": len(self.samples) > 1, "wall_seconds": self.walls[-1]}
            found |= {"peak_bytes": self.peak or None, **counted[-1].facts}
        return found


def compare(
    sides: Mapping[str, Callable[[], Sample]],
    limits: Limits,
    device: torch.device,
    *,
    warm_up: bool = False,
    expected: Mapping[str, float] | None = None,
) -> dict[str, dict[str, Any]]:
    """Results of all sides, which take turns, run by run.

    Args:
        sides: What is run once for one sample, by name.
        limits: How often.
        device: On which they work.
        warm_up: Whether the first run never counts, however long it took: where something is compiled.
        expected: Seconds that a run will about take; a side is skipped whose run would not fit into the budget.
    """
    runs = {name: Side(function, device, warm_up) for name, function in sides.items()}
    for name, side in runs.items():
        seconds = (expected or {}).get(name, 0.0)
        if seconds > limits.budget.left():
            side.give_up(SKIPPED, f"about {seconds:.0f} s a run, and {max(0, limits.budget.left()):.0f} s were left")
    while waiting := [side for side in runs.values() if side.wants_more(limits)]:
        for side in waiting:
            if any(other.status == CRASHED for other in runs.values()):
                side.give_up(SKIPPED, "the other side had crashed the GPU")
            else:
                side.run()
    return {name: side.result() for name, side in runs.items()}
