# SPDX-License-Identifier: Apache-2.0
"""From base checkpoints to full RCC checkpoints and back: what is carried over, and what can be said at loading."""

import copy
import pickle

import pytest
import torch
from checkpoints import FAMILIES, SMALL, Bases, answers, assert_generates_alike, stored
from tiny import base_model, tokens
from transformers import AutoModel, AutoModelForCausalLM

from rcc_hf import RCCConfig, RCCForCausalLM, RCCModel
from rcc_hf.modeling.fingerprint_rcc import is_trained_part


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("family", FAMILIES)
def test_from_base_computes_what_the_base_does(bases, family):
    plain = AutoModelForCausalLM.from_pretrained(bases(family)).eval()
    model = RCCForCausalLM.from_base(bases(family), **SMALL).eval()
    ids = tokens(2, 30)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        backbone = RCCModel.from_base(bases(family), **SMALL).eval()
        assert torch.equal(backbone(ids).last_hidden_state, plain.base_model(ids).last_hidden_state)
    assert model.config.text_config.to_dict() == plain.config.to_dict()


def test_from_base_sorts_its_arguments(bases):
    model = RCCForCausalLM.from_base(
        str(bases()),
        scheme="rcc",
        ratio=8,
        segment_length=32,
        window=64,
        encode_batch_tokens=128,
        reconstruction_prompt_ids=[5, 6],
        wiring="add",
        write_rank=2,
        read_rank=0,
        map_rank=None,
        adapter_scale=1.5,
        targets=["q_proj", "v_proj"],
        dtype=torch.bfloat16,
        attn_implementation="eager",
        device_map="cpu",
    )
    config = model.config
    assert [config.ratio, config.segment_length, config.window, config.encode_batch_tokens] == [8, 32, 64, 128]
    assert (config.scheme, config.reconstruction_prompt_ids) == ("rcc", [5, 6])
    assert config.scheme_options == {
        "wiring": "add",
        "write_rank": 2,
        "read_rank": 0,
        "map_rank": None,
        "mark_slots": False,
        "adapter_scale": 1.5,
        "targets": ("q_proj", "v_proj"),
    }
    assert config.base_model_name_or_path == str(bases())
    assert (model.dtype, {p.dtype for p in model.parameters()}) == (torch.bfloat16, {torch.bfloat16})
    assert model.model.language_model.config._attn_implementation == "eager"
    layer = model.model.language_model.layers[0].rcc
    assert (sorted(layer.write), list(layer.read)) == (["self_attn_q_proj_adapter", "self_attn_v_proj_adapter"], [])
    assert layer.slot_map.weight.shape == (32, 32)


def test_from_base_names_what_it_knows(bases):
    with pytest.raises(TypeError, match=r"from_base\(\) does not know compression_rate, rank\.") as error:
        RCCForCausalLM.from_base(bases(), rank=8, compression_rate=4, ratio=4)
    for known in ("write_rank", "segment_length", "device_map"):
        assert known in str(error.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, torch.float32),
        ({"dtype": "auto"}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": torch.float64}, torch.float64),
        ({"torch_dtype": torch.float16}, torch.float16),
    ],
    ids=str,
)
def test_dtype_passes_through(bases, given, expected, tmp_path):
    model = RCCForCausalLM.from_base(bases(), **SMALL, **given)
    assert {p.dtype for p in model.parameters()} == {expected}
    assert model.config.dtype == expected
    for adapter_only in (False, True):
        folder = tmp_path / str(adapter_only)
        model.save_pretrained(folder, adapter_only=adapter_only)
        # what was saved in bfloat16 is loaded in bfloat16, whatever the base's file holds
        assert {p.dtype for p in RCCForCausalLM.from_pretrained(folder).parameters()} == {expected}
        other = RCCForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert {p.dtype for p in other.parameters()} == {torch.bfloat16}


