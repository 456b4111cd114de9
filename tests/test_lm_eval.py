# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness on prompts longer than the window: its numbers are those of plain calls."""

import pytest
import torch
from tiny import rcc_model, tokenizer, tokens, words

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

PAIRS = [(70, 9), (20, 9), (45, 3)]


@pytest.fixture(scope="module")
def model():
    return rcc_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def harness(model):
    return HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=3, device="cpu", max_length=400)


@torch.no_grad()
def log_likelihood(model, context, continuation) -> float:
    ids = torch.cat([context, continuation])[None]
    found = model(ids).logits.log_softmax(-1)[0, len(context) - 1 : -1]
    return found.gather(1, continuation[:, None]).sum().item()


def test_log_likelihoods(model, harness):
    pairs = [(tokens(1, n, seed=n)[0], tokens(1, m, seed=m)[0]) for n, m in PAIRS]
    requests = [
        Instance("loglikelihood", {}, (words(context), " " + words(continuation)), i)
        for i, (context, continuation) in enumerate(pairs)
    ]
    for (found, greedy), pair in zip(harness.loglikelihood(requests, disable_tqdm=True), pairs, strict=True):
        assert found == pytest.approx(log_likelihood(model, *pair), rel=1e-4)
        assert greedy is False


def test_perplexity_of_a_long_text(model, harness):
    text = tokens(1, 300)[0]
    [found] = harness.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (words(text),), 0)], True)
    start = torch.tensor([harness.prefix_token_id])
    assert found == pytest.approx(log_likelihood(model, start, text), rel=1e-4)


def test_generation(model, harness):
    prompts = [tokens(1, n, seed=n) for n in (70, 20)]
    settings = {"until": ["nothing of the kind"], "max_gen_toks": 6, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (words(prompt[0]), dict(settings)), i) for i, prompt in enumerate(prompts)
    ]
    for found, prompt in zip(harness.generate_until(requests, disable_tqdm=True), prompts, strict=True):
        new = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :]
        assert found.split() == tokenizer().decode(new, skip_special_tokens=True).split()
