# SPDX-License-Identifier: Apache-2.0
"""The same on a CUDA device: nothing is left behind on the CPU, and bfloat16 stays close."""

import copy

import pytest
import torch
from tiny import SEGMENT, pad, ratio_of_norms, rcc_model, tokens
from training_runs import Mixed, fresh, parameters, settings

from rcc_hf import RCCMemory
from rcc_hf.modeling import linears_rcc
from rcc_hf.modeling.replicas_rcc import encode_segments
from rcc_hf.objectives import reconstruction_example
from rcc_hf.training import TrainSettings, train

pytestmark = pytest.mark.gpu

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
WIRINGS = pytest.mark.parametrize("wiring", ["replace", "add"])


def pair(wiring, **options):
    """The same model on the CPU and on the GPU."""
    model = rcc_model(scheme_options={"wiring": wiring}, **options)
    return model, copy.deepcopy(model).to("cuda")


@WIRINGS
def test_float64_equals_the_cpu(wiring):
    cpu, gpu = pair(wiring)
    context, prompt = tokens(2, 53), tokens(2, 9, seed=1)
    expected = cpu(prompt, memory=cpu.compress(context)).logits
    memory = gpu.compress(context.cuda())
    assert memory.device.type == "cuda"
    # the base makes its rotary tables in float32, on each device with its own rounding
    assert ratio_of_norms(gpu(prompt.cuda(), memory=memory).logits.cpu(), expected) <= 1e-6
    assert ratio_of_norms(gpu(prompt.cuda(), context_ids=context.cuda()).logits.cpu(), expected) <= 1e-6


@WIRINGS
def test_generation_of_a_ragged_batch_equals_the_cpu(wiring):
    cpu, gpu = pair(wiring)
    ids = tokens(3, 70)
    ids[1, :25] = 0
    ids[2, :50] = 0  # short enough to have no memory
    mask = (ids != 0).long()
    expected = cpu.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(gpu.generate(ids.cuda(), attention_mask=mask.cuda(), **GREEDY).cpu(), expected)


@WIRINGS
@torch.no_grad()
def test_windows_and_heads_equal_the_cpu(wiring):
    cpu, gpu = pair(wiring, head_length=3)
    rows = [tokens(1, n, seed=n)[0] for n in (75, 9, 48)]
    ids, mask = pad(rows)
    expected = cpu(ids, attention_mask=mask).logits[mask.bool()]
    actual = gpu(ids.cuda(), attention_mask=mask.cuda()).logits.cpu()[mask.bool()]
    assert ratio_of_norms(actual, expected) <= 1e-6
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    flat = torch.cat(rows)[None]
    expected = cpu(flat, position_ids=positions).logits
    assert ratio_of_norms(gpu(flat.cuda(), position_ids=positions.cuda()).logits.cpu(), expected) <= 1e-6


@WIRINGS
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"max_slots": 8, "when_full": "recompress"}], ids=str)
def test_rolling_equals_the_cpu(wiring, settings):
    cpu, gpu = pair(wiring)
    ids, mask = pad([tokens(1, n, seed=n)[0] for n in (40, 3)])
    settings = GREEDY | {"rolling": True, "max_new_tokens": 70} | settings
    expected = cpu.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(gpu.generate(ids.cuda(), attention_mask=mask.cuda(), **settings).cpu(), expected)


@WIRINGS
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")  # the compiler's advice, which would be an error here
def test_a_static_cache_is_compiled_and_equals_the_cpu(wiring, settings):
    """On CUDA, `generate` compiles decoding steps in a static cache by itself."""
    cpu, gpu = pair(wiring)
    memory, prompt = cpu.compress(tokens(2, 54)), tokens(2, 7, seed=1)
    settings = GREEDY | {"max_new_tokens": 20} | settings
    expected = cpu.generate(prompt, memory=memory, **settings)
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        new = gpu.generate(prompt.cuda(), memory=memory.to("cuda"), **settings, cache_implementation="static")
        assert torch.equal(new.cpu(), expected)
    assert not torch._dynamo.utils.counters["graph_break"]


