# SPDX-License-Identifier: Apache-2.0
"""Bases in 4 bits: a compressor is trained on one, saved without it, and takes a user's LoRA on top (QLoRA)."""

import logging

import pytest
import torch
from tiny import RATIO, SEGMENT, WINDOW, base_model, move_from_identity, ratio_of_norms, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rcc_hf import RCCForCausalLM, RCCMemory
from rcc_hf.modeling.fingerprint_rcc import is_trained_part
from rcc_hf.objectives import reconstruction_example
from rcc_hf.training import TrainSettings, train

bitsandbytes = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
COMPRESSOR = {"segment_length": SEGMENT, "ratio": RATIO, "window": WINDOW, "write_rank": 4, "read_rank": 4}
EXACT_ON_CPU = {"device_map": "cpu", "dtype": torch.float32}


@pytest.fixture
def base(tmp_path):
    """Folder of a base whose maps are as wide as blocks of 4-bit weights."""
    base_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def exact(model):
    """On CPUs with bfloat16 instructions bitsandbytes lays the weights out anew, with less precise scales, at the first
    forward call in eval mode, and gives no gradients from then on."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def compressed_base(base, **options) -> RCCForCausalLM:
    given = COMPRESSOR | EXACT_ON_CPU | {"quantization_config": FOUR_BITS} | options
    model = exact(RCCForCausalLM.from_base(base, **given))
    move_from_identity(model)
    return model


def load(folder, **options) -> RCCForCausalLM:
    return exact(RCCForCausalLM.from_pretrained(folder, **EXACT_ON_CPU | options))


def num_quantised(model) -> int:
    return sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())


@torch.no_grad()
def answers(model) -> Tensor:
    """Logits without memory and behind one."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    memory, ids = inner.compress(tokens(2, 54)), tokens(2, 5, seed=1)
    return torch.cat([model(input_ids=ids).logits, model(input_ids=ids, memory=memory).logits], 1)


def loss_of(model) -> Tensor:
    ids = tokens(2, 9, seed=1)
    return model(context_ids=tokens(2, 54), input_ids=ids, labels=ids).loss