def test_a_bfloat16_base_gives_a_bfloat16_model(bases, tmp_path):
    base_model().bfloat16().save_pretrained(tmp_path / "base")
    model = RCCForCausalLM.from_base(tmp_path / "base", **SMALL)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_sharded_base(bases, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(bases()).eval()
    plain.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    model = RCCForCausalLM.from_base(tmp_path, **SMALL).eval()
    with torch.no_grad():
        assert torch.equal(model(tokens(2, 30)).logits, plain(tokens(2, 30)).logits)


def test_the_compressor_starts_as_a_fresh_one(bases):
    """Zero updates and identities; nothing of it is what memory happened to hold."""
    model = RCCForCausalLM.from_base(bases(), **SMALL)
    for name, parameter in model.named_parameters():
        if is_trained_part(name):
            assert parameter.isfinite().all()
            assert bool(parameter.any()) != name.endswith(".up"), name


@pytest.mark.parametrize(
    ("load", "family"), [(AutoModelForCausalLM, "llama"), *((RCCForCausalLM, f) for f in FAMILIES)]
)
def test_full_checkpoint(bases, family, load, tmp_path):
    model = bases.trained(family)
    model.save_pretrained(tmp_path)
    again, info = load.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is RCCForCausalLM
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(answers(again), answers(model))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(answers(load.from_pretrained(tmp_path / "again")), answers(model))
    assert stored(tmp_path / "again") == stored(tmp_path)


def test_sharded_checkpoint(bases, tmp_path):
    model = bases.trained()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert torch.equal(answers(RCCForCausalLM.from_pretrained(tmp_path)), answers(model))
    assert torch.equal(answers(AutoModelForCausalLM.from_pretrained(tmp_path)), answers(model))


@pytest.mark.parametrize("adapter_only", [False, True])
@pytest.mark.parametrize("load", [RCCModel, AutoModel], ids=lambda cls: cls.__name__)
def test_the_backbone_of_a_causal_model(bases, adapter_only, load, tmp_path):
    model = bases.trained()
    model.save_pretrained(tmp_path, adapter_only=adapter_only)
    backbone = load.from_pretrained(tmp_path)
    assert type(backbone) is RCCModel
    assert torch.equal(answers(backbone), answers(model.model))


@pytest.mark.parametrize("adapter_only", [False, True])
def test_a_backbone_saved_by_itself(bases, adapter_only, tmp_path):
    backbone = bases.trained().model
    backbone.save_pretrained(tmp_path, adapter_only=adapter_only)
    for load in (RCCModel, AutoModel):
        assert torch.equal(answers(load.from_pretrained(tmp_path)), answers(backbone))
    whole = RCCForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(answers(whole.model), answers(backbone))


@pytest.mark.parametrize("adapter_only", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings(bases, tied, adapter_only, tmp_path):
    base = bases(name=f"tied {tied}", tie_word_embeddings=tied)
    model = bases.trained(base=base)
    model.save_pretrained(tmp_path, adapter_only=adapter_only)
    assert ("lm_head.weight" in stored(tmp_path)) == (not tied and not adapter_only)
    again = RCCForCausalLM.from_pretrained(tmp_path)
    for one in (model, again):
        assert one.config.tie_word_embeddings is tied
        assert (one.lm_head.weight is one.get_input_embeddings().weight) is tied
    assert torch.equal(answers(again), answers(model))
    again.resize_token_embeddings(140)
    assert again.config.text_config.vocab_size == 140
    assert (again.lm_head.weight is again.get_input_embeddings().weight) is tied
    assert again(tokens(1, 5), memory=again.compress(tokens(1, 54))).logits.shape == (1, 5, 140)
    assert torch.equal(again(tokens(1, 5)).logits[..., :128], model(tokens(1, 5)).logits)
    again.save_pretrained(tmp_path / "resized")
    resized = RCCForCausalLM.from_pretrained(tmp_path / "resized")
    assert torch.equal(answers(resized), answers(again))


def test_generation_config_of_the_base_is_carried_over(bases, tmp_path):
    model = bases.trained()
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "adapter", adapter_only=True)
    for one in (model, *(RCCForCausalLM.from_pretrained(tmp_path / kind) for kind in ("full", "adapter"))):
        settings = one.generation_config
        assert (settings.max_new_tokens, settings.top_k, settings.do_sample) == (7, 11, True)
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 0)
        assert one.generate(tokens(1, 5)).shape[1] <= 12


