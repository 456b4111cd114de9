# SPDX-License-Identifier: Apache-2.0
"""The base's linear maps with adapters: one product where that costs less, and the plain map outside of a pass.

A map becomes an `AdaptedLinear` by its class alone, at the first pass: until then quantisers find the base's own. A
hook would do too, and does where one of them has put its own module in the map's place; but a module with hooks is
slower to call even when these do nothing.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapters_rcc import LowRankAdapter
from .passes_rcc import ADAPTERS, running_pass

MERGE_TOKENS = 4096
"""Tokens from which on adapters are merged for one product; fewer are not worth the sum of two weights."""


class AdaptedLinear(nn.Linear):
    """A linear map of the base that, within a pass, adds the pass's adapter to what it computes.

    Attributes:
        adapter_place: the decoder layer that the map is in, and the adapters' name in its `rcc`.
    """

    adapter_place: tuple[nn.Module, str]

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        current = running_pass()
        adapter = None if current is None else self._find(current.adapter)
        if adapter is None:
            return F.linear(x, self.weight, self.bias)
        if current.rows is None:
            if adapter.fused is not None and not torch.is_grad_enabled():
                return F.linear(x, adapter.fused, self.bias)
            if merges(self, x):
                return F.linear(x, adapter.merge(self.weight), self.bias)
        return adapter(x, F.linear(x, self.weight, self.bias), current.rows)

    def _find(self, kind: str) -> LowRankAdapter | None:
        layer, key = self.adapter_place
        adapters = getattr(layer.rcc, kind)  # looked up when called: PEFT may have put a wrapper there
        return adapters[key] if key in adapters else None  # noqa: SIM401  # a ModuleDict has no get

    def check_fused(self) -> None:
        """Refuse weights that have changed since they were fused with an adapter's.

        Raises:
            ValueError: saying what to do.
        """
        for kind in ADAPTERS:
            adapter = self._find(kind)
            if adapter is not None and adapter.is_stale(self.weight):
                raise ValueError(
                    f"weights have changed since fuse_adapters({kind!r}), which keeps them added up. Call it again, or "
                    "unfuse_adapters()"
                )


def adapt(linear: nn.Module, layer: nn.Module, key: str) -> bool:
    """Let a linear map of a decoder layer add the adapters that `layer.rcc` has under `key`, if it is a plain one.

    Not where another module stands in the map's place, or where its `forward` was wrapped (by accelerate, say): a class
    would not be asked there.
    """
    if type(linear) is not nn.Linear or "forward" in vars(linear):
        return False
    cast(AdaptedLinear, linear).adapter_place = (layer, key)
    linear.__class__ = AdaptedLinear
    return True


def adapted_weights(layers: nn.ModuleList, kind: str) -> list[tuple[LowRankAdapter, Tensor]]:
    """All adapters of one kind, each with the weight of its map.

    Raises:
        ValueError: if a weight is none that can be added to.
    """
    found = []
    for layer in layers:
        linears = {module.adapter_place[1]: module for module in layer.modules() if isinstance(module, AdaptedLinear)}
        for key, adapter in getattr(layer.rcc, kind).items():
            linear = linears.get(key)
            if linear is None or not _is_plain(linear):
                raise ValueError(
                    f"the weight under {key!r} is quantised or offloaded, so that no adapter can be added to it. Load "
                    "the base without quantization_config, on devices that hold all of it"
                )
            found.append((adapter, linear.weight))
    return found


def _is_plain(linear: nn.Linear) -> bool:
    return type(linear.weight) is nn.Parameter and linear.weight.device.type != "meta"


def merges(linear: nn.Linear, x: Tensor) -> bool:
    """Whether to add the adapter to the map's weight for this one product with `x` `[..., in_features]`.

    A low rank makes products that wait for memory; the one with the sum takes less time where tokens are many more than
    the map's features. With a graph only if compiled: else the sum would be kept for backward.
    """
    if not _is_plain(linear):
        return False
    if torch.is_grad_enabled():
        return torch.compiler.is_compiling()
    return x.numel() >= max(MERGE_TOKENS, linear.in_features // 2) * linear.in_features
