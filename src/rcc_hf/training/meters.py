# SPDX-License-Identifier: Apache-2.0
"""Losses and token accuracy by objective, summed on the device and looked at only when they are logged."""

from typing import TypeVar

from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import Tensor

__all__ = ["Meter", "of_all_processes"]

Value = TypeVar("Value")


def of_all_processes(value: Value) -> list[Value]:
    """The values of all processes, each of which has to call it."""
    return list(gather_object([value]))


class Meter:
    """Sums of `HeadLoss` by objective, over the batches of all processes."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, objective: str, sums: Tensor) -> None:
        """Count a batch; does not wait for the device.

        Args:
            objective: Name of what its examples ask for; empty if they do not say.
            sums: `[4]`: cross-entropy in nats, correct tokens, KL in nats, labelled tokens.
        """
        self._sums[objective] = self._sums[objective] + sums if objective in self._sums else sums

    def take(self, prefix: str = "") -> dict[str, float]:
        """What was counted since the last call, and start anew; all processes have to call it.

        Returns:
            `<prefix>cross_entropy`, `<prefix>token_accuracy` and, with a teacher, `<prefix>distillation`, each per
            labelled token over all objectives, and the same for every objective, with `_<objective>` behind it.
            Nothing if no token was labelled.
        """
        own = {name: sums.double().tolist() for name, sums in self._sums.items()}
        self._sums = {}
        totals: dict[str, list[float]] = {}
        for part in of_all_processes(own):
            for name, sums in part.items():
                for key in {"", name}:
                    old = totals.get(key, [0.0] * len(sums))
                    totals[key] = [a + b for a, b in zip(old, sums, strict=True)]
        return {key: value for name in sorted(totals) for key, value in _means(prefix, name, totals[name]).items()}


def _means(prefix: str, name: str, sums: list[float]) -> dict[str, float]:
    entropy, correct, divergence, count = sums
    if not count:
        return {}
    ending = f"_{name}" if name else ""
    found = {"cross_entropy": entropy / count, "token_accuracy": correct / count}
    if divergence:
        found["distillation"] = divergence / count
    return {f"{prefix}{key}{ending}": value for key, value in found.items()}