@pytest.mark.parametrize("adapter_only", [False, True])
def test_generation_config_of_the_checkpoint_counts(bases, adapter_only, tmp_path):
    model = bases.trained()
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path, adapter_only=adapter_only)
    assert RCCForCausalLM.from_pretrained(tmp_path).generation_config.max_new_tokens == 3


@pytest.mark.parametrize("load", [RCCForCausalLM, AutoModelForCausalLM], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("adapter_only", [False, True])
def test_fields_of_the_configuration_can_be_overridden(bases, load, adapter_only, tmp_path):
    """As for any model of transformers: what is no argument of loading goes to the configuration."""
    bases.trained().save_pretrained(tmp_path, adapter_only=adapter_only)
    model = load.from_pretrained(tmp_path, ratio=8, window=48)
    assert (model.config.ratio, model.config.window) == (8, 48)
    assert model.compress(tokens(1, 48)).num_slots == 6


def test_a_configuration_can_be_given(bases, tmp_path):
    model = bases.trained()
    model.save_pretrained(tmp_path / "model")
    config = RCCConfig.from_pretrained(tmp_path / "model", ratio=8)
    config.save_pretrained(tmp_path / "config")
    for given in (config, tmp_path / "config", str(tmp_path / "config")):
        again = RCCForCausalLM.from_pretrained(tmp_path / "model", config=given)
        assert again.config.ratio == 8
        assert torch.equal(answers(again), answers_at(model, 8))


def answers_at(model, ratio: int) -> torch.Tensor:
    other = copy.deepcopy(model)
    other.config.ratio = ratio
    return answers(other)


@pytest.mark.parametrize("adapter_only", [False, True])
@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_device_map(bases, device_map, adapter_only, tmp_path):
    model = bases.trained()
    model.save_pretrained(tmp_path, adapter_only=adapter_only)
    placed = RCCForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(answers(placed), answers(model))
    assert_generates_alike(placed, model)


@pytest.mark.parametrize("adapter_only", [False, True])
def test_layers_offloaded_to_disk(bases, adapter_only, tmp_path):
    model = bases.trained()
    model.save_pretrained(tmp_path / "model", adapter_only=adapter_only)
    places = {f"model.language_model.layers.{i}": "cpu" if i != 1 else "disk" for i in range(3)}
    rest = ("model.language_model.embed_tokens", "model.language_model.norm", "model.language_model.rotary_emb")
    places |= dict.fromkeys((*rest, "lm_head"), "cpu")
    where = {"device_map": places, "offload_folder": tmp_path / "offloaded"}
    if adapter_only:
        with pytest.raises(ValueError, match="cannot be loaded with layers offloaded to disk; load it on a device"):
            RCCForCausalLM.from_pretrained(tmp_path / "model", **where)
        return
    placed = RCCForCausalLM.from_pretrained(tmp_path / "model", **where)
    assert {p.device.type for p in placed.model.language_model.layers[1].parameters()} == {"meta"}
    assert torch.equal(answers(placed), answers(model))
    assert_generates_alike(placed, model)


def test_a_pickled_model(bases):
    """Also once the hooks are installed, which know the layers that they are on."""
    model = bases.trained()
    expected = answers(model)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(answers(twin), expected)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if is_trained_part(name):
                parameter.zero_()
    assert torch.equal(answers(model), expected)
    assert not torch.equal(answers(twin), expected)
