# SPDX-License-Identifier: Apache-2.0
"""`RCCPreTrainedModel`: what the RCC models share beside loading: initialisation and activation checkpointing."""

import functools

import torch
from torch.utils.checkpoint import checkpoint

from .adapters_rcc import TrainedPart
from .configuration_rcc import RCCConfig
from .loading_rcc import LoadableModel
from .passes_rcc import enter_pass, running_pass


class RCCPreTrainedModel(LoadableModel):
    """What both models share: loading, initialisation, activation checkpointing."""

    config_class = RCCConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values", "memory"]

    def __init__(self, config: RCCConfig):
        super().__init__(config)
        if getattr(config, "_fresh_compressor", False):  # from a base: that the compressor is missing is no news
            self._keys_to_ignore_on_load_missing = {r"\.rcc\."}

    @torch.no_grad()
    def initialize_weights(self):
        """As the library, which would leave our parameters inside the base's layers as they were allocated."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, TrainedPart):
                module.initialize()

    def enable_input_require_grads(self):
        """Nothing: only reentrant checkpointing needs it. The library asks for it with every kind, and embeddings that
        require gradients would give layers that are frozen, such as a frozen compressor's, a graph."""

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs):
        """As the library, but a replayed layer runs in the pass it first ran in. Always non-reentrant: the reentrant
        kind loses gradients of adapters silently."""
        inner = gradient_checkpointing_func
        arguments, keywords = (inner.args, inner.keywords) if isinstance(inner, functools.partial) else ((), {})
        inner = functools.partial(getattr(inner, "func", inner), *arguments, **{**keywords, "use_reentrant": False})

        def replayed_in_its_pass(function, *inputs):
            current = running_pass()

            def run(*args):
                with enter_pass(current):
                    return function(*args)

            return inner(run, *inputs)

        super()._set_gradient_checkpointing(enable=enable, gradient_checkpointing_func=replayed_in_its_pass, **kwargs)
