# SPDX-License-Identifier: Apache-2.0
"""From base checkpoints to RCC checkpoints, full and adapter-only, and back: what is carried over, and what fits."""

import copy
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_cache import put_into_cache
from safetensors import safe_open
from tiny import RATIO, SEGMENT, WINDOW, base_model, move_from_identity, tokens
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import hub

from rcc_hf import RCCConfig, RCCForCausalLM, RCCModel
from rcc_hf.modeling.fingerprint_rcc import is_trained_part

SMALL = {
    "segment_length": SEGMENT,
    "ratio": RATIO,
    "window": WINDOW,
    "write_rank": 4,
    "read_rank": 4,
    "map_rank": 4,
}
ROOT = Path(__file__).parent.parent
CODE = {path.name for path in (ROOT / "modeling").glob("*.py")} - {"__init__.py"}
# a fused projection, a router and experts that transformers itself converts, soft capping and tied embeddings
FAMILIES = ("llama", "gpt_neox", "phi3", "mixtral", "gemma2", "granite")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of base checkpoints, by family; made when asked for."""
    folder = tmp_path_factory.mktemp("bases")

    def base(family="llama", name=None, **overrides) -> Path:
        path = folder / (name or family)
        if not path.is_dir():
            model = base_model(family, **overrides)
            model.generation_config = GenerationConfig(
                max_new_tokens=7, top_k=11, do_sample=True, bos_token_id=1, eos_token_id=2, pad_token_id=0
            )
            model.save_pretrained(path)
        return path

    return base


@pytest.fixture(scope="module")
def trained(bases):
    """Builds a model on a base whose compressor is not the one it would start with."""

    def model(family="llama", base=None, **overrides) -> RCCForCausalLM:
        made = RCCForCausalLM.from_base(base or bases(family), **SMALL | overrides).eval()
        move_from_identity(made)
        return made

    return model


@torch.no_grad()
def answers(model) -> torch.Tensor:
    """Logits (of the backbone alone: hidden states) without memory and behind one."""
    memory, ids = model.compress(tokens(2, 54)), tokens(2, 5, seed=1)
    outputs = [model(ids), model(ids, memory=memory)]
    return torch.cat([output.logits if hasattr(output, "logits") else output[0] for output in outputs], 1)


def stored(folder: Path) -> dict[str, torch.Size]:
    """Names and shapes of all weights of a checkpoint."""
    shapes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}
    return shapes


# from_base


@pytest.mark.parametrize("family", FAMILIES)
def test_from_base_computes_what_the_base_does(bases, family):
    plain = AutoModelForCausalLM.from_pretrained(bases(family)).eval()
    model = RCCForCausalLM.from_base(bases(family), **SMALL).eval()
    ids = tokens(2, 40)
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
        "adapter_scale": 1.5,
        "targets": ("q_proj", "v_proj"),
    }
    assert config.base_model_name_or_path == str(bases())
    assert (model.dtype, {p.dtype for p in model.parameters()}) == (torch.bfloat16, {torch.bfloat16})
    assert model.model.language_model.config._attn_implementation == "eager"
    layer = model.model.language_model.layers[0].rcc
    assert (sorted(layer.write), list(layer.read)) == (["self_attn_q_proj", "self_attn_v_proj"], [])
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
        assert torch.equal(model(tokens(2, 40)).logits, plain(tokens(2, 40)).logits)


def test_the_compressor_starts_as_a_fresh_one(bases):
    """Zero updates and identities; nothing of it is what memory happened to hold."""
    model = RCCForCausalLM.from_base(bases(), **SMALL)
    for name, parameter in model.named_parameters():
        if is_trained_part(name):
            assert parameter.isfinite().all()
            assert bool(parameter.any()) != name.endswith(".up"), name


# full checkpoints


@pytest.mark.parametrize(
    ("load", "family"), [(AutoModelForCausalLM, "llama"), *((RCCForCausalLM, f) for f in FAMILIES)]
)
def test_full_checkpoint(trained, family, load, tmp_path):
    model = trained(family)
    model.save_pretrained(tmp_path)
    again, info = load.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is RCCForCausalLM
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(answers(again), answers(model))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(answers(load.from_pretrained(tmp_path / "again")), answers(model))
    assert stored(tmp_path / "again") == stored(tmp_path)


def test_sharded_checkpoint(trained, tmp_path):
    model = trained()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert torch.equal(answers(RCCForCausalLM.from_pretrained(tmp_path)), answers(model))
    assert torch.equal(answers(AutoModelForCausalLM.from_pretrained(tmp_path)), answers(model))


@pytest.mark.parametrize("adapter_only", [False, True])
@pytest.mark.parametrize("load", [RCCModel, AutoModel], ids=lambda cls: cls.__name__)
def test_the_backbone_of_a_causal_model(trained, adapter_only, load, tmp_path):
    model = trained()
    model.save_pretrained(tmp_path, adapter_only=adapter_only)
    backbone = load.from_pretrained(tmp_path)
    assert type(backbone) is RCCModel
    assert torch.equal(answers(backbone), answers(model.model))


@pytest.mark.parametrize("adapter_only", [False, True])
def test_a_backbone_saved_by_itself(trained, adapter_only, tmp_path):
    backbone = trained().model
    backbone.save_pretrained(tmp_path, adapter_only=adapter_only)
    for load in (RCCModel, AutoModel):
        assert torch.equal(answers(load.from_pretrained(tmp_path)), answers(backbone))
    whole = RCCForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(answers(whole.model), answers(backbone))


@pytest.mark.parametrize("adapter_only", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings(bases, trained, tied, adapter_only, tmp_path):
    base = bases(name=f"tied {tied}", tie_word_embeddings=tied)
    model = trained(base=base)
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


def test_generation_config_of_the_base_is_carried_over(trained, tmp_path):
    model = trained()
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "adapter", adapter_only=True)
    for one in (model, *(RCCForCausalLM.from_pretrained(tmp_path / kind) for kind in ("full", "adapter"))):
        settings = one.generation_config
        assert (settings.max_new_tokens, settings.top_k, settings.do_sample) == (7, 11, True)
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 0)
        assert one.generate(tokens(1, 5)).shape[1] <= 12


@pytest.mark.parametrize("adapter_only", [False, True])
def test_generation_config_of_the_checkpoint_counts(trained, adapter_only, tmp_path):
    model = trained()
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path, adapter_only=adapter_only)
    assert RCCForCausalLM.from_pretrained(tmp_path).generation_config.max_new_tokens == 3


@pytest.mark.parametrize("load", [RCCForCausalLM, AutoModelForCausalLM], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("adapter_only", [False, True])
def test_fields_of_the_configuration_can_be_overridden(trained, load, adapter_only, tmp_path):
    """As for any model of transformers: what is no argument of loading goes to the configuration."""
    trained().save_pretrained(tmp_path, adapter_only=adapter_only)
    model = load.from_pretrained(tmp_path, ratio=8, window=48)
    assert (model.config.ratio, model.config.window) == (8, 48)
    assert model.compress(tokens(1, 48)).num_slots == 6


def test_a_configuration_can_be_given(trained, tmp_path):
    model = trained()
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


# adapter-only checkpoints


@pytest.mark.parametrize("place", ["remembered", "given"])
@pytest.mark.parametrize(
    ("load", "family"), [(AutoModelForCausalLM, "llama"), *((RCCForCausalLM, f) for f in FAMILIES)]
)
def test_adapter_only_checkpoint(bases, trained, family, load, place, tmp_path):
    model, base = trained(family), bases(family)
    model.save_pretrained(tmp_path, adapter_only=True)
    assert (model.config.adapter_only, model.config.base_fingerprint) == (False, None)
    if place == "given":
        shutil.copytree(base, tmp_path / "moved")
        described = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(described | {"base_model_name_or_path": None}))
    given = {"base_model": tmp_path / "moved"} if place == "given" else {}
    again, info = load.from_pretrained(tmp_path, **given, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (type(again), again.config.adapter_only) == (RCCForCausalLM, False)
    assert torch.equal(answers(again), answers(model))


def test_adapter_only_checkpoint_holds_the_compressor_alone(trained, tmp_path):
    model = trained()
    model.save_pretrained(tmp_path / "adapter", adapter_only=True)
    model.save_pretrained(tmp_path / "full")
    trained_parts = {n: list(p.shape) for n, p in model.named_parameters() if is_trained_part(n)}
    assert stored(tmp_path / "adapter") == trained_parts
    assert trained_parts.items() < stored(tmp_path / "full").items()
    size = sum(p.nbytes for n, p in model.named_parameters() if is_trained_part(n))
    assert size < (tmp_path / "adapter" / "model.safetensors").stat().st_size < size + 20_000
    described = json.loads((tmp_path / "adapter" / "config.json").read_text())
    assert described["adapter_only"] is True
    assert len(described["base_fingerprint"]) == 16
    # otherwise PEFT would take the folder for an adapter of its own
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()


def test_a_model_loaded_adapter_only_can_be_saved_in_full(bases, trained, tmp_path):
    model = trained()
    model.save_pretrained(tmp_path / "adapter", adapter_only=True)
    loaded = RCCForCausalLM.from_pretrained(tmp_path / "adapter")
    loaded.save_pretrained(tmp_path / "full")
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} <= stored(tmp_path / "full").keys()
    described = json.loads((tmp_path / "full" / "config.json").read_text())
    assert not described.get("adapter_only", False)
    described["base_model_name_or_path"] = "nowhere/to-be-found"
    (tmp_path / "full" / "config.json").write_text(json.dumps(described))
    assert torch.equal(answers(RCCForCausalLM.from_pretrained(tmp_path / "full")), answers(model))
    loaded.save_pretrained(tmp_path / "adapter again", adapter_only=True)
    assert torch.equal(answers(RCCForCausalLM.from_pretrained(tmp_path / "adapter again")), answers(model))


@pytest.mark.parametrize("settings", [{"max_shard_size": "5KB"}, {"variant": "small"}], ids=str)
def test_adapter_only_checkpoint_in_other_files(trained, settings, tmp_path):
    model = trained()
    model.save_pretrained(tmp_path, adapter_only=True, **settings)
    variant = {name: value for name, value in settings.items() if name == "variant"}
    assert torch.equal(answers(RCCForCausalLM.from_pretrained(tmp_path, **variant)), answers(model))


def test_a_base_of_other_shapes_is_refused(bases, trained, tmp_path):
    trained().save_pretrained(tmp_path, adapter_only=True)
    wider = bases(name="wider", hidden_size=64)
    with pytest.raises((ValueError, RuntimeError)) as error:
        RCCForCausalLM.from_pretrained(tmp_path, base_model=wider)
    assert str(wider) in str(error.value)


@pytest.mark.parametrize(("family", "overrides"), [("llama", {"num_hidden_layers": 2}), ("gpt_neox", {})])
def test_a_base_that_lacks_weights_is_refused(bases, trained, family, overrides, tmp_path):
    trained().save_pretrained(tmp_path, adapter_only=True)
    other = bases(family, name=f"other {family}", **overrides)
    with pytest.raises(ValueError, match="lacks weights that its configuration") as error:
        RCCForCausalLM.from_pretrained(tmp_path, base_model=other)
    assert str(other) in str(error.value)


def test_a_base_of_other_weights_is_warned_of(bases, trained, tmp_path, caplog):
    trained().save_pretrained(tmp_path, adapter_only=True)
    with caplog.at_level(logging.WARNING):
        RCCForCausalLM.from_pretrained(tmp_path)
    assert caplog.text == ""
    torch.manual_seed(1)
    other = base_model()
    other.model.layers[1].mlp.up_proj.weight.data.neg_()
    other.save_pretrained(tmp_path / "other")
    with caplog.at_level(logging.WARNING):
        model = RCCForCausalLM.from_pretrained(tmp_path, base_model=tmp_path / "other")
    assert "are not those that this compressor was trained on" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["base_fingerprint"] in caplog.text
    with torch.no_grad():
        assert torch.equal(model(tokens(1, 5)).logits, other(tokens(1, 5)).logits)


def test_a_base_in_another_dtype_is_the_same_base(trained, tmp_path, caplog):
    trained().save_pretrained(tmp_path, adapter_only=True)
    with caplog.at_level(logging.WARNING):
        RCCForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert caplog.text == ""


def test_an_unknown_place_of_the_base_is_an_error(trained, tmp_path):
    model = trained()
    model.config.base_model_name_or_path = None
    model.save_pretrained(tmp_path, adapter_only=True)
    with pytest.raises(ValueError, match="does not say where its base is; pass base_model="):
        RCCForCausalLM.from_pretrained(tmp_path)


def test_a_base_has_no_use_for_a_full_checkpoint(bases, trained, tmp_path):
    trained().save_pretrained(tmp_path)
    for load in (RCCForCausalLM, AutoModelForCausalLM, AutoModel):
        with pytest.raises(ValueError, match="is a full checkpoint: base_model has no use here"):
            load.from_pretrained(tmp_path, base_model=bases())


def test_another_compressor_in_the_folder_is_refused(trained, tmp_path):
    trained().save_pretrained(tmp_path / "a", adapter_only=True)
    trained(write_rank=8).save_pretrained(tmp_path / "b", adapter_only=True)
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a")
    with pytest.raises(ValueError, match=r"does not fit its configuration; it differs in .*write"):
        RCCForCausalLM.from_pretrained(tmp_path / "a")


# the Hub


@pytest.fixture
def repositories(bases, trained, tmp_path):
    """A base, a full and an adapter-only checkpoint in a cache of the Hub; the last has a second revision."""
    model = trained()
    model.config.base_model_name_or_path = "someone/base"
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "adapter", adapter_only=True)
    put_into_cache(tmp_path / "cache", "someone/base", bases())
    put_into_cache(tmp_path / "cache", "someone/full", tmp_path / "full")
    put_into_cache(tmp_path / "cache", "someone/adapter", tmp_path / "adapter")
    later = copy.deepcopy(model)
    move_from_identity(later)
    later.save_pretrained(tmp_path / "later", adapter_only=True)
    put_into_cache(tmp_path / "cache", "someone/adapter", tmp_path / "later", revision="v2")
    return tmp_path / "cache", model, later


@pytest.mark.parametrize("load", [RCCForCausalLM, AutoModelForCausalLM], ids=lambda cls: cls.__name__)
def test_checkpoints_of_the_hub(repositories, load):
    cache, model, later = repositories
    expected = answers(model)
    assert torch.equal(answers(load.from_pretrained("someone/full", cache_dir=cache)), expected)
    assert torch.equal(answers(load.from_pretrained("someone/adapter", cache_dir=cache)), expected)
    # the base has no such revision
    at_v2 = load.from_pretrained("someone/adapter", cache_dir=cache, revision="v2")
    assert torch.equal(answers(at_v2), answers(later))
    assert not torch.equal(answers(later), expected)


def test_a_base_of_the_hub(repositories):
    cache, model, _ = repositories
    made = RCCForCausalLM.from_base("someone/base", **SMALL, cache_dir=cache)
    assert made.config.base_model_name_or_path == "someone/base"
    with torch.no_grad():
        assert torch.equal(made(tokens(1, 5)).logits, model(tokens(1, 5)).logits)


class FakeApi:
    """Takes a commit and keeps its files in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.commits = folder, []

    def create_repo(self, repo_id, **settings):
        from huggingface_hub import RepoUrl

        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **settings):
        self.folder.mkdir()
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, self.folder / operation.path_in_repo)
        self.commits.append(repo_id)


