# SPDX-License-Identifier: Apache-2.0
"""The private names and unwritten rules of transformers that modeling/ leans on: a release that changes one fails here.

Each test names what breaks in our code when it fails.
"""

import inspect

import torch
from test_cache import BATCH, WIDTH, filled
from tiny import base_model, ratio_of_norms, rcc_model, text_config, tokens
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel, modeling_layers
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_causal_mask

from rcc_hf.modeling.cache_rcc import RCCCache


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_cache_has_the_methods_that_masks_are_built_from():
    assert parameters(Cache.get_query_offset) == parameters(RCCCache.get_query_offset) == ["self", "layer_idx"]
    assert parameters(Cache.get_seq_length) == parameters(RCCCache.get_seq_length) == ["self", "layer_idx"]
    assert parameters(Cache.get_mask_sizes) == ["self", "query_length", "layer_idx"]
    assert parameters(DynamicLayer.lazy_initialization) == ["self", "key_states", "value_states"]
    for name in ("crop", "reset", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"):
        assert len(parameters(getattr(Cache, name))) == len(parameters(getattr(RCCCache, name)))


def test_masks_are_built_from_the_physical_length():
    """The logical length must not enter: with it new tokens would see each other's future, or memory be cut off."""
    cache, config = filled(5, 37), text_config()
    config._attn_implementation = "eager"
    assert cache.get_seq_length() > cache.physical_length
    mask = create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(BATCH, 3, WIDTH),
        attention_mask=None,
        past_key_values=cache,
        position_ids=torch.arange(17, 20)[None],
    )
    visible = (mask == 0) if mask.is_floating_point() else mask
    assert visible.shape[-2:] == (3, 20)
    assert visible[..., :17].all()
    assert torch.equal(visible[0, 0, :, 17:], torch.ones(3, 3, dtype=torch.bool).tril())


def test_generate_prepares_its_cache_where_we_hook_in():
    expected = ["self", "generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"]
    assert parameters(GenerationMixin._prepare_cache_for_generation) == expected
    assert parameters(type(rcc_model())._prepare_cache_for_generation) == expected
    assert "init_continuous_batching" in dir(GenerationMixin)


def test_checkpointed_layers_keep_a_cache_that_they_are_told_to_keep():
    assert "_can_checkpoint_with_cache" in inspect.getsource(modeling_layers)
    model, ids = rcc_model(), tokens(1, 7, seed=1)
    memory = model.compress(tokens(1, 54))
    expected = model(ids, memory=memory).logits
    model.train()
    model.gradient_checkpointing_enable()
    assert ratio_of_norms(model(ids, memory=memory).logits, expected) <= 1e-10


def test_checkpointing_is_switched_on_where_we_hook_in():
    names = parameters(PreTrainedModel._set_gradient_checkpointing)
    assert names[:3] == ["self", "enable", "gradient_checkpointing_func"]


def test_weights_are_initialised_where_we_hook_in(monkeypatch):
    """Once for each of our models; the library's own function never sees what we put into the base's layers."""
    calls = []
    inherited = PreTrainedModel.initialize_weights

    def spy(self):
        calls.append(type(self).__name__)
        return inherited(self)

    monkeypatch.setattr(PreTrainedModel, "initialize_weights", spy)
    rcc_model()
    assert {"RCCModel", "RCCForCausalLM"} <= set(calls)


def test_renamed_weights_are_remembered_where_we_forget_them(tmp_path):
    """Without forgetting, a model made from a base would be saved under the base's names."""
    base_model().save_pretrained(tmp_path / "base")
    renamed = AutoModelForCausalLM.from_pretrained(tmp_path / "base", key_mapping={"^model.layers": "model.layers"})
    assert renamed._weight_conversions
