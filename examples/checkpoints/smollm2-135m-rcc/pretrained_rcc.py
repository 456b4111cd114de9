# SPDX-License-Identifier: Apache-2.0
"""`RCCPreTrainedModel`: what the RCC models share beside loading: initialisation and activation checkpointing."""

import functools
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .adapters_rcc import LowRankAdapter, TrainedPart
from .configuration_rcc import RCCConfig
from .hooks_rcc import install_hooks
from .linears_rcc import adapted_weights
from .loading_rcc import LoadableModel
from .passes_rcc import ADAPTERS, enter_pass, running_pass
from .replicas_rcc import RCCReplicas


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

    @torch.no_grad()
    def fuse_adapters(self, *kinds: str) -> None:
        """Keep a copy of each adapted weight with its adapter added, so that adapters take no time.

        It pays where few tokens pass at a time: in decoding behind memory ("read"), and where single segments are
        compressed ("write"; large batches of them fuse for themselves). It takes as many bytes as those weights, once
        for each kind, and rounds each sum to the weights' dtype. Nothing of it is saved, and training does not see it.

        Args:
            kinds: "read", "write", or both; none means both.

        Raises:
            ValueError: if a kind is unknown, or weights are quantised or offloaded.
        """
        unknown = set(kinds) - set(ADAPTERS)
        if unknown:
            raise ValueError(f"adapters {sorted(unknown)} are not known; choose of {', '.join(ADAPTERS)}")
        install_hooks(self._layers(), check=False)
        pairs = [pair for kind in kinds or ADAPTERS for pair in adapted_weights(self._layers(), kind)]
        for adapter, weight in pairs:
            adapter.fuse(weight)

    def unfuse_adapters(self) -> None:
        """Drop what `fuse_adapters` keeps."""
        for module in self.modules():
            if isinstance(module, LowRankAdapter):
                module.unfuse()

    def replicate(self, devices: Sequence[str | torch.device]) -> RCCReplicas:
        """Copies of this model on other devices, for `compress(..., replicas=...)`.

        Args:
            devices: where, one copy each, such as `["cuda:1"]`.

        Raises:
            ValueError: if the model itself lies on several devices, or a device cannot be used, or none is named.
        """
        return RCCReplicas(self._backbone(), devices)

    def _layers(self) -> nn.ModuleList:
        return self._backbone().language_model.layers

    def _backbone(self):
        return getattr(self, self.base_model_prefix, self)

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
