# SPDX-License-Identifier: Apache-2.0
"""Adapter-only checkpoints: the compressor alone in a file, and a base from elsewhere that must be the right one."""

import json
import logging
import shutil

import pytest
import torch
from checkpoints import FAMILIES, Bases, answers, stored
from tiny import base_model, base_with_weights_of, rcc_model, tokens
from transformers import AutoModel, AutoModelForCausalLM

from rcc_hf import RCCForCausalLM
from rcc_hf import checkpoints as rcc_checkpoints
from rcc_hf.modeling.fingerprint_rcc import fingerprint_base, is_trained_part


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("place", ["remembered", "given"])
@pytest.mark.parametrize(
    ("load", "family"), [(AutoModelForCausalLM, "llama"), *((RCCForCausalLM, f) for f in FAMILIES)]
)
def test_adapter_only_checkpoint(bases, family, load, place, tmp_path):
    model, base = bases.trained(family), bases(family)
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


def test_adapter_only_checkpoint_holds_the_compressor_alone(bases, tmp_path):
    model = bases.trained()
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


def test_a_model_loaded_adapter_only_can_be_saved_in_full(bases, tmp_path):
    model = bases.trained()
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
def test_adapter_only_checkpoint_in_other_files(bases, settings, tmp_path):
    model = bases.trained()
    model.save_pretrained(tmp_path, adapter_only=True, **settings)
    variant = {name: value for name, value in settings.items() if name == "variant"}
    assert torch.equal(answers(RCCForCausalLM.from_pretrained(tmp_path, **variant)), answers(model))


def test_a_base_of_other_shapes_is_refused(bases, tmp_path):
    bases.trained().save_pretrained(tmp_path, adapter_only=True)
    wider = bases(name="wider", hidden_size=64)
    with pytest.raises((ValueError, RuntimeError)) as error:
        RCCForCausalLM.from_pretrained(tmp_path, base_model=wider)
    assert str(wider) in str(error.value)


@pytest.mark.parametrize(("family", "overrides"), [("llama", {"num_hidden_layers": 2}), ("gpt_neox", {})])
def test_a_base_that_lacks_weights_is_refused(bases, family, overrides, tmp_path):
    bases.trained().save_pretrained(tmp_path, adapter_only=True)
    other = bases(family, name=f"other {family}", **overrides)
    with pytest.raises(ValueError, match="lacks weights that its configuration") as error:
        RCCForCausalLM.from_pretrained(tmp_path, base_model=other)
    assert str(other) in str(error.value)


def test_a_base_of_other_weights_is_warned_of(bases, tmp_path, caplog):
    bases.trained().save_pretrained(tmp_path, adapter_only=True)
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


def test_a_base_in_another_dtype_is_the_same_base(bases, tmp_path, caplog):
    bases.trained().save_pretrained(tmp_path, adapter_only=True)
    with caplog.at_level(logging.WARNING):
        RCCForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert caplog.text == ""


def test_quantised_weights_have_no_part_in_the_fingerprint_of_a_base():
    """Their kernels lay them out anew."""
    base = torch.nn.Linear(4, 4)
    whole = fingerprint_base(base)
    base.packed = torch.nn.Parameter(torch.arange(8, dtype=torch.uint8), requires_grad=False)
    assert fingerprint_base(base) == whole
    base.other = torch.nn.Parameter(torch.ones(8))
    assert fingerprint_base(base) != whole


def test_an_unknown_place_of_the_base_is_an_error(bases, tmp_path):
    model = bases.trained()
    model.config.base_model_name_or_path = None
    model.save_pretrained(tmp_path, adapter_only=True)
    with pytest.raises(ValueError, match="does not say where its base is; pass base_model="):
        RCCForCausalLM.from_pretrained(tmp_path)


def test_a_base_has_no_use_for_a_full_checkpoint(bases, tmp_path):
    bases.trained().save_pretrained(tmp_path)
    for load in (RCCForCausalLM, AutoModelForCausalLM, AutoModel):
        with pytest.raises(ValueError, match="is a full checkpoint: base_model has no use here"):
            load.from_pretrained(tmp_path, base_model=bases())


def test_another_compressor_in_the_folder_is_refused(bases, tmp_path):
    bases.trained().save_pretrained(tmp_path / "a", adapter_only=True)
    bases.trained(write_rank=8).save_pretrained(tmp_path / "b", adapter_only=True)
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a")
    with pytest.raises(ValueError, match=r"does not fit its configuration; it differs in .*write"):
        RCCForCausalLM.from_pretrained(tmp_path / "a")


def test_a_checkpoint_may_name_the_bundled_base(tmp_path, monkeypatch):
    """As a shipped one does: its configuration has no path of the machine that it was trained on."""
    model = rcc_model(dtype=torch.float32)
    base_with_weights_of(model).save_pretrained(tmp_path / "base")
    model.config.base_model_name_or_path = "smollm2"
    model.save_pretrained(tmp_path / "shipped", adapter_only=True)
    monkeypatch.setattr(
        rcc_checkpoints, "resolve_base", lambda name: str(tmp_path / "base") if name == "smollm2" else name
    )
    loaded = rcc_checkpoints.load_model(str(tmp_path / "shipped"), dtype="float32").eval()
    assert torch.equal(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits)
    model.save_pretrained(tmp_path / "full")  # which has no use for a base
    assert rcc_checkpoints.load_model(str(tmp_path / "full"), dtype="float32").config.adapter_only is False
