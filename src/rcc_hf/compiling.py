# SPDX-License-Identifier: Apache-2.0
"""Decoder layers compiled one by one with `torch.compile`, for as long as a block of code runs.

All layers share one compiled function, so that a layer's place in the model costs no compilation. Hooks on the layer
itself, which take and put the states of the compressor, run outside of it; the adapters on the linear maps are traced.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from rcc_hf.modeling.modeling_rcc import RCCModel
from rcc_hf.modeling.passes_rcc import running_pass

__all__ = ["RECOMPILE_LIMIT", "compiled_compressor", "compiled_layers"]

RECOMPILE_LIMIT = 128
"""Shapes and kinds of passes for which one function may be compiled; the compiler's own limit, 8, is soon passed."""

Choice = Callable[[nn.Module], bool]
"""Says of a layer that is called whether it runs compiled."""


def compiled_compressor(
    model: nn.Module, *, dynamic: bool | None = None, backend: str = "inductor"
) -> AbstractContextManager[None]:
    """Compress by compiled layers within the block, in evaluation mode; all else, decoding too, runs as before.

        with compiled_compressor(model):
            memory = model.compress(ids)

    The first call compiles, which may take a minute. It does so for its number of segments, the second number that is
    met for all, and a single segment is a case of its own. Later blocks of the same process compile no more. Nested
    blocks are fine; of several threads that use one model, enter it around all of them.

    Args:
        model: An RCC model, or what PEFT and others put around it.
        dynamic: None as above; False compiles for every number of segments, True at once for all.
        backend: Of `torch.compile`.

    Raises:
        TypeError: there is no RCC model in `model`.
    """
    found = [part for part in model.modules() if isinstance(part, RCCModel)] if isinstance(model, nn.Module) else []
    if not found:
        raise TypeError(
            f"compiled_compressor was given a {type(model).__name__}, and takes an RCCForCausalLM or RCCModel of this "
            "package, or a wrapper of one; load a checkpoint without trust_remote_code"
        )
    layers = [layer for part in found for layer in part.language_model.layers]
    return compiled_layers(layers, _is_compressing, dynamic=dynamic, backend=backend)


def _is_compressing(layer: nn.Module) -> bool:
    running = running_pass()
    return running is not None and running.adapter == "write" and not layer.training


@contextmanager
def compiled_layers(
    layers: Iterable[nn.Module], choice: Choice, *, dynamic: bool | None = None, backend: str = "inductor"
) -> Iterator[None]:
    """Run decoder layers compiled within the block, where `choice` says so.

    Args:
        layers: Of a base, ours or any other.
        choice: A function that lives as long as the process: what is compiled is kept with it.
        dynamic: False compiles for every shape, True once for all of them, None for the first and then for all others.
        backend: Of `torch.compile`.
    """
    kinds = [(layer, type(layer)) for layer in layers]
    try:
        for layer, kind in kinds:
            layer.__class__ = _compiled_class(kind, choice, dynamic, backend)  # type: ignore[arg-type]  # "not hashable"
        with _compiler_settings():
            yield
    finally:
        for layer, kind in kinds:
            layer.__class__ = kind


@cache  # or a second block in the same process would compile all of it again
def _compiled_class(kind: type[nn.Module], choice: Choice, dynamic: bool | None, backend: str) -> type[nn.Module]:
    """A layer class whose `forward` is compiled; checkpointing, which the library puts around it, is not."""
    how = (choice, dynamic, backend)
    if getattr(kind, "_compiled", None) == how:  # blocks are nested
        return kind
    otherwise, plain = kind.forward, getattr(kind, "_plain", kind.forward)
    fast = torch.compile(plain, dynamic=dynamic, backend=backend, fullgraph=True)

    @wraps(plain)  # its arguments are looked up
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not choice(self):
            return otherwise(self, *args, **kwargs)
        past: Any = kwargs.get("past_key_values")
        if type(past) in (Cache, DynamicCache) and past.layers:  # other classes may do more than ask their layers
            kwargs["past_key_values"] = _LayerCache(past.layers[_place(self)])
        with _compiler_settings():
            return fast(self, *args, **kwargs)

    # of the same name, since layers are looked for by it
    made = {"forward": forward, "__module__": kind.__module__, "_compiled": how, "_plain": staticmethod(plain)}
    return type(kind.__name__, (kind,), made)


def _compiler_settings() -> AbstractContextManager[Any]:
    """What the compiler is set to within a block, in this thread: threads that begin in a block do not inherit it."""
    config = torch._dynamo.config
    if config.recompile_limit == RECOMPILE_LIMIT and not config.skip_nnmodule_hook_guards:
        return nullcontext()  # setting it takes as long as a small kernel
    # Models differ in which maps have hooks, and nothing else tells their layers apart: without guards on them a layer
    # would run what was traced of another model's, and leave adapters out.
    return config.patch(recompile_limit=RECOMPILE_LIMIT, skip_nnmodule_hook_guards=False)


class _LayerCache:
    """One layer of a cache whatever its number, to which a traced layer would be bound otherwise."""

    def __init__(self, layer: Any):
        self.layer = layer

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.layer.update(keys, values)


def _place(layer: nn.Module) -> int:
    """A layer's number, as its attention gives it to caches."""
    return next(place for part in layer.modules() if isinstance(place := getattr(part, "layer_idx", None), int))
