# SPDX-License-Identifier: Apache-2.0
"""The trained parts: low-rank adapters and slot maps, as raw parameters inside each decoder layer.

They are no `nn.Linear`, so that quantisers and PEFT's "all-linear" leave them alone, and no parameter's name has "lora"
or "default" in it, which PEFT and transformers take for adapters of their own.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init


class TrainedPart(nn.Module):
    """A module whose parameters belong to the compressor, not to the base."""

    def initialize(self) -> None:
        """Fill parameters that no checkpoint has filled (`transformers.initialization` skips those that were)."""
        raise NotImplementedError


class LowRankAdapter(TrainedPart):
    """`scale * up @ down @ x`, the update of LoRA (https://arxiv.org/abs/2106.09685, section 4.1); zero at start."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.empty(out_features, rank))
        self.fused: Tensor | None
        self.register_buffer("fused", None, persistent=False)
        self._fused_versions: tuple[int, ...] | None = None

    def initialize(self) -> None:
        init.normal_(self.down, std=self.down.shape[1] ** -0.5)
        init.zeros_(self.up)

    def forward(self, x: Tensor, output: Tensor, rows: Tensor | None = None) -> Tensor:
        """`output` `[..., out_features]` of the map for `x` `[..., in_features]`, with the update added.

        Without a graph it is added in place. `rows` is a factor on the update that broadcasts to `x`; None for 1.
        """
        low = F.linear(x, self.down.to(x.dtype))
        if torch.is_grad_enabled():
            update = F.linear(low, self.up.to(x.dtype)) * self.scale
            return output + (update if rows is None else update * rows.to(update))
        low = (low if rows is None else low * rows.to(low)).to(output.dtype)
        # one product that reads and writes the output once; apart, factor and sum would do so again
        up = self.up.to(output.dtype).t()
        output.view(-1, output.shape[-1]).addmm_(low.reshape(-1, low.shape[-1]), up, alpha=self.scale)
        return output

    def merge(self, weight: Tensor) -> Tensor:
        """The weight `[out_features, in_features]` of one map that computes what map and adapter do."""
        return weight + (self.scale * (self.up @ self.down)).to(weight.dtype)

    def fuse(self, weight: Tensor) -> None:
        """Keep `merge(weight)` for passes without a graph."""
        self.fused = self.merge(weight.detach()).detach()
        self._fused_versions = self._versions(weight)

    def unfuse(self) -> None:
        """Drop what `fuse` keeps."""
        self.fused = self._fused_versions = None

    def is_stale(self, weight: Tensor) -> bool:
        """Whether a weight that `fuse` has read was written to since (not through `.data`, which leaves no trace)."""
        return self.fused is not None and self._fused_versions != self._versions(weight)

    def _versions(self, weight: Tensor) -> tuple[int, ...]:
        return tuple(tensor._version for tensor in (self.down, self.up, weight))


def make_adapters(linears: dict[str, nn.Linear], rank: int, scale: float) -> dict[str, LowRankAdapter]:
    """An adapter for each linear map of a layer, by `adapter_key` of its dotted name; none for rank 0."""
    if rank == 0:
        return {}
    return {
        adapter_key(name): LowRankAdapter(linear.in_features, linear.out_features, rank, scale)
        for name, linear in linears.items()
    }


class SlotMap(TrainedPart):
    """The map from a compressor state to the decoder layer it enters, `[..., D]` to `[..., D]`.

    With `residual` it is the identity at start, plus `up @ down` of the given rank, or one full matrix for rank None;
    without, it starts as the paper's random map N(0, 0.02).
    """

    def __init__(self, width: int, rank: int | None, residual: bool):
        super().__init__()
        self.residual = residual
        if rank is None:
            self.weight = nn.Parameter(torch.empty(width, width))
        else:
            self.down = nn.Parameter(torch.empty(rank, width))
            self.up = nn.Parameter(torch.empty(width, rank))

    def initialize(self) -> None:
        if hasattr(self, "weight"):
            init.eye_(self.weight) if self.residual else init.normal_(self.weight, std=0.02)
        else:
            init.normal_(self.down, std=self.down.shape[1] ** -0.5)
            init.zeros_(self.up) if self.residual else init.normal_(self.up, std=0.02)

    def forward(self, states: Tensor) -> Tensor:
        first = self.weight if hasattr(self, "weight") else self.down
        if first.device.type != "meta":  # a layer on another device of a device map: states may come from its neighbour
            states = states.to(first.device)
        if hasattr(self, "weight"):
            return F.linear(states, self.weight.to(states.dtype))
        update = F.linear(F.linear(states, self.down.to(states.dtype)), self.up.to(states.dtype))
        return states + update if self.residual else update


class SlotMark(TrainedPart):
    """A vector that is added to the tokens whose states become slots, so that the compressor knows them; zero at start.

    Without it nothing tells the compressor the ratio, and every token has to be ready to be a slot.
    """

    def __init__(self, width: int):
        super().__init__()
        self.vector = nn.Parameter(torch.empty(width))

    def initialize(self) -> None:
        init.zeros_(self.vector)

    def forward(self, hidden: Tensor, ratio: int) -> Tensor:
        """`[N, W, D]` to `[N, W, D]`."""
        tokens = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
        is_slot = (tokens % ratio == 0)[:, None].to(hidden.dtype)
        return hidden + is_slot * self.vector.to(hidden.device, hidden.dtype)


class SlotVectors(TrainedPart):
    """Vectors that are added to the rows from which a compressor makes slots: one for all, or one for each slot of a
    segment; zero at start.
    """

    def __init__(self, width: int, count: int | None):
        super().__init__()
        self.vector = nn.Parameter(torch.empty(width) if count is None else torch.empty(count, width))

    def initialize(self) -> None:
        init.zeros_(self.vector)

    def forward(self, rows: Tensor) -> Tensor:
        """`[N, M, D]` to `[N, M, D]`."""
        vector = self.vector if self.vector.ndim == 1 else self.vector[: rows.shape[1]]
        return rows + vector.to(rows)


class LayerAdapters(nn.Module):
    """All that is trained inside one decoder layer, held as `layer.rcc`.

    Attributes:
        write: adapters that are on while the layer serves the compressor, by name of the linear map.
        read: adapters that are on while it decodes with memory.
        slot_map: the map of the states that enter this layer; None where they enter as they are.
        mark: what marks slots in the compressor's input, or makes them; in the first layer, if at all.
    """

    def __init__(
        self,
        write: dict[str, LowRankAdapter],
        read: dict[str, LowRankAdapter],
        slot_map: SlotMap | None,
        mark: SlotMark | SlotVectors | None = None,
    ):
        super().__init__()
        self.write = nn.ModuleDict(write)
        self.read = nn.ModuleDict(read)
        self.slot_map = slot_map
        self.mark = mark


def adapter_key(name: str) -> str:
    """The name of a linear map inside its layer, as a key of `nn.ModuleDict` (which allows no dots).

    It does not end as the map's name does, or PEFT would take patterns for the base's maps to mean adapters too.
    """
    return name.replace(".", "_") + "_adapter"
