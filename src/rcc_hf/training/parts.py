# SPDX-License-Identifier: Apache-2.0
"""The parts of a model that training treats apart: write adapters (and marks of slots), read adapters, slot maps, base.

`train_parts` frees some of them. A frozen part builds no graph of its own: with only the read adapters free, contexts
are compressed without a graph, as `compress` would, and what layers computed on the way is not kept.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rcc_hf.modeling.fingerprint_rcc import is_trained_part

__all__ = ["PARTS", "TRAINED_BY_DEFAULT", "Rates", "choose_parts", "parameter_groups", "part_of", "set_dtype"]

PARTS = ("write", "read", "maps", "base")
TRAINED_BY_DEFAULT = ("write", "read", "maps")


class Rates(Protocol):
    """What tells the learning rate of a part, and the weight decay: `TrainSettings`."""

    weight_decay: float

    def rate_of(self, part: str) -> float: ...


def part_of(name: str) -> str:
    """Which of `PARTS` a parameter of this name belongs to.

    Raises:
        ValueError: it is the compressor's, but of no known kind.
    """
    if not is_trained_part(name):
        return "base"
    kind = f".{name}".partition(".rcc.")[2].partition(".")[0]
    parts = {"write": "write", "mark": "write", "read": "read", "slot_map": "maps"}
    if kind not in parts:
        raise ValueError(f"the parameter {name} is of no known part of a compressor: {', '.join(parts)}")
    return parts[kind]


def choose_parts(model: nn.Module, parts: Iterable[str]) -> None:
    """Let only the named parts be trained.

    Raises:
        ValueError: one is unknown, or the model has no parameter in any.
    """
    chosen = set(parts)
    if chosen - set(PARTS):
        raise ValueError(f"parts {sorted(chosen - set(PARTS))} are not known; choose of {', '.join(PARTS)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in chosen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"this model has no parameters in the parts {', '.join(sorted(chosen))}: its ranks are 0")


def set_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the parameters that are trained a dtype; float32 keeps small updates from being rounded away."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def parameter_groups(model: nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """The parameters that are trained, in groups for the optimizer: one for each part, and for what does not decay.

    A compressor has no norms and no biases, which are commonly spared weight decay. All its parameters are factors of
    maps that start at zero or the identity and are added to something: decay draws them back to the base model. The
    exceptions are full slot maps (`map_rank=None`), which decay would draw to zero instead of the identity, and norms
    and biases of a base that is trained.
    """
    groups: dict[tuple[str, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), _decays(name, parameter)), []).append(parameter)
    return [
        {
            "params": groups[part, decays],
            "lr": rates.rate_of(part),
            "weight_decay": rates.weight_decay if decays else 0.0,
            "name": part if decays else f"{part} without decay",
        }
        for part in PARTS
        for decays in (True, False)
        if (part, decays) in groups
    ]


def _decays(name: str, parameter: Tensor) -> bool:
    return parameter.ndim > 1 and not name.endswith(".slot_map.weight")
