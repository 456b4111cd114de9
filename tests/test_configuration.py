# SPDX-License-Identifier: Apache-2.0
"""`RCCConfig`: saved, loaded, overridden, and what it says of its base."""

import copy
import json

import pytest
from checkpoints import Bases
from tiny import SEGMENT
from transformers import AutoConfig, LlamaConfig

from rcc_hf import RCCConfig, RCCForCausalLM, RCCModel


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return Bases(tmp_path_factory.mktemp("bases"))


def test_configuration_round_trip(bases, tmp_path):
    config = bases.trained(targets=["q_proj"], wiring="add", map_rank=None, reconstruction_prompt_ids=[4, 5]).config
    config.name_or_path = ""
    assert RCCConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    for load in (RCCConfig, AutoConfig):
        again = load.from_pretrained(tmp_path)
        again.name_or_path = ""
        assert type(again) is RCCConfig
        assert type(again.text_config) is LlamaConfig
        assert again.to_dict() == config.to_dict() | {"transformers_version": again.transformers_version}
        again.save_pretrained(tmp_path / load.__name__)
        assert json.loads((tmp_path / load.__name__ / "config.json").read_text()) == json.loads(
            (tmp_path / "config.json").read_text()
        )
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    assert RCCConfig().to_dict()["model_type"] == "rcc"


def test_nested_fields_of_the_configuration_can_be_overridden(bases, tmp_path):
    bases.trained().config.save_pretrained(tmp_path)
    for load in (RCCConfig, AutoConfig):
        config = load.from_pretrained(tmp_path, ratio=8, text_config={"rms_norm_eps": 0.5, "vocab_size": 99})
        assert (config.ratio, config.segment_length) == (8, SEGMENT)
        assert (config.text_config.rms_norm_eps, config.text_config.vocab_size) == (0.5, 99)
        assert config.text_config.hidden_size == 32


def test_configuration_speaks_for_its_base():
    text = LlamaConfig(vocab_size=99, tie_word_embeddings=True, bos_token_id=3, eos_token_id=[4, 5], pad_token_id=6)
    config = RCCConfig(text_config=text)
    assert config.get_text_config() is config.get_text_config(decoder=True) is config.text_config is text
    assert (config.tie_word_embeddings, config.bos_token_id) == (True, 3)
    assert (config.eos_token_id, config.pad_token_id) == ([4, 5], 6)
    assert (config.model_type, config.keys_to_ignore_at_inference) == ("rcc", ["past_key_values"])
    assert RCCConfig(text_config=text.to_dict()).text_config.to_dict() == text.to_dict()


def test_default_window_leaves_room_for_memory():
    for positions, window in ((2048, 1024), (4096, 2048), (8192, 4096), (131072, 4096)):
        assert RCCConfig(text_config=LlamaConfig(max_position_embeddings=positions)).window == window


@pytest.mark.parametrize(
    ("base", "segment_length", "tokens"),
    [
        ("SmolLM2-135M", 1024, 65536),
        ("Llama-3.2-1B", 1024, 32768),
        ("Llama-3.1-8B", 1024, 18432),
        ("Llama-3.1-8B", 100, 18700),
        ("Llama-3.1-70B", 1024, 16384),
        ("SmolLM2-135M", 70000, 70000),
    ],
)
def test_what_the_compressor_sees_at_a_time_follows_from_the_size_of_the_base(base, segment_length, tokens):
    widths = {"SmolLM2-135M": 1536, "Llama-3.2-1B": 8192, "Llama-3.1-8B": 14336, "Llama-3.1-70B": 28672}
    text = LlamaConfig(intermediate_size=widths[base], max_position_embeddings=131072)
    config = RCCConfig(text_config=text, segment_length=segment_length, ratio=1)
    assert config.encode_batch_tokens is None
    assert config.batch_tokens("cuda") == config.batch_tokens("xpu") == tokens
    assert config.batch_tokens("cpu") == max(1, 16384 // segment_length) * segment_length
    config.encode_batch_tokens = 5000
    assert config.batch_tokens("cuda") == config.batch_tokens("cpu") == 5000


def test_a_given_number_of_tokens_stays_in_the_checkpoint(bases, tmp_path):
    """As in those that were written when 16,384 was the default."""
    config = bases.trained().config
    assert config.encode_batch_tokens is None
    for given in (16384, None, 128):
        config.encode_batch_tokens = given
        config.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text()).get("encode_batch_tokens") == given
        assert AutoConfig.from_pretrained(tmp_path).encode_batch_tokens == given
    assert RCCConfig.from_pretrained(tmp_path, encode_batch_tokens=None).encode_batch_tokens is None
    with pytest.raises(ValueError, match="encode_batch_tokens=0 must be"):
        RCCConfig.from_pretrained(tmp_path, encode_batch_tokens=0)


def test_an_override_is_checked_like_an_argument(bases, tmp_path):
    bases.trained().config.save_pretrained(tmp_path)
    for load in (RCCConfig, AutoConfig):
        with pytest.raises(ValueError, match="ratio=7 does not divide segment_length=16"):
            load.from_pretrained(tmp_path, ratio=7)


def test_classes_know_each_other(bases, tmp_path):
    assert RCCForCausalLM.config_class is RCCModel.config_class is RCCConfig
    assert RCCForCausalLM.base_model_prefix == "model"
    model = bases.trained()
    assert model.base_model is model.model
    assert model.get_input_embeddings() is model.model.language_model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    for one, name in ((model, "causal"), (model.model, "backbone")):
        one.save_pretrained(tmp_path / name)
        described = json.loads((tmp_path / name / "config.json").read_text())
        assert described["auto_map"] == {
            "AutoConfig": "configuration_rcc.RCCConfig",
            "AutoModel": "modeling_rcc.RCCModel",
            "AutoModelForCausalLM": "modeling_rcc.RCCForCausalLM",
        }
        assert described["architectures"] == [type(one).__name__]
