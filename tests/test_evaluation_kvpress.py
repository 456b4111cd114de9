# SPDX-License-Identifier: Apache-2.0
"""What is left of the comparison with kvpress where kvpress is not installed: what it borrows, and scoring."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.outputs import RunFolder

FOLDER = Path(__file__).parent.parent / "benchmarks" / "kvpress"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="needs benchmarks/, which the source archive leaves out")
CONFIG = {"method": "snapkv", "model": "tiny", "ratio": 4}
KEPT = {"context_tokens": 40, "entries": 10, "nbytes": 80, "read_seconds": 0.5, "generate_seconds": 0.25}


def example(answer, depth):
    return Example(
        context="a b c",
        question="?",
        answer=answer,
        max_new_tokens=4,
        task="passkey",
        metric="string_match_all",
        metadata={"depth": depth},
    )


EXAMPLES = [example("a", 0.0), example("b", 1.0), example("c", 1.0)]


@pytest.fixture(scope="module")
def scoring():
    spec = importlib.util.spec_from_file_location("score_run", FOLDER / "score_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path, predictions):
    with RunFolder(path, CONFIG) as folder:
        for index, prediction in enumerate(predictions):
            folder.add(index, EXAMPLES[index], prediction, **KEPT)


def test_what_is_borrowed_does_not_load_the_models():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import borrowed; "
        "print(borrowed.budget(39, 4, 16), [name for name in sys.modules if name.startswith('rcc_hf.modeling')])"
    )
    found = subprocess.run([sys.executable, "-c", code, FOLDER], capture_output=True, text=True)
    assert found.stdout == "15 []\n", found.stderr


def test_a_finished_run_is_scored(scoring, tmp_path):
    write(tmp_path, ["a", "x b x", "d"])
    metrics = scoring.score_run(tmp_path, EXAMPLES, ["depth"])
    assert metrics["string_match"] == pytest.approx(2 / 3)
    assert [(group["depth"], group["string_match"]["mean"]) for group in metrics["groups"]] == [(0, 1), (1, 0.5)]
    assert metrics["entries_per_example"] == 10
    assert (metrics["method"], metrics["ratio"]) == ("snapkv", 4)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert (tmp_path / "predictions.csv").read_text().count("passkey") == 3
    assert (metrics["task"], "data" in metrics) == ("passkey", False)
    named = scoring.score_run(tmp_path, EXAMPLES, task="qa", data="qa.jsonl, 64 tokens")
    assert (named["task"], named["data"]) == ("qa", "qa.jsonl, 64 tokens")


def test_an_unfinished_run_and_other_examples_are_refused(scoring, tmp_path):
    write(tmp_path, ["a", "b"])
    with pytest.raises(ValueError, match="lacks 1 of 3 predictions"):
        scoring.score_run(tmp_path, EXAMPLES)
    with pytest.raises(ValueError, match="that of another example"):
        scoring.score_run(tmp_path, [example("a", 0.0), Example(**{**EXAMPLES[1].to_row(), "question": "!"})])