@WIRINGS
def test_bfloat16_is_close_to_float64(wiring):
    cpu, gpu = pair(wiring)
    context, prompt = tokens(2, 64), tokens(2, 9, seed=1)
    expected = cpu(prompt, memory=cpu.compress(context)).logits
    gpu = gpu.bfloat16()
    actual = gpu(prompt.cuda(), memory=gpu.compress(context.cuda())).logits
    assert ratio_of_norms(actual.cpu().double(), expected) <= 5e-2


@pytest.mark.parametrize("scheme", ["rcc", "uio"])
@torch.no_grad()
def test_nothing_waits_for_the_device_while_segments_are_encoded(scheme):
    model = rcc_model(scheme=scheme, dtype=torch.bfloat16).cuda()
    segments = tokens(4, SEGMENT).cuda()
    encode_segments(model.model, segments, 4)  # a first call may set up libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        encode_segments(model.model, segments, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_merged_and_fused_adapters_are_as_close_in_bfloat16(monkeypatch):
    exact = rcc_model()
    context, prompt = tokens(2, 4 * SEGMENT), tokens(2, 9, seed=1)
    expected = exact(prompt, memory=exact.compress(context)).logits

    def error(model) -> float:
        memory = model.compress(context.cuda())
        return ratio_of_norms(model(prompt.cuda(), memory=memory).logits.double().cpu(), expected)

    model = rcc_model(dtype=torch.bfloat16).cuda()
    apart = error(model)
    assert apart <= 3e-2
    with monkeypatch.context() as patch:
        patch.setattr(linears_rcc, "MERGE_TOKENS", 0)
        assert error(model) <= 2 * apart
    model.fuse_adapters()
    assert error(model) <= 2 * apart


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@WIRINGS
def test_replicas_on_two_gpus(wiring):
    model = pair(wiring, encode_batch_tokens=2 * SEGMENT)[1]
    ids, mask = pad([tokens(1, n, seed=n)[0] for n in (9 * SEGMENT + 5, 4 * SEGMENT)])
    memory = model.compress(ids.cuda(), mask.cuda(), replicas=model.replicate(["cuda:1"]))
    alone = model.compress(ids.cuda(), mask.cuda())
    assert {part.device for parts in memory.layers for part in parts} == {torch.device("cuda", 0)}
    for parts, expected in zip(memory.layers, alone.layers, strict=True):
        assert max(ratio_of_norms(a, b) for a, b in zip(parts, expected, strict=True)) <= 1e-12


def test_a_memory_moves_between_devices(tmp_path):
    cpu, gpu = pair("replace")
    gpu.compress(tokens(1, 40).cuda()).save_pretrained(tmp_path)
    memory = RCCMemory.from_pretrained(tmp_path, device="cuda")
    prompt = tokens(1, 5, seed=1)
    expected = cpu.generate(prompt, memory=memory.to("cpu"), **GREEDY)
    assert torch.equal(gpu.generate(prompt.cuda(), memory=memory, **GREEDY).cpu(), expected)
    with pytest.raises(ValueError, match=r"cuda.*cpu|cpu.*cuda"):
        cpu.generate(prompt, memory=memory, **GREEDY)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_learns(tmp_path, checkpointing):
    model = rcc_model(dtype=torch.bfloat16)
    examples = [reconstruction_example(context, [1, 4]) for context in tokens(2, SEGMENT)] * 32
    settings = TrainSettings(
        output=str(tmp_path / "out"),
        max_steps=60,
        batch_size=4,
        learning_rate=1e-2,
        warmup_steps=1,
        gradient_checkpointing=checkpointing,
    )
    metrics = train(model, settings, examples, examples[:2])
    assert metrics["eval_token_accuracy"] > 0.5


@pytest.mark.parametrize("scheme", ["rcc", "uio"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_recorded_steps_train_as_others(tmp_path, compiled, scheme):
    found = []
    for recorded in (False, True):
        model = fresh(tmp_path, scheme=scheme).cuda()
        how = settings(tmp_path / str(recorded), max_steps=8, cuda_graphs=recorded, compile_blocks=compiled)
        metrics = train(model, how, Mixed(size=8 * 4))
        found.append((metrics["train_loss"], parameters(model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    for name, parameter in found[0][1].items():
        assert ratio_of_norms(found[1][1][name], parameter) <= 1e-3, name
