# SPDX-License-Identifier: Apache-2.0
"""Quantised bases: a compressor that was trained on one is saved without a trace of how the base was stored."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedConfig, PreTrainedModel


@contextmanager
def quantisation_set_aside(model: PreTrainedModel) -> Iterator[None]:
    """In the block the model is saved as if its base had never been quantised.

    A quantiser replaces any state dict by that of the whole model, and a configuration that speaks of quantisation has
    every base quantised, or taken for quantised, that the compressor is loaded on later.
    """
    places = [(vars(model), "hf_quantizer"), (vars(model), "_weight_conversions")]  # the latter are not to be undone
    places += [(vars(config), "quantization_config") for config in (model.config, model.config.text_config)]
    found = [(place, name, place.pop(name)) for place, name in places if name in place]
    try:
        yield
    finally:
        for place, name, value in found:
            place[name] = value


def adopt_quantisation(config: PreTrainedConfig, base, hub: dict) -> None:
    """Let the configuration of an RCC model say how the checkpoint of its base is quantised, if it is.

    Args:
        config: of an adapter-only checkpoint.
        base: id on the Hub, or a folder.
        hub: arguments of downloading.
    """
    stored, _ = PreTrainedConfig.get_config_dict(base, **hub)
    if stored.get("quantization_config") is not None:
        config.text_config.quantization_config = stored["quantization_config"]
