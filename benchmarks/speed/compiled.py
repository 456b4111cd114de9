# SPDX-License-Identifier: Apache-2.0
"""Sides whose layers are compiled: only while they run, and in front of the first run that is timed."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from context import Context
from shapes import Pair
from timing import Sample, forget_peak, timed
from torch import nn

from rcc_hf.compiling import compiled_compressor, compiled_layers

BACKEND = "inductor"


def compiled(pair: Pair, side: str) -> AbstractContextManager[None]:
    """Within it a side runs compiled: all layers of the base, or ours while they compress."""
    if side == "rcc_compiled":
        return compiled_compressor(pair.rcc, backend=BACKEND)
    return compiled_layers(pair.base.model.layers, _always, dynamic=None, backend=BACKEND)


def _always(layer: nn.Module) -> bool:
    return True


def compiled_side(
    context: Context, side: str, run: Callable[[], Mapping[str, Any]], first: Callable[[], Any]
) -> Callable[[], Sample]:
    """What `Context.compare` takes.

    Args:
        context: Where it runs.
        side: "base_compiled" or "rcc_compiled".
        run: What is timed.
        first: What is done once, before: it compiles for all shapes that `run` has.
    """
    preparing: list[float] = []
    late = 0  # graphs that were compiled while time was taken

    def sample() -> Sample:
        nonlocal late
        new = not preparing
        with compiled(context.pair, side):
            if new:
                preparing.append(timed(first, context.device)[1])
                forget_peak(context.device)
            graphs = compiled_graphs()
            found = context.wall(run)
        late += compiled_graphs() - graphs
        facts = {"first_call_seconds": preparing[0], "graphs": late}
        return Sample(found.seconds, {**found.facts, **facts}, preparing=preparing[0] if new else 0.0)

    return sample


def compiled_graphs() -> int:
    """How many graphs this process has compiled: in a run that counts there should be no new ones."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
