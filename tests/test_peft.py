# SPDX-License-Identifier: Apache-2.0
"""PEFT on top of an RCC model: the user's adapters are theirs, ours stay on, and both are saved and loaded apart."""

import copy

import pytest
import torch
from tiny import RATIO, SEGMENT, WINDOW, base_model, move_from_identity, ratio_of_norms, tokens
from torch import Tensor

from rcc_hf import RCCForCausalLM
from rcc_hf.modeling.fingerprint_rcc import is_trained_part

peft = pytest.importorskip("peft")

LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}


@pytest.fixture
def checkpoint(tmp_path):
    """Folder of a checkpoint whose compressor is far from the identity."""
    base_model().save_pretrained(tmp_path / "base")
    model = RCCForCausalLM.from_base(
        tmp_path / "base", segment_length=SEGMENT, ratio=RATIO, window=WINDOW, write_rank=4, read_rank=4, map_rank=4
    )
    move_from_identity(model)
    model.save_pretrained(tmp_path / "rcc")
    return tmp_path / "rcc"


def load(checkpoint) -> RCCForCausalLM:
    return RCCForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()


def wrap(checkpoint, **settings) -> "peft.PeftModel":
    return peft.get_peft_model(load(checkpoint), peft.LoraConfig(**LORA, **settings)).eval()


def batch() -> dict[str, Tensor]:
    ids = tokens(2, 9, seed=1)
    return {"context_ids": tokens(2, 54), "input_ids": ids, "labels": ids}


def train(model, steps: int = 2) -> list[float]:
    """A few steps of plain SGD on all that may be trained; the losses."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(steps):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def answers(model) -> Tensor:
    """Logits without memory and behind one."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    memory, ids = inner.compress(tokens(2, 54)), tokens(2, 5, seed=1)
    return torch.cat([model(input_ids=ids).logits, model(input_ids=ids, memory=memory).logits], 1)


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def compressor(model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if is_trained_part(name)}


def test_only_the_users_adapters_are_trained(checkpoint):
    model = wrap(checkpoint, target_modules=["q_proj", "v_proj"])
    names = trainable(model)
    assert len(names) == 3 * 2 * 2
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert not any(is_trained_part(name) for name in names)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model, steps=3)
    assert losses[-1] < losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == names


def test_adapters_of_both_act_in_both_passes(checkpoint):
    """On top of a fresh LoRA, which is zero, all is as before; ours are still in it, and a trained LoRA changes both
    what is compressed and how it is decoded."""
    plain, model = load(checkpoint), wrap(checkpoint, target_modules="all-linear")
    assert ratio_of_norms(answers(model), answers(plain)) <= 1e-10
    silenced = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in silenced.named_parameters():
            if is_trained_part(name):
                parameter.zero_()
    assert ratio_of_norms(answers(silenced)[:, 5:], answers(model)[:, 5:]) > 1e-3
    assert torch.equal(answers(silenced)[:, :5], answers(model)[:, :5])

    train(model)
    ids = tokens(2, 5, seed=1)
    with torch.no_grad():
        memory = model.get_base_model().compress(tokens(2, 54))
        old = plain.compress(tokens(2, 54))
        assert ratio_of_norms(memory.layers[2][0], old.layers[2][0]) > 1e-4
        with model.disable_adapter():
            assert ratio_of_norms(answers(model), answers(plain)) <= 1e-10
        assert ratio_of_norms(model(input_ids=ids).logits, plain(ids).logits) > 1e-4


def test_generate_through_peft(checkpoint):
    model = wrap(checkpoint, target_modules=["q_proj", "v_proj"])
    train(model)
    inner, settings = model.get_base_model(), {"do_sample": False, "max_new_tokens": 6}
    memory, prompt, long = inner.compress(tokens(2, 54)), tokens(2, 5, seed=1), tokens(2, 61, seed=2)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(
        model.generate(input_ids=prompt, memory=memory, **settings),
        merged.generate(prompt, memory=merged.compress(tokens(2, 54)), **settings),
    )
    assert torch.equal(model.generate(input_ids=long, **settings), merged.generate(long, **settings))


