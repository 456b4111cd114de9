# SPDX-License-Identifier: Apache-2.0
"""Decoder layers compiled one by one with `torch.compile`, for as long as a model is trained.

All layers share one compiled function, so that a layer's place in the model costs no compilation. Hooks on the layer
itself, which take and put the states of the compressor, run outside of it; the adapters on the linear maps are traced.

How often it is compiled (`dynamic=False`): a pass of the compressor is one shape, whatever the ratio (of `uio`, one for
each), and compiles three times: the first layer's input needs no gradient, the last layer has no write adapters, and
all between are alike. A pass of the decoder compiles once for each number of slots and tokens together; the teacher's
once for each length. With `dynamic=None` the second shape that is met compiles for all lengths, in kernels that are a
little slower.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from rcc_hf.modeling.modeling_rcc import RCCForCausalLM

__all__ = ["RECOMPILE_LIMIT", "compiled_blocks"]

RECOMPILE_LIMIT = 128
"""Shapes and kinds of passes for which one function may be compiled; the compiler's own limit, 8, is soon passed."""


@contextmanager
def compiled_blocks(
    model: RCCForCausalLM, *, dynamic: bool | None = False, backend: str = "inductor"
) -> Iterator[None]:
    """Compile the decoder layers within the block. In evaluation mode, where lengths are many, they run as before.

    Args:
        model: The model itself, not what distributed training puts around it.
        dynamic: False compiles for every length, None once for all of them.
        backend: Of `torch.compile`.
    """
    layers = model.model.language_model.layers
    kinds = {id(layer): type(layer) for layer in layers}
    compiled = {
        kind: _compiled_class(kind, dynamic, backend)  # type: ignore[arg-type]  # mypy takes no class for hashable
        for kind in set(kinds.values())
    }
    try:
        for layer in layers:
            layer.__class__ = compiled[type(layer)]
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            yield
    finally:
        for layer in layers:
            layer.__class__ = kinds[id(layer)]


@cache  # or a second training in the same process would compile all of it again
def _compiled_class(kind: type[nn.Module], dynamic: bool | None, backend: str) -> type[nn.Module]:
    """A layer class whose `forward` is compiled; checkpointing, which the library puts around it, is not."""
    plain = kind.forward
    fast = torch.compile(plain, dynamic=dynamic, backend=backend, fullgraph=True)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (fast if self.training else plain)(self, *args, **kwargs)

    # of the same name, since layers are looked for by it
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
