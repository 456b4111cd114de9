# SPDX-License-Identifier: Apache-2.0
"""The RCC scheme: states of every layer at every r-th token, which enter the decoder layer by layer."""

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapters_rcc import LayerAdapters, SlotMap, SlotMark, make_adapters
from .families_rcc import adaptable_linears, choose_linears
from .hooks_rcc import install_hooks
from .memory import MemoryScheme
from .passes_rcc import EndOfPass, Pass, enter_pass
from .slot_passes_rcc import (
    append_states,
    decode_amid,
    decode_slots,
    empty_states,
    project_slots,
    put_slots,
    rotate_kept,
)

WIRINGS = ("replace", "add")


@dataclass(frozen=True, kw_only=True)
class RCCOptions:
    """Options of the RCC scheme.

    Attributes:
        wiring: "replace" or "add" (the paper's).
        write_rank: rank of the compressor's adapters; 0 for none.
        read_rank: rank of the adapters that are on while decoding with memory; 0 for none.
        map_rank: rank of each P_i; None for a full matrix.
        mark_slots: whether the compressor is told which tokens become slots, by a vector that is added to them. It then
            knows the ratio; but slots of a memory cannot be thinned out to a higher one.
        adapter_scale: factor on the adapters' update (LoRA's alpha over rank).
        targets: last names of the linear maps that get adapters (such as "q_proj"); None for all.
    """

    wiring: str = "replace"
    write_rank: int = 32
    read_rank: int = 16
    map_rank: int | None = 32
    mark_slots: bool = False
    adapter_scale: float = 2.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.wiring not in WIRINGS:
            raise ValueError(f"wiring={self.wiring!r} is not known; choose one of {', '.join(WIRINGS)}")
        for name in ("write_rank", "read_rank"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; give 0 for no adapter, or a rank")
        if self.map_rank is not None and self.map_rank < 1:
            raise ValueError(f"map_rank={self.map_rank} is below 1; give a rank, or None for a full matrix")
        if self.targets is not None:  # JSON has lists only
            object.__setattr__(self, "targets", tuple(self.targets))


class RCCScheme(MemoryScheme):
    """Recurrent Context Compression (https://arxiv.org/abs/2406.06110, section 3).

    The compressor is the base with write adapters. Its state at layer i is the input of layer i at every r-th token
    (paper: the encoder's hidden states; states of the last layer's output reach no key or value and are left out).
    A slot's row enters decoder layer i as

    - wiring "replace": `P_i(state_i)`, P_i the identity at start, whatever the layer below made of the row;
    - wiring "add" (paper, equation 3): `P_0(state_0)` at layer 0 and `row + P_i(state_i)` above it, P_i ~ N(0, 0.02).

    A state is a tuple of L tensors `[B, M, D]`. Kept, "replace" is one pair (key, value) `[B, H, M, D]` per layer,
    since a slot's key and value then depend on its own state alone; keys are those of position 0. "add" keeps the
    state.
    """

    name = "rcc"
    independent_writes = True
    Options = RCCOptions
    options: RCCOptions

    @property
    def nested_ratios(self) -> bool:
        return not self.options.mark_slots

    def build(self, decoder):
        last = len(decoder.layers) - 1
        for index, layer in enumerate(decoder.layers):
            linears = choose_linears(adaptable_linears(layer), self.options.targets)
            # what the compressor's last layer puts out is no state: adapters there would never get a gradient
            write = make_adapters(linears, self.options.write_rank if index < last else 0, self.options.adapter_scale)
            read = make_adapters(linears, self.options.read_rank, self.options.adapter_scale)
            width = decoder.config.hidden_size
            slot_map = SlotMap(width, self.options.map_rank, residual=self.options.wiring == "replace")
            mark = SlotMark(width) if self.options.mark_slots and index == 0 else None
            layer.rcc = LayerAdapters(write, read, slot_map, mark)

    def empty(self, decoder, batch_size):
        return empty_states(decoder, batch_size)

    def write(self, decoder, state, segment, ratio):
        taken: dict[int, Tensor] = {}
        last = len(decoder.layers) - 1

        def take(index: int, layer: nn.Module, hidden: Tensor) -> Tensor | None:
            marked = None if layer.rcc.mark is None else layer.rcc.mark(hidden, ratio)
            states = (hidden if marked is None else marked)[:, ratio - 1 :: ratio]
            taken[index] = states.contiguous()  # a view would keep the inputs of all layers
            if index == last and not torch.is_grad_enabled():  # with a graph, sharded weights wait for the pass's end
                raise EndOfPass
            return marked

        name = "inputs_embeds" if segment.is_floating_point() else "input_ids"
        install_hooks(decoder.layers)
        with suppress(EndOfPass), enter_pass(Pass("write", take)):
            decoder(**{name: segment}, use_cache=False)
        return append_states(state, taken)

    def _inject(self, state, start: int = 0, rows: Tensor | None = None) -> Pass:
        """The pass in which M rows of each layer's input, from `start` on, are made from `state`."""
        replace = self.options.wiring == "replace"

        def put(index: int, layer: nn.Module, hidden: Tensor) -> Tensor:
            slots = layer.rcc.slot_map(state[index]).to(hidden.device, hidden.dtype)
            if not replace and index > 0:
                slots = hidden[:, start : start + slots.shape[1]] + slots
            return put_slots(hidden, slots, start)

        return Pass("read", put, rows)

    def keep(self, decoder, state):
        if self.options.wiring == "add":
            return tuple((hidden,) for hidden in state)
        return tuple(project_slots(decoder, self._inject(state), state))

    def read(self, decoder, kept, position_ids, mask, head=None):
        if self.options.wiring == "add":
            state = tuple(hidden for (hidden,) in kept)
            return decode_slots(decoder, self._inject(state), state, position_ids, mask, head)
        return rotate_kept(decoder, kept, position_ids)

    def decode(self, decoder, state, inputs_embeds, mask, position_ids, num_head=0, rows=None, **kwargs):
        entering = self._inject(state, num_head, rows)
        return decode_amid(decoder, entering, state[0].shape[1], inputs_embeds, mask, position_ids, num_head, **kwargs)
