# SPDX-License-Identifier: Apache-2.0
"""Adapters of the compressor as LoRA folders of PEFT, and back: the same numbers from PEFT's own model of the base."""

import json

import pytest
import torch
from tiny import (
    RATIO,
    SEGMENT,
    base_model,
    base_with_weights_of,
    move_from_identity,
    ratio_of_norms,
    rcc_model,
    tokenizer,
    tokens,
)
from torch import Tensor

from rcc_hf import RCCForCausalLM
from rcc_hf.cli import main
from rcc_hf.lora import from_peft_lora, to_peft_lora
from rcc_hf.modeling.hooks_rcc import install_hooks
from rcc_hf.modeling.passes_rcc import Pass, enter_pass

peft = pytest.importorskip("peft")

PARTS = ("read", "write")
TARGETS = ["q_proj", "down_proj"]


@torch.no_grad()
def in_pass(model: RCCForCausalLM, part: str) -> tuple[Tensor, ...]:
    """The input of every layer `[B, T, D]`, and the logits, of the base with one kind of adapters on in all rows."""
    decoder = model.model.language_model
    install_hooks(decoder.layers)
    with enter_pass(Pass(part)):
        out = decoder(tokens(2, 9), output_hidden_states=True, use_cache=False)
    return (*out.hidden_states[:-1], model.lm_head(out.last_hidden_state))


@torch.no_grad()
def of_peft(model) -> tuple[Tensor, ...]:
    out = model(tokens(2, 9), output_hidden_states=True, use_cache=False)
    return (*out.hidden_states[:-1], out.logits)


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(actual) == len(expected) == 4
    for one, other in zip(actual, expected, strict=True):
        assert ratio_of_norms(one, other) <= 1e-10


def loaded(base, folder) -> "peft.PeftModel":
    return peft.PeftModel.from_pretrained(base, folder).eval()


def parameters(model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def lora_folder(base, folder, **settings):
    """A LoRA with an effect, saved by PEFT."""
    values = {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False}
    torch.manual_seed(3)
    peft.get_peft_model(base, peft.LoraConfig(**values | settings)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("gpt_neox", {}),  # whose weights have other names
        ("llama", {"adapter_scale": 0.3, "read_rank": 3, "write_rank": 7}),
        ("llama", {"targets": ["q_proj", "down_proj"]}),
    ],
    ids=str,
)
def test_peft_computes_with_the_folder_what_the_pass_does(part, family, options, tmp_path):
    base = base_model(family)
    base.save_pretrained(tmp_path / "base")
    model = RCCForCausalLM.from_base(tmp_path / "base", segment_length=SEGMENT, ratio=RATIO, **options).double().eval()
    move_from_identity(model)
    to_peft_lora(model, tmp_path / part, part=part)
    expected = in_pass(model, part)
    assert ratio_of_norms(of_peft(base.double())[-1], expected[-1]) > 0.1
    wrapped = loaded(base, tmp_path / part)
    assert_equal(of_peft(wrapped), expected)
    assert_equal(of_peft(wrapped.merge_and_unload()), expected)


def test_the_write_folder_makes_the_base_write_the_compressors_states(tmp_path):
    model = rcc_model(scheme_options={"wiring": "add"})  # which keeps the states as they are
    to_peft_lora(model, tmp_path, part="write")
    context = tokens(1, model.config.segment_length)
    memory = model.compress(context)
    with torch.no_grad():
        hidden = loaded(base_with_weights_of(model), tmp_path)(context, output_hidden_states=True).hidden_states
    for index, (state,) in enumerate(memory.layers):
        assert ratio_of_norms(hidden[index][:, RATIO - 1 :: RATIO], state) <= 1e-10


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"r": 4, "target_modules": "all-linear"},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 4, r"layers\.1\.self_attn\.q_proj": 1}},
        {"alpha_pattern": {"q_proj": 1, r"layers\.0.*down_proj": 5}},
        {"layers_to_transform": [1]},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_adapters_begin_as_a_lora(part, settings, tmp_path):
    model = rcc_model()
    base = base_with_weights_of(model)
    lora_folder(base, tmp_path, **settings)
    before = parameters(model)
    expected = of_peft(loaded(base_with_weights_of(model), tmp_path))
    from_peft_lora(model, tmp_path, part=part)
    actual = in_pass(model, part)
    last = -1 if part == "write" else None  # the last layer writes no state, and has no adapters
    for one, other in zip(actual[:last], expected[:last], strict=True):
        assert ratio_of_norms(one, other) <= 1e-10
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(f".rcc.{part}." in name for name in changed)


def test_adapters_of_a_larger_rank_learn_with_all_of_it(tmp_path):
    model = rcc_model()
    from_peft_lora(model, lora_folder(base_with_weights_of(model), tmp_path), part="read")
    model(context_ids=tokens(1, 16), input_ids=tokens(1, 9), labels=tokens(1, 9)).loss.backward()
    adapter = model.model.language_model.layers[1].rcc.read["self_attn_q_proj_adapter"]
    assert not adapter.up[:, 2:].any()
    assert adapter.up.grad.abs().amin(0).min() > 0
    left_out = model.model.language_model.layers[1].rcc.read["self_attn_v_proj_adapter"]
    assert not left_out.up.any()
    assert left_out.up.grad.abs().amin(0).min() > 0


