# SPDX-License-Identifier: Apache-2.0
"""What is measured by generating while training goes on: the same numbers as evaluating what was saved."""

import json

import pytest
import torch
from tiny import SEGMENT, rcc_model, tokenizer, tokens, words
from torch.utils.data import Dataset
from training_runs import fresh, parameters, settings
from transformers import TrainerCallback

from rcc_hf import RCCForCausalLM
from rcc_hf.evaluation.methods import make_method
from rcc_hf.evaluation.outputs import RunFolder
from rcc_hf.evaluation.runner import evaluate
from rcc_hf.objectives import reconstruction_example
from rcc_hf.training import Quality, QualitySettings, explain, make_probes, train

PROMPT = [5, 6]


class Passages(Dataset):
    """What the probes are cut from."""

    def __init__(self):
        self.document = tokens(1, 3 * SEGMENT, seed=3)[0]

    def __len__(self):
        return 32

    def __getitem__(self, index):
        start = index % (2 * SEGMENT)
        return reconstruction_example(self.document[start : start + SEGMENT], PROMPT)


def probes(folder, model, count=3):
    text, spoken = folder / "texts.jsonl", words(Passages().document)
    text.write_text(json.dumps({"text": spoken}) + "\n")
    rows = [
        {"context": words(tokens(1, 20, seed=i)[0]), "question": "w7", "answer": f"w{9 + i}", "max_new_tokens": 2}
        for i in range(5)
    ]
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = QualitySettings(quality_data=str(text), quality_questions=str(questions), quality_examples=count)
    return make_probes(model, tokenizer(), how, PROMPT)


class Lines(TrainerCallback):
    def __init__(self):
        self.lines = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append((state.global_step, logs))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that has learned to write down what it is asked for, what was logged, and its folder."""
    folder = tmp_path_factory.mktemp("quality")
    model, look = fresh(folder), Lines()
    quality = Quality(probes(folder, model), tokenizer(), ratios=[4, 16], steps=60)
    how = settings(folder / "out", max_steps=100, batch_size=8, learning_rate=1e-2, save_steps=60)
    train(model, how, Passages(), callbacks=[quality, look])
    lines = [(step, logs) for step, logs in look.lines if "eval_bleu4_r4" in logs]
    return model, lines, folder


def test_it_is_logged_every_so_often_and_at_the_end(trained):
    _, lines, _ = trained
    assert [step for step, _ in lines] == [60, 100]
    metrics = ("bleu4", "reconstruction_exact_match", "exact_match", "f1")
    for _, logs in lines:
        assert all(explain(name) for name in logs)
        assert {f"eval_{name}_r{ratio}" for name in metrics for ratio in (4, 16)} <= logs.keys()
        assert all(0 <= value <= 1 for name, value in logs.items() if name.startswith("eval_"))
    assert lines[-1][1]["eval_bleu4_r4"] > 0.1 + lines[0][1]["eval_bleu4_r4"]


@pytest.mark.parametrize("ratio", [4, 16])
@pytest.mark.parametrize("step", [60, 100])
def test_it_is_what_evaluating_the_checkpoint_gives(trained, tmp_path, step, ratio):
    _, lines, folder = trained
    model = RCCForCausalLM.from_pretrained(folder / "out" / f"checkpoint-{step}").eval()
    logs = dict(lines)[step]
    for probe in probes(folder, model):
        method = make_method("rcc", model, ratio, fill_id=tokenizer().eos_token_id)
        with RunFolder(tmp_path / probe.name, {}) as run:
            found = evaluate(model, tokenizer(), probe.examples, method, run, encode=probe.encode, progress=False)
        for name, shown in probe.metrics.items():
            assert logs[f"eval_{shown}_r{ratio}"] == pytest.approx(found[name], abs=1e-6)
        kept = folder / "out" / "quality" / f"step-{step}" / f"{probe.name}_r{ratio}" / "predictions.jsonl"
        written = [json.loads(line)["predicted_answer"] for line in kept.read_text().splitlines()]
        again = (tmp_path / probe.name / "predictions.jsonl").read_text().splitlines()
        assert written == [json.loads(line)["predicted_answer"] for line in again]


@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"dtype": torch.bfloat16}, {"gradient_checkpointing": True}])
def test_it_does_not_disturb_training(tmp_path, changes):
    changes = dict(changes)
    dtype, found = changes.pop("dtype", torch.float32), []
    for watched in (False, True):
        model = fresh(tmp_path, dtype)
        quality = Quality(probes(tmp_path, model, count=1), tokenizer(), ratios=[4], steps=1)
        how = settings(tmp_path / str(watched), max_steps=3, **changes)
        train(model, how, Passages(), callbacks=[quality] if watched else [])
        found.append(parameters(model))
    for name, parameter in found[0].items():
        assert torch.equal(parameter, found[1][name]), name


def test_questions_are_asked_as_in_training(tmp_path):
    rows = [{"context": "w5 w6", "question": "w7", "answer": "w8"}, {"context": "w5", "question": "w7", "answer": "no"}]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (probe,) = make_probes(rcc_model(), tokenizer(), QualitySettings(quality_questions=str(file)), PROMPT)
    assert [(example.answer_prefix, example.max_new_tokens) for example in probe.examples] == [
        ("Answer:", 32),
        ("Answer:", 8),
    ]
    assert "Question: w7" in probe.examples[0].question


def test_what_cannot_be_measured_is_refused_before_training(tmp_path):
    model = rcc_model()
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"text": "w5 w6"}) + "\n")
    with pytest.raises(ValueError, match="no document has"):
        make_probes(model, tokenizer(), QualitySettings(quality_data=str(short)), PROMPT)
    with pytest.raises(ValueError, match="quality_steps=0"):
        QualitySettings(quality_steps=0)
    assert make_probes(model, tokenizer(), QualitySettings(), PROMPT) == []
