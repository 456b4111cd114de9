# SPDX-License-Identifier: Apache-2.0
"""Decoder layers that are compiled for as long as a model is trained.

How often they are compiled (`dynamic=False`): a pass of the compressor is one shape, whatever the ratio (of `uio`, one
for each), and compiles three times: the first layer's input needs no gradient, the last layer has no write adapters,
and all between are alike. A pass of the decoder compiles once for each number of slots and tokens together; the
teacher's once for each length. With `dynamic=None` the second shape that is met compiles for all lengths, in kernels
that are a little slower.
"""

from contextlib import AbstractContextManager

from torch import nn

from rcc_hf.compiling import compiled_layers
from rcc_hf.modeling.modeling_rcc import RCCForCausalLM

__all__ = ["compiled_blocks"]


def compiled_blocks(
    model: RCCForCausalLM, *, dynamic: bool | None = False, backend: str = "inductor"
) -> AbstractContextManager[None]:
    """Compile the decoder layers within the block. In evaluation mode, where lengths are many, they run as before.

    Args:
        model: The model itself, not what distributed training puts around it.
        dynamic: False compiles for every length, None once for all of them.
        backend: Of `torch.compile`.
    """
    return compiled_layers(model.model.language_model.layers, _is_training, dynamic=dynamic, backend=backend)


def _is_training(layer: nn.Module) -> bool:
    return layer.training
