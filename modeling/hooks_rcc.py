# SPDX-License-Identifier: Apache-2.0
"""How a pass reaches the decoder: hooks on every layer, and linear maps that are `AdaptedLinear`, or have hooks too."""

import threading

import torch
from torch import Tensor, nn

from .adapters_rcc import adapter_key
from .linears_rcc import AdaptedLinear, adapt
from .passes_rcc import running_pass

_INSTALLING = threading.RLock()


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
    """Forward hook of a linear map that is no `AdaptedLinear`, a quantised one say: adds the running pass's adapter.

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
        return adapters[self.key](args[0], output, current.rows)


def install_hooks(layers: nn.ModuleList, *, check: bool = True) -> None:
    """Put the hooks on decoder layers that carry `layer.rcc`, where they are not there yet.

    Args:
        check: refuse weights that have changed since they were fused.
    """
    if torch.compiler.is_compiling() and all(_is_tapped(layer) for layer in layers):
        return  # a lock cannot be traced; the eager call before, the prefill, has put them there
    with _INSTALLING:  # two threads may begin at once
        _install(layers, check)


def _install(layers: nn.ModuleList, check: bool) -> None:
    for index, layer in enumerate(layers):
        if not _is_tapped(layer):
            layer.register_forward_pre_hook(LayerInputHook(index), with_kwargs=True)
        keys = {*layer.rcc.write, *layer.rcc.read}
        for name, module in layer.named_modules():
            # PEFT puts the base map at `<name>.base_layer`, and its wrapper where the map was
            key = adapter_key(name.removesuffix(".base_layer"))
            if key not in keys or hasattr(module, "base_layer"):
                continue
            if isinstance(module, AdaptedLinear):
                if check:
                    module.check_fused()
            elif not _has_hook(module) and not adapt(module, layer, key):
                module.register_forward_hook(AdapterHook(layer, key))


def _has_hook(module: nn.Module) -> bool:
    return any(isinstance(hook, AdapterHook) for hook in module._forward_hooks.values())


def _is_tapped(layer: nn.Module) -> bool:
    return any(isinstance(hook, LayerInputHook) for hook in layer._forward_pre_hooks.values())