@pytest.mark.parametrize("part", PARTS)
def test_there_and_back(part, tmp_path):
    model, other = rcc_model(), rcc_model()
    to_peft_lora(model, tmp_path, part=part)
    move_from_identity(other)
    from_peft_lora(other, tmp_path, part=part)
    moved = {n: p for n, p in model.named_parameters() if f".rcc.{part}." in n}
    assert moved
    found = parameters(other)
    assert all(torch.equal(found[name], p) for name, p in moved.items())


def test_half_precision(tmp_path):
    model = rcc_model(dtype=torch.bfloat16)
    to_peft_lora(model, tmp_path / "out")
    stored = peft.utils.load_peft_weights(str(tmp_path / "out"))
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    from_peft_lora(model, lora_folder(base_model(), tmp_path / "in"), part="read")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def edited(folder, **changes):
    described = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(described | changes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 5}, r"has rank 5 at model\.layers\.0\..*, and the read adapters have 4; give read_rank=5 or more"),
        ({"use_dora": True}, "made with use_dora"),
        ({"bias": "lora_only"}, "is more than A and B .*base_layer.bias"),
        ({"modules_to_save": ["norm"]}, "is more than A and B .*input_layernorm"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "is more than A and B .*embed_tokens.lora_embedding_A"),
        ({"target_modules": ["lm_head"]}, "is more than A and B .*lm_head.lora_A"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*(embedding layer|lora_only)")
def test_what_adapters_cannot_take_up_is_refused(settings, message, tmp_path):
    base = base_model(attention_bias=True) if "bias" in settings else base_model()
    lora_folder(base, tmp_path, **settings)
    refused(rcc_model(), tmp_path, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "is a IA3 one; only LORA"),
        ({"init_lora_weights": "pissa"}, "initialised by 'pissa', which changes the base's weights"),
        ({"alora_invocation_tokens": [1]}, "made with alora_invocation_tokens"),
    ],
    ids=str,
)
def test_other_kinds_are_refused(changes, message, tmp_path):
    edited(lora_folder(base_model(), tmp_path), **changes)
    refused(rcc_model(), tmp_path, message)


def test_a_lora_of_another_base_is_refused(tmp_path):
    lora_folder(base_model(intermediate_size=96), tmp_path)
    refused(rcc_model(), tmp_path, r"is of another base: at .*down_proj A is \(2, 96\).*this base maps 64 to 32")


@pytest.mark.parametrize("options", [{"read_rank": 0}, {"targets": ("q_proj",)}], ids=str)
def test_adapters_that_do_not_exist_take_nothing_up(options, tmp_path):
    lora_folder(base_model(), tmp_path)
    refused(rcc_model(scheme_options=options), tmp_path, "has no read adapter; give read_rank and targets to from_base")


def refused(model, folder, message):
    before = parameters(model)
    with pytest.raises(ValueError, match=message):
        from_peft_lora(model, folder, part="read")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_wrong_arguments(tmp_path):
    model = rcc_model()
    with pytest.raises(ValueError, match="part='decode' is not known; choose one of read, write"):
        to_peft_lora(model, tmp_path, part="decode")
    with pytest.raises(ValueError, match=r"no write adapters \(write_rank is 0\)"):
        to_peft_lora(rcc_model(scheme_options={"write_rank": 0}), tmp_path, part="write")
    with pytest.raises(ValueError, match="offloaded to disk"):
        to_peft_lora(model.to("meta"), tmp_path)
    wrapped = peft.get_peft_model(rcc_model(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"not a PeftModelForCausalLM; take it out .* merge_and_unload"):
        to_peft_lora(wrapped, tmp_path)
    assert not any(tmp_path.iterdir())


def test_wrong_folders_and_models(tmp_path):
    refused(rcc_model(), tmp_path, r"it has no adapter_config\.json")
    lora_folder(base_model(), tmp_path)
    refused(rcc_model(scheme_options={"adapter_scale": 0.0}), tmp_path, "adapter_scale is 0")
    (tmp_path / "adapter_model.safetensors").unlink()
    refused(rcc_model(), tmp_path, r"has no adapter_model\.safetensors; load it in PEFT and save it again")


def test_convert_on_the_command_line(tmp_path, capsys):
    base = base_model()
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    lora_folder(base, tmp_path / "lora", target_modules=["q_proj"])
    made = ["--segment_length", "16", "--ratio", "4", "--read_rank", "2", "--write_rank", "2"]
    both = ["--read-lora", str(tmp_path / "lora"), "--write-lora", str(tmp_path / "lora")]
    assert main(["convert", str(tmp_path / "base"), str(tmp_path / "rcc"), *made, *both]) == 0
    for part in PARTS:
        assert main(["convert", str(tmp_path / "rcc"), str(tmp_path / part), "--to-peft", part]) == 0
        assert f"the {part} adapters, as a LoRA of PEFT" in capsys.readouterr().out
    stored = peft.utils.load_peft_weights(str(tmp_path / "lora"))
    for part, count in (("read", 3), ("write", 2)):
        again = peft.utils.load_peft_weights(str(tmp_path / part))
        kept = {name: tensor for name, tensor in again.items() if tensor.any() and name in stored}
        assert len(kept) == 2 * count
        for name, tensor in kept.items():  # alpha is 6 there and 2 * 2 here
            factor = 6 / 4 if ".lora_B." in name else 1
            torch.testing.assert_close(tensor, stored[name] * factor)
    assert main(["convert", "a", "b", "--to-peft", "read", "--adapter-only"]) == 2
    assert "--to_peft writes a LoRA and no checkpoint" in capsys.readouterr().err