def test_saved_and_loaded_exactly(checkpoint, tmp_path):
    model = wrap(checkpoint, target_modules=["q_proj", "v_proj"])
    train(model)
    model.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(load(checkpoint), tmp_path / "lora").eval()
    assert torch.equal(answers(again), answers(model))
    stored = peft.utils.load_peft_weights(str(tmp_path / "lora"))
    assert len(stored) == 3 * 2 * 2
    assert not any(is_trained_part(name) for name in stored)


def test_merged(checkpoint, tmp_path):
    """The merged model is an RCC model like any other, also after saving."""
    model = wrap(checkpoint, target_modules="all-linear")
    train(model)
    expected = answers(model)
    merged = model.merge_and_unload()
    assert type(merged) is RCCForCausalLM
    assert ratio_of_norms(answers(merged), expected) <= 1e-10
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert torch.equal(answers(again), answers(merged))
    assert {path.name for path in (tmp_path / "merged").glob("*.py")} > {"modeling_rcc.py", "memory_rcc.py"}


def test_all_linear_touches_the_linears_of_the_base_only(checkpoint):
    plain = load(checkpoint)
    linears = {
        name
        for name, module in plain.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"  # which PEFT leaves out
    }
    model = wrap(checkpoint, target_modules="all-linear")
    prefix = "base_model.model."
    wrapped = {
        name.removeprefix(prefix)
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    assert wrapped == linears
    assert len(linears) == 3 * 7


@pytest.mark.parametrize("pattern", [r".*\.(q_proj|v_proj)", r".*(q|v)_proj"])
def test_a_pattern_for_the_bases_linears(checkpoint, pattern):
    """A regular expression that was written for the base fits here: our parts have no names that it means."""
    model = wrap(checkpoint, target_modules=pattern)
    assert len(trainable(model)) == 3 * 2 * 2


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used before"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=str)
def test_the_compressor_is_trained_and_saved_with_modules_to_save(checkpoint, targets, used, tmp_path):
    inner = load(checkpoint)
    if used:  # its hooks are in place before PEFT moves what they hook
        answers(inner)
    settings = peft.LoraConfig(**LORA, target_modules=targets, modules_to_save=["rcc"])
    model = peft.get_peft_model(inner, settings).eval()
    names = {name for name in trainable(model) if is_trained_part(name)}
    ours = compressor(load(checkpoint))
    assert len(names) == len(ours)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name in names}
    losses = train(model, steps=3)
    assert losses[-1] < losses[0]
    unchanged = {name for name, p in model.named_parameters() if name in names and torch.equal(p, before[name])}
    assert unchanged == set()
    expected = answers(model)
    model.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(load(checkpoint), tmp_path / "lora").eval()
    assert torch.equal(answers(again), expected)
    assert ratio_of_norms(answers(load(checkpoint)), expected) > 1e-4
    merged = model.merge_and_unload()
    assert ratio_of_norms(answers(merged), expected) <= 1e-10
    assert compressor(merged).keys() == ours.keys()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(answers(load(tmp_path / "merged")), answers(merged))


