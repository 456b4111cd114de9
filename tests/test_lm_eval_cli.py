# SPDX-License-Identifier: Apache-2.0
"""The command line of lm-evaluation-harness on checkpoints, with tasks in local files: its numbers are plain calls'."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from checkpoints import Bases
from tiny import base_model, tokenizer, tokens, words

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm_eval")

KINDS = ("full", "adapter-only")
# Behind prompts of one, two and five windows.
LENGTHS = (20, 45, 160)
NEW = 6
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
output_type: {kind}
test_split: train
doc_to_text: "{{{{context}}}}"
target_delimiter: " "
"""
CHOICE = """doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
GENERATION = f"""doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["nothing of the kind"]
  max_gen_toks: {NEW}
  do_sample: false
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model, saved whole and as a compressor alone, and the tasks."""
    root = tmp_path_factory.mktemp("lm_eval")
    base_model().save_pretrained(root / "base")
    made = Bases(root).trained(base=root / "base", dtype=torch.float32)
    for kind in KINDS:
        made.save_pretrained(root / kind, adapter_only=kind == "adapter-only")
        tokenizer().save_pretrained(root / kind)
    write_tasks(root, made)
    made.folder = root
    return made


def write_tasks(root, model):
    """Four choices of different lengths, and answers of which every other one is the model's own."""
    contexts = [tokens(1, length, seed=length)[0] for length in LENGTHS]
    choices = [[words(tokens(1, size, seed=10 * n + size)[0]) for size in (1, 2, 3, 5)] for n in LENGTHS]
    rows = []
    for place, context in enumerate(contexts):
        right = words(generate(model, context)) if place % 2 == 0 else "w5"
        rows.append({"context": words(context), "choices": choices[place], "label": place, "answer": right})
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = root / "tasks"
    tasks.mkdir()
    for name, kind, rest in (("choice", "multiple_choice", CHOICE), ("generation", "generate_until", GENERATION)):
        head = TASK.format(name=f"tiny_{name}", kind=kind, data=root / "data.jsonl")
        (tasks / f"{name}.yaml").write_text(head + rest)


def generate(model, context):
    made = model.generate(context[None], max_new_tokens=NEW, do_sample=False, repetition_penalty=1.0)
    return made[0, len(context) :]


@torch.no_grad()
def log_likelihood(model, context, continuation):
    """Of a continuation `[t]`, and whether it is what greedy decoding gives."""
    ids = torch.cat([context, continuation])[None]
    logits = model(ids).logits.log_softmax(-1)[0, len(context) - 1 : -1]
    return logits.gather(1, continuation[:, None]).sum().item(), bool((logits.argmax(-1) == continuation).all())


@pytest.fixture(scope="module", params=KINDS)
def harness(request, model, tmp_path_factory):
    """The results of a run in a process of its own, and the logged samples of each task."""
    output, home = tmp_path_factory.mktemp("output"), tmp_path_factory.mktemp("home")
    arguments = f"pretrained={model.folder / request.param},trust_remote_code=True,dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments, "--device", "cpu"]
    command += ["--tasks", "tiny_choice,tiny_generation", "--include_path", str(model.folder / "tasks")]
    command += ["--batch_size", "2", "--output_path", str(output), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=offline, cwd=output)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = output.rglob("results_*.json")
    samples = {
        task: [json.loads(line) for line in next(output.rglob(f"samples_{task}_*.jsonl")).read_text().splitlines()]
        for task in ("tiny_choice", "tiny_generation")
    }
    return json.loads(file.read_text())["results"], samples


def ids_of(text):
    return tokenizer()(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]


def test_log_likelihoods_of_choices(model, harness):
    results, samples = harness
    assert len(samples["tiny_choice"]) == len(LENGTHS)
    right, right_by_length = [], []
    for sample in samples["tiny_choice"]:
        row = sample["doc"]
        expected = [log_likelihood(model, ids_of(row["context"]), ids_of(choice)) for choice in row["choices"]]
        found = [(float(value), str(greedy) == "True") for ((value, greedy),) in sample["resps"]]
        for (value, greedy), (known, known_greedy) in zip(found, expected, strict=True):
            assert value == pytest.approx(known, rel=1e-4)
            assert greedy == known_greedy
        values = [value for value, _ in expected]
        by_length = [value / len(choice) for value, choice in zip(values, row["choices"], strict=True)]
        right.append(values.index(max(values)) == row["label"])
        right_by_length.append(by_length.index(max(by_length)) == row["label"])
    assert results["tiny_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert results["tiny_choice"]["acc_norm,none"] == pytest.approx(sum(right_by_length) / len(right_by_length))


def test_generations(model, harness):
    results, samples = harness
    assert len(samples["tiny_generation"]) == len(LENGTHS)
    for sample in samples["tiny_generation"]:
        ((found,),) = sample["resps"]
        new = generate(model, ids_of(sample["doc"]["context"]))
        assert found.split() == tokenizer().decode(new, skip_special_tokens=True).split()
    # the first and the last answer in the data are the model's own
    assert results["tiny_generation"]["exact_match,none"] == pytest.approx(2 / 3)
