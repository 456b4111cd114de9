# SPDX-License-Identifier: Apache-2.0
"""benchmarks/control.py: the base with a LoRA, trained on a recipe's examples uncompressed, merged and measured."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from evaluating import questions_file, texts_file
from objective_data import chat_tokenizer
from tiny import base_model
from transformers import AutoModelForCausalLM

from rcc_hf.checkpoints import load_model
from rcc_hf.cli import main
from rcc_hf.modeling.fingerprint_rcc import is_trained_part
from rcc_hf.objectives import IGNORED, Mixture
from rcc_hf.recipes import build_objectives, read_recipe, read_sources

pytest.importorskip("peft")
FILE = Path(__file__).parent.parent / "benchmarks" / "control.py"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="needs benchmarks/, which the source archive leaves out")

RECIPE = {
    "model": "base",
    "compressor": {"segment_length": 128, "ratio": 8, "window": 256, "write_rank": 2, "read_rank": 2, "map_rank": 2},
    "texts": ["texts.jsonl"],
    "questions": "qa.jsonl",
    "objectives": {
        "reconstruction": {},
        "near": {"type": "continuation", "local_length": 8},
        "questions": {"alone_share": 1.0, "chat_share": 0.5},
    },
    "phases": [
        {"until": 0.3, "ratios": 8, "segments": 1, "objectives": ["reconstruction", "near"]},
        {"ratios": [4, 8], "segments": 1, "objectives": {"questions": 2, "reconstruction": 1}},
    ],
    "training": {"max_steps": 60, "batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 2, "logging_steps": 8},
}


@pytest.fixture
def control():
    spec = importlib.util.spec_from_file_location("control", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a base, texts, questions and a recipe, which is where commands run."""
    base = base_model(vocab_size=300).float()
    with torch.no_grad():
        base.lm_head.weight *= 20  # it is frozen, and logits of a fresh one say hardly anything
    base.save_pretrained(tmp_path / "base")
    chat_tokenizer().save_pretrained(tmp_path / "base")
    texts_file(tmp_path)
    questions_file(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_examples(num_steps, examples_per_step, group_size):
    """All that `rcc train` would draw."""
    recipe, tokenizer = read_recipe("recipe.yaml"), chat_tokenizer()
    sources = read_sources(tokenizer, texts=recipe.texts, questions=recipe.questions, progress=False)
    built = build_objectives(recipe.drawn(), sources, tokenizer, [1, 2])
    numbers = {"num_steps": num_steps, "examples_per_step": examples_per_step, "group_size": group_size}
    mixture = Mixture(built, recipe.phases, seed=0, segment_length=128, **numbers)
    return [mixture[index] for index in range(len(mixture))]


def plan_of(control, *argv):
    settings = control.parse(["recipe.yaml", "--output", "out", *argv])
    values = {name: value for name, value in RECIPE["training"].items() if name in control.SHARED}
    values |= {n: getattr(settings, n) for n in control.SHARED if getattr(settings, n, None) is not None}
    how = control.TrainSettings(output="out/trainer", **values)
    return control.make_plan(read_recipe(settings.recipe), settings, how), how


def test_it_trains_saves_and_merges_what_evaluation_measures(control, folder, monkeypatch):
    read, item = [], control.Uncompressed.__getitem__
    monkeypatch.setattr(control.Uncompressed, "__getitem__", lambda self, i: read.append(i) or item(self, i))
    settings = control.parse(["recipe.yaml", "--output", "out", "--max_steps", "100"])
    made = control.run(settings)
    assert json.loads((folder / "out" / "control.json").read_text()) == json.loads(json.dumps(made))
    assert read == list(range(made["steps"] * made["examples_per_step"]))
    losses = [loss for _, loss in made["losses"]]
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])
    model = load_model("base", **RECIPE["compressor"])
    compressor = sum(p.numel() for name, p in model.named_parameters() if is_trained_part(name))
    assert made["compressor_parameters"] == compressor
    assert abs(made["lora_parameters"] - compressor) < made["lora_parameters"] / made["rank"]
    assert {"commit", "hardware", "command", "versions"} <= set(made)
    assert sum(made["examples"].values()) == made["steps"] * made["examples_per_step"]

    base, merged = (AutoModelForCausalLM.from_pretrained(path) for path in ("base", "out/merged"))
    assert base.dtype == merged.dtype
    changed = {name for name, p in merged.named_parameters() if not torch.equal(p, base.get_parameter(name))}
    linear = {f"{name}.weight" for name, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    assert changed == linear - {"lm_head.weight"}
    given = ["--task", "qa", "--data", "qa.jsonl", "--method", "full", "--chat", "--no_progress", "--device", "cpu"]
    assert main(["evaluate", "out/merged", *given, "--output", "measured"]) == 0
    metrics = json.loads((folder / "measured" / "metrics.json").read_text())
    assert (metrics["method"], metrics["num_examples"]) == ("full", 4)
    assert 0 <= metrics["f1"] <= 1


@pytest.mark.parametrize(("accumulation", "processes"), [(1, 1), (2, 2)])
def test_examples_are_those_of_the_recipe_in_its_order(control, folder, accumulation, processes):
    step = 2 * processes * accumulation
    plan, _ = plan_of(
        control, "--max_steps", "8", "--accumulation_steps", str(accumulation), "--processes", str(processes)
    )
    drawn = recipe_examples(8, step, 2)
    wanted = [one for one in drawn if one["objective"] in ("near", "questions")]
    wanted = wanted[: len(wanted) - len(wanted) % step]
    assert 0 < len(plan.examples) == len(wanted) < len(drawn)
    for index, expected in enumerate(wanted):
        found = plan.examples[index]
        context = expected["context_ids"][expected["context_ids"] != 256]  # what fills a segment up is left out
        assert torch.equal(found["input_ids"], torch.cat([context, expected["input_ids"]]))
        assert (found["labels"][: len(context)] == IGNORED).all()
        assert torch.equal(found["labels"][len(context) :], expected["labels"])
    filled = [256 in one["context_ids"] for one in wanted]
    assert any(filled)
    assert sum(plan.examples.counts().values()) == len(wanted)


def test_micro_batches_make_steps_of_the_same_size(control, folder):
    plan, how = plan_of(control, "--max_steps", "8", "--batch_size", "6")
    size = len(plan.examples) // plan.examples.num_steps
    assert size == 6
    for micro, expected in ((None, (6, 1)), (2, (2, 3))):
        made = control.arguments_of(how, plan.examples.num_steps, size, micro)
        assert (made.per_device_train_batch_size, made.gradient_accumulation_steps) == expected
    with pytest.raises(ValueError, match="a step has 6 examples, and micro-batches of all processes 4"):
        control.arguments_of(how, plan.examples.num_steps, size, 4)


def test_objectives_may_be_chosen_of_those_that_mean_something(control, folder):
    recipe = read_recipe("recipe.yaml")
    assert list(control.choose_objectives(recipe, None)) == ["near", "questions"]
    assert control.choose_objectives(recipe, ["near"])["near"]["distill"]
    for wrong in (["reconstruction"], ["questions", "poems"], []):
        with pytest.raises(ValueError, match="these mean something uncompressed: near, questions"):
            control.choose_objectives(recipe, wrong)
    with pytest.raises(ValueError, match="and a step has 2; give more --max_steps"):
        plan_of(control, "--max_steps", "1", "--objectives", "questions")