@pytest.mark.parametrize("kind", ["wrapped", "added"])
def test_gradient_checkpointing(checkpoint, kind):
    """Gradients of the user's LoRA and of the compressor are those without checkpointing."""
    gradients = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        settings = peft.LoraConfig(**LORA, target_modules=["q_proj", "v_proj"], modules_to_save=["rcc"])
        model = load(checkpoint)
        if kind == "wrapped":
            model = peft.get_peft_model(model, settings)
        else:
            model.add_adapter(settings)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.train()
        if is_checkpointed:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(**batch()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert expected is not None, name
        assert ratio_of_norms(gradients[1][name], expected) <= 1e-10, name


def test_adapters_of_transformers_itself(checkpoint, tmp_path):
    """`add_adapter`, `disable_adapters` and `load_adapter`, which the models of transformers have built in."""
    plain, model = load(checkpoint), load(checkpoint)
    model.add_adapter(peft.LoraConfig(**LORA, target_modules=["q_proj", "v_proj"]), adapter_name="mine")
    assert len(trainable(model)) == 3 * 2 * 2
    train(model)
    expected = answers(model)
    assert ratio_of_norms(expected, answers(plain)) > 1e-4
    model.save_pretrained(tmp_path / "mine")
    assert not (tmp_path / "mine" / "model.safetensors").exists()
    model.disable_adapters()
    assert torch.equal(answers(model), answers(plain))
    again = load(checkpoint)
    again.load_adapter(str(tmp_path / "mine"))
    assert torch.equal(answers(again), expected)


def test_a_checkpoint_of_a_wrapped_model_can_be_adapter_only(checkpoint, tmp_path):
    """Merged weights are no base that anybody else has: the fingerprint in an adapter-only checkpoint says so."""
    model = wrap(checkpoint, target_modules=["q_proj"], modules_to_save=["rcc"])
    train(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "adapter", adapter_only=True)
    again = RCCForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float64)
    expected = compressor(merged)
    assert all(torch.equal(p, expected[name]) for name, p in compressor(again).items())


def test_the_compressor_cannot_be_saved_alone_beneath_adapters(checkpoint, tmp_path):
    """transformers would write the adapters instead, or names that no model has."""
    added = load(checkpoint)
    added.add_adapter(peft.LoraConfig(**LORA, target_modules=["q_proj"]), adapter_name="mine")
    wrapped = wrap(checkpoint, target_modules=["q_proj"], modules_to_save=["rcc"]).get_base_model()
    for model in (added, wrapped):
        with pytest.raises(ValueError, match=r"merge_and_unload\(\) them, or delete_adapter\(\)"):
            model.save_pretrained(tmp_path / "alone", adapter_only=True)
        assert model.config.adapter_only is False
    assert not (tmp_path / "alone").exists()
    added.delete_adapter("mine")
    added.save_pretrained(tmp_path / "alone", adapter_only=True)
    again = RCCForCausalLM.from_pretrained(
        tmp_path / "alone", base_model=checkpoint.parent / "base", dtype=torch.float64
    )
    assert torch.equal(answers(again.eval()), answers(load(checkpoint)))


def test_memories_are_not_mixed_with_those_before_merging(checkpoint):
    model = wrap(checkpoint, target_modules=["q_proj"])
    train(model)
    memory = model.get_base_model().compress(tokens(2, 54))
    for other in (load(checkpoint), model.merge_and_unload()):
        with pytest.raises(ValueError, match="written by another model"):
            other(tokens(2, 5), memory=memory)


def test_trainer(checkpoint, tmp_path):
    """Two steps of the Trainer on a PEFT model, then again from its checkpoint."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    data = [{name: tensor[0] for name, tensor in batch().items()} for _ in range(4)]

    def trainer(model, **settings):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"), per_device_train_batch_size=2, learning_rate=0.1, logging_steps=1,
            report_to=[], use_cpu=True, disable_tqdm=True, save_steps=1, **settings,
        )  # fmt: skip
        return transformers.Trainer(model=model, args=arguments, train_dataset=data)

    model = wrap(checkpoint, target_modules=["q_proj", "v_proj"], modules_to_save=["rcc"])
    first = trainer(model, max_steps=2)
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert losses[1] < losses[0]
    resumed = wrap(checkpoint, target_modules=["q_proj", "v_proj"], modules_to_save=["rcc"])
    trainer(resumed, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert ratio_of_norms(answers(resumed.eval()), answers(model.eval())) <= 1e-10
    evaluated = first.evaluate(data)
    assert evaluated["eval_loss"] < losses[0]