@pytest.fixture
def upload(tmp_path, monkeypatch):
    """Where a push ends up instead of the Hub."""
    api = FakeApi(tmp_path / "uploaded")
    monkeypatch.setattr(hub, "_hf_api", api)
    monkeypatch.setattr(hub.ModelCard, "load", lambda *args, **kwargs: hub.ModelCard("---\n---\n"))
    return api


@pytest.mark.parametrize("how", ["push_to_hub", "push_to_hub adapter-only", "save_pretrained", "save adapter-only"])
def test_pushing_takes_the_code_along(trained, upload, how, tmp_path):
    model, adapter_only = trained(), how.endswith("adapter-only")
    if how == "push_to_hub":
        model.push_to_hub("someone/model")
    elif how == "push_to_hub adapter-only":
        model.push_to_hub("someone/model", adapter_only=True)
    else:
        model.save_pretrained(tmp_path / "x", adapter_only=adapter_only, push_to_hub=True, repo_id="someone/model")
    assert upload.commits == ["someone/model"]
    names = {path.name for path in upload.folder.iterdir()}
    assert CODE | {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert json.loads((upload.folder / "config.json").read_text()).get("adapter_only", False) == adapter_only
    assert ("lm_head.weight" in stored(upload.folder)) != adapter_only
    assert torch.equal(answers(RCCForCausalLM.from_pretrained(upload.folder)), answers(model))


# configuration


def test_configuration_round_trip(trained, tmp_path):
    config = trained(targets=["q_proj"], wiring="add", map_rank=None, reconstruction_prompt_ids=[4, 5]).config
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


def test_nested_fields_of_the_configuration_can_be_overridden(trained, tmp_path):
    trained().config.save_pretrained(tmp_path)
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


def test_an_override_is_checked_like_an_argument(trained, tmp_path):
    trained().config.save_pretrained(tmp_path)
    for load in (RCCConfig, AutoConfig):
        with pytest.raises(ValueError, match="ratio=7 does not divide segment_length=16"):
            load.from_pretrained(tmp_path, ratio=7)


def test_classes_know_each_other(trained, tmp_path):
    assert RCCForCausalLM.config_class is RCCModel.config_class is RCCConfig
    assert RCCForCausalLM.base_model_prefix == "model"
    model = trained()
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


# placement and copies


@pytest.mark.parametrize("adapter_only", [False, True])
@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_device_map(trained, device_map, adapter_only, tmp_path):
    model = trained()
    model.save_pretrained(tmp_path, adapter_only=adapter_only)
    placed = RCCForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(answers(placed), answers(model))
    assert_generates_alike(placed, model)


def assert_generates_alike(one, other) -> None:
    settings = {"max_new_tokens": 6, "do_sample": False}
    for prompt, context in ((tokens(2, 5), tokens(2, 54)), (tokens(2, 61), None)):
        texts = []
        for model in (one, other):
            memory = {} if context is None else {"memory": model.compress(context)}
            texts.append(model.generate(prompt, **memory, **settings))
        assert torch.equal(*texts)


@pytest.mark.parametrize("adapter_only", [False, True])
def test_layers_offloaded_to_disk(trained, adapter_only, tmp_path):
    model = trained()
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


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_adapters_of_its_own(trained, copied):
    """Also once the hooks are installed, which know the layers that they are on."""
    model = trained()
    expected = answers(model)
    twin = copied(model)
    assert torch.equal(answers(twin), expected)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if is_trained_part(name):
                parameter.zero_()
    assert torch.equal(answers(model), expected)
    assert not torch.equal(answers(twin), expected)


# side effects

SIDE_EFFECTS = """\
import logging, os, sys, warnings
import torch, transformers
from transformers import AttentionInterface, AttentionMaskInterface, cache_utils, dynamic_module_utils
from transformers import generation, masking_utils, modeling_layers, modeling_utils
from transformers.models.auto import auto_factory, configuration_auto, modeling_auto

modules = [
    cache_utils, dynamic_module_utils, generation.utils, masking_utils, modeling_layers, modeling_utils, auto_factory,
    configuration_auto, modeling_auto, transformers.configuration_utils, torch.nn.Module, torch.utils.checkpoint,
    transformers.PreTrainedModel, transformers.PreTrainedConfig, transformers.GenerationMixin, cache_utils.Cache,
    cache_utils.DynamicLayer, transformers.models.llama.modeling_llama, transformers.LlamaForCausalLM,
]
registries = {
    name: value
    for name, value in vars(modeling_auto).items()
    if isinstance(value, auto_factory._LazyAutoMapping)
}
registries["configs"] = configuration_auto.CONFIG_MAPPING


def seen():
    return {
        "attributes": [{name: id(value) for name, value in vars(module).items()} for module in modules],
        "attention": [sorted(AttentionInterface()), sorted(AttentionMaskInterface())],
        "layers": dict(vars(cache_utils).get("LAYER_TYPE_CACHE_MAPPING", {})),
        "environment": dict(os.environ),
        "torch": [torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed()],
        "logging": [list(logging.root.handlers), logging.root.level, logging.getLogger("transformers").level],
        "hooks": [sys.excepthook, sys.displayhook, list(warnings.filters)],
    }


def registered():
    return {(name, str(key)) for name, registry in registries.items() for key in registry._extra_content}


before, entries = seen(), registered()
import rcc_hf
after = seen()
assert before.keys() == after.keys()
for name in before:
    assert before[name] == after[name], name
assert registered() - entries == {
    ("configs", "rcc"),
    ("MODEL_MAPPING", str(rcc_hf.RCCConfig)),
    ("MODEL_FOR_CAUSAL_LM_MAPPING", str(rcc_hf.RCCConfig)),
}, registered() - entries
assert entries <= registered()
"""


def test_importing_the_package_changes_nothing_but_three_registrations(tmp_path):
    done = subprocess.run([sys.executable, "-c", SIDE_EFFECTS], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


def test_other_models_are_what_they_were(bases):
    """The Auto classes give everybody else's checkpoints the classes that they always gave."""
    assert type(AutoConfig.from_pretrained(bases())) is LlamaConfig
    assert type(AutoModelForCausalLM.from_pretrained(bases())) is LlamaForCausalLM
    assert os.environ.get("HF_HUB_OFFLINE") == "1"