def gradients(model) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model.train()).backward()
    model.eval()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def parameters(model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_gradients_are_those_on_the_dequantised_base(base):
    model = compressed_base(base)
    model.freeze_base()
    found, logits = gradients(model), answers(model)
    assert num_quantised(model) == 3 * 7
    assert {name for name in found if is_trained_part(name)} == set(found)
    assert {p.dtype for name, p in model.named_parameters() if is_trained_part(name)} == {torch.float32}
    model.dequantize()
    assert num_quantised(model) == 0
    assert ratio_of_norms(answers(model), logits) <= 1e-5
    expected = gradients(model)
    for name, gradient in found.items():
        assert ratio_of_norms(gradient, expected[name]) <= 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_trainer_trains_the_compressor_alone(base, dtype, tmp_path):
    model = compressed_base(base, dtype=dtype)
    before = parameters(model)
    examples = [reconstruction_example(context, [1, 4]) for context in tokens(2, SEGMENT)] * 8
    settings = TrainSettings(output=str(tmp_path / "out"), max_steps=8, batch_size=4, learning_rate=1e-2)
    metrics = train(model, settings, examples, examples[:2])
    assert metrics["eval_loss"] < metrics["train_loss"]
    for name, after in model.named_parameters():
        assert torch.equal(before[name], after) != is_trained_part(name), name
        assert after.dtype == before[name].dtype, name
    again = load(tmp_path / "out", quantization_config=FOUR_BITS, dtype=dtype)
    assert torch.equal(answers(again), answers(exact(model)))
    train(again, TrainSettings(output=str(tmp_path / "out"), max_steps=9, resume=True), examples)


def test_the_compressor_is_saved_without_the_base(base, tmp_path, caplog):
    model = compressed_base(base)
    expected = answers(model)
    model.save_pretrained(tmp_path / "adapter", adapter_only=True)
    assert "quantization_config" not in (tmp_path / "adapter" / "config.json").read_text()
    assert (model.config.quantization_config, model.is_quantized) == (FOUR_BITS, True)
    assert torch.equal(answers(load(tmp_path / "adapter", quantization_config=FOUR_BITS)), expected)
    with caplog.at_level(logging.WARNING):
        full = load(tmp_path / "adapter")
    assert "That is expected if the base is quantised" in caplog.text
    assert num_quantised(full) == 0
    assert 1e-4 < ratio_of_norms(answers(full), expected) < 0.3
    trained = {name: p for name, p in parameters(full).items() if is_trained_part(name)}
    assert all(torch.equal(p, parameters(model)[name]) for name, p in trained.items())


def test_a_full_checkpoint_in_4_bits(base, tmp_path):
    model = compressed_base(base)
    expected = answers(model)
    model.save_pretrained(tmp_path / "full")
    again = load(tmp_path / "full")
    assert num_quantised(again) == 3 * 7
    assert torch.equal(answers(again), expected)
    again.save_pretrained(tmp_path / "adapter", adapter_only=True)
    assert torch.equal(answers(load(tmp_path / "adapter", quantization_config=FOUR_BITS)), expected)


def test_a_base_that_was_saved_in_4_bits(base, tmp_path):
    """Whether the base is quantised is for its checkpoint to say, not for that of the compressor."""
    small = tmp_path / "small"
    AutoModelForCausalLM.from_pretrained(base, quantization_config=FOUR_BITS, **EXACT_ON_CPU).save_pretrained(small)
    model = compressed_base(small, quantization_config=None)
    expected = answers(model)
    assert num_quantised(model) == 3 * 7
    model.save_pretrained(tmp_path / "adapter", adapter_only=True)
    assert "quantization_config" not in (tmp_path / "adapter" / "config.json").read_text()
    assert torch.equal(answers(load(tmp_path / "adapter")), expected)
    assert torch.equal(answers(load(tmp_path / "adapter", base_model=base, quantization_config=FOUR_BITS)), expected)
    assert num_quantised(load(tmp_path / "adapter", base_model=base)) == 0


def test_a_memory_of_another_process(base, tmp_path):
    """A model that has run and one that was just loaded have the same fingerprint, whatever kernels did in between."""
    compressed_base(base).save_pretrained(tmp_path / "full")
    first, second = (RCCForCausalLM.from_pretrained(tmp_path / "full", device_map="cpu").eval() for _ in range(2))
    with torch.no_grad():
        first(tokens(1, 5))
        first.compress(tokens(1, 32)).save_pretrained(tmp_path / "memory")
        memory = RCCMemory.from_pretrained(tmp_path / "memory")
        assert torch.equal(second(tokens(1, 5), memory=memory).logits, first(tokens(1, 5), memory=memory).logits)


def test_qlora_with_the_compressor_trained_along(base, tmp_path):
    """4 bits, `prepare_model_for_kbit_training`, a LoRA and the compressor; later, merged into the full base."""
    compressed_base(base).save_pretrained(tmp_path / "adapter", adapter_only=True)

    def ready() -> RCCForCausalLM:
        return peft.prepare_model_for_kbit_training(load(tmp_path / "adapter", quantization_config=FOUR_BITS))

    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", modules_to_save=["rcc"], init_lora_weights=False
    )
    model = peft.get_peft_model(ready(), settings)
    found = gradients(model)
    ours = {name for name in found if is_trained_part(name)}
    assert len(found) - len(ours) == 3 * 7 * 2
    assert len(ours) == sum(is_trained_part(name) for name, _ in ready().named_parameters())
    assert all(gradient.any() for gradient in found.values())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= 0.1 * parameter.grad
    expected = answers(model.eval())
    model.save_pretrained(tmp_path / "lora")
    again = exact(peft.PeftModel.from_pretrained(ready(), tmp_path / "lora"))
    assert torch.equal(answers(again), expected)

    full = peft.PeftModel.from_pretrained(load(tmp_path / "adapter"), tmp_path / "lora").eval()
    unmerged = answers(full)
    assert 1e-4 < ratio_of_norms(unmerged, expected) < 0.2
    merged = full.merge_and_unload()
    assert ratio_of_norms(answers(merged), unmerged) <= 1e-5
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(answers(load(tmp_path / "merged")), answers(merged))
