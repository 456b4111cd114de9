# SPDX-License-Identifier: Apache-2.0
"""Models keep no state of a run: copies, threads and conversations do not touch one another."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import SEGMENT, VARIANTS, rcc_model, tokens
from torch import nn
from torch.utils._pytree import tree_leaves

from rcc_hf.modeling.fingerprint_rcc import is_trained_part
from rcc_hf.modeling.hooks_rcc import install_hooks

pytestmark = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


@torch.no_grad()
def answer(model, seed: int = 0) -> torch.Tensor:
    """Logits behind a context of two segments and a remainder."""
    return model(tokens(1, 5, seed=1), memory=model.compress(tokens(1, 2 * SEGMENT + 3, seed=seed))).logits


def set_trained_parts(model, value: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_trained_part(name):
                parameter.fill_(value)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_deep_copy_is_independent(variant, used):
    model = rcc_model(**variant)
    if used:  # hooks are put in place at first use, and copied from then on
        answer(model)
    clone = copy.deepcopy(model)
    before = answer(model)
    assert torch.equal(answer(clone), before)
    set_trained_parts(clone, 0.01)
    assert torch.equal(answer(model), before)
    expected = rcc_model(**variant)
    set_trained_parts(expected, 0.01)
    assert torch.equal(answer(clone), answer(expected))
    set_trained_parts(model, 0.02)
    assert torch.equal(answer(clone), answer(expected))


def test_threads_that_use_one_model_at_once_do_not_touch_each_other(variant):
    model = rcc_model(**variant)
    ids = tokens(2, 30, seed=3)
    behind_memory, plain = answer(model), model(ids).logits.detach()
    barrier, interval = threading.Barrier(4), sys.getswitchinterval()

    def repeat(function):
        barrier.wait()
        return [function() for _ in range(6)]

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            plain_runs = [pool.submit(repeat, lambda: model(ids).logits.detach()) for _ in range(2)]
            memory_runs = [pool.submit(repeat, lambda: answer(model)) for _ in range(2)]
            assert all(torch.equal(logits, plain) for run in plain_runs for logits in run.result())
            assert all(torch.equal(logits, behind_memory) for run in memory_runs for logits in run.result())
    finally:
        sys.setswitchinterval(interval)


def test_hooks_are_put_in_place_once_though_two_threads_begin_at_once(variant, monkeypatch):
    model = rcc_model(**variant)
    expected = answer(rcc_model(**variant))
    register, others = nn.Module.register_forward_pre_hook, []

    def register_while_another_thread_begins(module, hook, **kwargs):
        if not others:
            others.append(threading.Thread(target=install_hooks, args=(model.model.language_model.layers,)))
            others[0].start()
            others[0].join(timeout=0.3)  # it may have to wait for this thread
        return register(module, hook, **kwargs)

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", register_while_another_thread_begins)
    install_hooks(model.model.language_model.layers)
    others[0].join()
    assert torch.equal(answer(model), expected)


@torch.no_grad()
def test_interleaved_conversations_equal_each_alone(variant):
    model = rcc_model(**variant)
    prompt, steps = tokens(1, 3, seed=4), tokens(1, 6, seed=5)
    memories = [model.compress(tokens(1, n, seed=n)) for n in (SEGMENT, 3 * SEGMENT + 2)] + [None]

    def begin(memory):
        yield (outputs := model(prompt, use_cache=True, **({} if memory is None else {"memory": memory}))).logits
        for step in steps[0]:
            outputs = model(step[None, None], past_key_values=outputs.past_key_values)
            yield outputs.logits

    alone = [list(begin(memory)) for memory in memories]
    together = list(zip(*map(begin, memories), strict=True))
    for conversation, expected in enumerate(alone):
        assert all(torch.equal(logits[conversation], e) for logits, e in zip(together, expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_generate_leaves_the_memory_as_it_was(variant, rows):
    model = rcc_model(**variant)
    memory = model.compress(tokens(rows, 2 * SEGMENT + 3))
    before = [tensor.clone() for tensor in tree_leaves([memory.layers, memory.local_ids])]
    first = model.generate(tokens(rows, 4, seed=1), memory=memory, max_new_tokens=5)
    assert all(map(torch.equal, before, tree_leaves([memory.layers, memory.local_ids])))
    assert torch.equal(model.generate(tokens(rows, 4, seed=1), memory=memory, max_new_tokens=5), first)
