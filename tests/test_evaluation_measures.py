# SPDX-License-Identifier: Apache-2.0
"""Perplexity behind histories, and cost by length."""

import math

import pytest
import torch
from evaluating import Perfect, byte_tokenizer, rows_of, write_rows
from tiny import base_model, rcc_model, tokenizer, words
from tiny import tokens as random_ids

from rcc_hf.evaluation.cost import cost_examples, evaluate_cost
from rcc_hf.evaluation.methods import make_method
from rcc_hf.evaluation.outputs import RunFolder
from rcc_hf.evaluation.perplexity import continuations, evaluate_perplexity
from rcc_hf.evaluation.tasks import TaskSettings


@pytest.fixture(scope="module")
def letters():
    return byte_tokenizer()


def documents_file(folder, lengths=(120, 90)):
    return write_rows(
        folder / "documents.jsonl",
        [{"text": words(random_ids(1, length, seed=seed)[0])} for seed, length in enumerate(lengths)],
    )


def nll_by_hand(model, history, target):
    logits = model(torch.cat([history, target])[None], compress=False).logits[0, len(history) : -1]
    return -logits.log_softmax(-1).gather(-1, target[1:, None]).mean().item()


def test_perplexity_behind_histories_is_that_of_the_same_tokens(tmp_path):
    model, text = rcc_model(), tokenizer()
    settings = TaskSettings(data=documents_file(tmp_path), lengths=[48, 0, 16], num_tokens=10, num_examples=3)
    asked = continuations(text, settings)
    assert [len(item.history) for item in asked] == [48, 0, 16] * 3
    for place in range(0, 9, 3):
        long, none, short = asked[place : place + 3]
        assert torch.equal(long.target, none.target)
        assert torch.equal(long.history[-16:], short.history)
    metrics = {}
    for name in ("full", "rcc", "none"):
        with RunFolder(tmp_path / name, {}) as folder:
            metrics[name] = evaluate_perplexity(
                model, asked, make_method(name, model, 4), folder, batch_size=2, progress=False
            )
    for name, found in metrics.items():
        assert [(group["history"], group["num_examples"]) for group in found["groups"]] == [(0, 3), (16, 3), (48, 3)]
        for group in found["groups"]:
            assert group["perplexity"]["mean"] == pytest.approx(math.exp(group["nll"]["mean"]))
        assert found["groups"][0]["nll"] == pytest.approx(metrics["full"]["groups"][0]["nll"]), name
    expected = [nll_by_hand(model, item.history, item.target) for item in asked]
    for number, start in enumerate((1, 2, 0)):
        assert metrics["full"]["groups"][number]["nll"]["mean"] == pytest.approx(sum(expected[start::3]) / 3, rel=1e-5)
    nll = {name: found["groups"][2]["nll"]["mean"] for name, found in metrics.items()}
    assert len({round(value, 6) for value in nll.values()}) == 3
    assert metrics["rcc"]["groups"][2]["entries_per_example"] == 12
    with RunFolder(tmp_path / "full", {}) as folder:
        assert evaluate_perplexity(model, asked, None, folder, progress=False) == metrics["full"]


def test_perplexity_needs_documents_that_are_long_enough(tmp_path):
    with pytest.raises(ValueError, match="no document has 328 tokens, the longest has 120"):
        continuations(tokenizer(), TaskSettings(data=documents_file(tmp_path), lengths=[0, 72]))
    with pytest.raises(ValueError, match="num_tokens is 1; perplexity needs at least 2"):
        continuations(tokenizer(), TaskSettings(data=documents_file(tmp_path), num_tokens=1))


def test_cost_is_the_median_of_runs_after_a_warm_up(letters, tmp_path, monkeypatch):
    ticks = iter([9.0, 9.0, 9.0, 1.0, 0.5, 2.5, 3.0, 0.5, 4.5, 2.0, 0.5, 2.0] + [1.0] * 12)
    monkeypatch.setattr("rcc_hf.evaluation.cost.timed", lambda function, device: (function(), next(ticks)))
    method = Perfect(letters)
    method.answer = lambda context, prompt: "x" * 9
    method.model = base_model()
    with RunFolder(tmp_path, {}) as folder:
        examples = cost_examples(TaskSettings(lengths=[50, 20], num_tokens=9))
        metrics = evaluate_cost(method.model, letters, examples, method, folder, num_runs=3, progress=False)
    first, second = metrics["groups"]
    assert (first["length"], second["length"]) == (20, 50)
    assert first["read_seconds"] == 2.0
    assert first["time_to_first_token"] == 2.5
    assert first["decode_tokens_per_second"] == pytest.approx(8 / 2.0)
    assert (first["nbytes"], second["nbytes"]) == (80, 200)
    assert method.read_batches == [[20]] * 4 + [[50]] * 4
    assert first["peak_bytes"] > metrics["model_nbytes"] > 0
    assert metrics["environment"]["versions"]["torch"] == torch.__version__
    assert {"commit", "command", "hardware", "versions"} <= set(metrics["environment"])
    assert rows_of(tmp_path)[0]["runs"]["read_seconds"] == [1.0, 3.0, 2.0]
    with pytest.raises(ValueError, match=r"lengths are \[0\]"):
        cost_examples(TaskSettings(lengths=[0]))


def test_cost_times_a_real_model(tmp_path):
    model, text = rcc_model(), tokenizer()
    with RunFolder(tmp_path, {}) as folder:
        examples = cost_examples(TaskSettings(lengths=[64], num_tokens=4))
        method = make_method("rcc", model, 4)
        metrics = evaluate_cost(model, text, examples, method, folder, num_runs=2, batch_size=2, progress=False)
    (group,) = metrics["groups"]
    assert group["entries"] == 16
    assert group["time_to_first_token"] > group["read_seconds"] > 0
    assert group["decode_tokens_per_second"] > 0
