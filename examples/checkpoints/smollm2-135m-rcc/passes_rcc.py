# SPDX-License-Identifier: Apache-2.0
"""Passes over the decoder in which adapters are on and layer inputs are tapped.

One set of weights serves as compressor and decoder; what differs is the *pass*: which adapters are added to the base's
linear maps, and what is read from or put into the input of each layer. The running pass is per thread, set by a `with`
block, and entered again when activation checkpointing replays a layer. Modules keep no state of it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_RUNNING = threading.local()
_INSTALLING = threading.RLock()

Tap = Callable[[int, nn.Module, Tensor], Tensor | None]
"""Called with layer index, layer and layer input `[B, T, D]`; a returned tensor takes the input's place."""


@dataclass(frozen=True, eq=False)
class Pass:
    """One way to run the decoder.

    Attributes:
        adapter: which adapters are on, "write" or "read".
        tap: sees, and may replace, the input of every layer.
        rows: 0 where adapters stay off: for rows of the batch that have no memory `[B, 1, 1]`, or for all but slots
            `[1, T, 1]`; None for all on.
    """

    adapter: str
    tap: Tap | None = None
    rows: Tensor | None = None


def running_pass() -> Pass | None:
    """The pass that this thread is in, or None: the plain base model."""
    return getattr(_RUNNING, "value", None)


@contextmanager
def enter_pass(value: Pass | None) -> Iterator[None]:
    """Run the block in pass `value`; the former pass comes back however the block ends."""
    before = running_pass()
    _RUNNING.value = value
    try:
        yield
    finally:
        _RUNNING.value = before


class LayerInputHook:
    """Forward pre-hook of a decoder layer: hands the layer's input to the running pass's tap.

    A class, not a closure, so that `copy.deepcopy` of a model gives hooks that belong to the copy.
    """

    def __init__(self, index: int):
        self.index = index

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict):
        current = running_pass()
        if current is None or current.tap is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        replaced = current.tap(self.index, layer, hidden)
        if replaced is None:
            return None
        return ((replaced, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": replaced})


class AdapterHook:
    """Forward hook of a base linear map: adds the running pass's adapter.

    The adapter is looked up when called, through the layer, because PEFT wraps and quantisers replace modules.
    """

    def __init__(self, layer: nn.Module, key: str):
        self.layer, self.key = layer, key

    def __call__(self, linear: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        current = running_pass()
        if current is None:
            return None
        adapters = getattr(self.layer.rcc, current.adapter)
        if self.key not in adapters:
            return None
        if _merges(linear, current):
            return adapters[self.key].merged(linear, args[0])
        update = adapters[self.key](args[0])
        return output + (update if current.rows is None else update * current.rows.to(update))


def _merges(linear: nn.Module, current: Pass) -> bool:
    """Whether to add the adapter to the map's weight: in compiled training; the compiler drops its own output.

    A low rank makes products that wait for memory; the one with the sum takes less time, backward too, where tokens are
    many more than the map's features.
    """
    if not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
        return False
    # quantised weights are modules or parameters of another type
    return current.rows is None and type(linear) is nn.Linear and type(linear.weight) is nn.Parameter


def install_hooks(layers: nn.ModuleList) -> None:
    """Put the hooks on decoder layers that carry `layer.rcc`, where they are not there yet."""
    if torch.compiler.is_compiling() and all(_is_tapped(layer) for layer in layers):
        return  # a lock cannot be traced; the eager call before, the prefill, has put them there
    with _INSTALLING:  # two threads may begin at once
        _install(layers)


def _install(layers: nn.ModuleList) -> None:
    for index, layer in enumerate(layers):
        if not _is_tapped(layer):
            layer.register_forward_pre_hook(LayerInputHook(index), with_kwargs=True)
        keys = {*layer.rcc.write, *layer.rcc.read}
        for name, module in layer.named_modules():
            # PEFT puts the base map at `<name>.base_layer`, and its wrapper where the map was
            key = adapter_key(name.removesuffix(".base_layer"))
            if key not in keys or hasattr(module, "base_layer"):
                continue
            if not any(isinstance(hook, AdapterHook) for hook in module._forward_hooks.values()):
                module.register_forward_hook(AdapterHook(layer, key))


def _is_tapped(layer: nn.Module) -> bool:
    return any(isinstance(hook, LayerInputHook) for hook in layer._forward_pre_hooks.values())


def adapter_key(name: str) -> str:
    """The name of a linear map inside its layer, as a key of `nn.ModuleDict` (which allows no dots).

    It does not end as the map's name does, or PEFT would take patterns for the base's maps to mean adapters too.
    """
    return name.replace(".", "_") + "_adapter"
