# SPDX-License-Identifier: Apache-2.0
"""rcc evaluate in two processes that a launcher starts gives the rows and numbers of one process."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from evaluating import SENTENCES, byte_tokenizer, write_rows
from tiny import rcc_model, text_config

import rcc_hf
from rcc_hf.cli import main

pytestmark = pytest.mark.skipif(find_spec("accelerate") is None, reason="needs accelerate")

LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    # --multi_gpu is its only launcher of several processes; with --cpu it starts one, whatever is asked for
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
}
TASKS = {
    "passkey": ["--lengths", 300, 400, "--num_examples", 2, "--ratio", 2, 4],
    "perplexity": ["--data", "texts.jsonl", "--lengths", 0, 32, "--num_tokens", 8, "--num_examples", 3],
}
SECONDS = ("seconds", "read_seconds", "generate_seconds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    sizes = {"vocab_size": 260, "max_position_embeddings": 4096}
    rcc_model(dtype=torch.float32, text_config=text_config(**sizes)).save_pretrained(root / "rcc")
    byte_tokenizer().save_pretrained(root / "rcc")
    write_rows(root / "texts.jsonl", [{"text": " ".join(SENTENCES * count)} for count in (3, 4)])
    return root


def launch(launcher, arguments, folder):
    """What a command prints that runs in two processes, whose number is seen from the bars and files that it makes."""
    environment = {"PYTHONPATH": str(Path(rcc_hf.__file__).parents[1]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], "-m", "rcc_hf.cli", *map(str, arguments)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def contents(path):
    """Metrics and rows of every run below a folder, without what a clock says."""
    found = {}
    for file in sorted(path.rglob("metrics.json")):
        found[str(file.relative_to(path))] = without_seconds(json.loads(file.read_text()))
    for file in sorted(path.rglob("predictions.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        found[str(file.relative_to(path))] = [without_seconds(row) for row in rows]
    return found


def without_seconds(entry):
    if isinstance(entry, list):
        return [without_seconds(item) for item in entry]
    if isinstance(entry, dict):
        return {name: without_seconds(value) for name, value in entry.items() if name not in SECONDS}
    return entry


def command(task, output):
    """Of which each context is read alone: rows that go together add up their numbers in another order."""
    given = ["evaluate", "rcc", "--task", task, *TASKS[task], "--device", "cpu", "--batch_size", 1, "--output", output]
    return list(map(str, given))


@pytest.mark.parametrize(("launcher", "task"), [("torchrun", "passkey"), ("accelerate", "perplexity")])
def test_two_processes_do_what_one_does(launcher, task, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    done = launch(launcher, command(task, tmp_path / "two"), folder)
    assert main(command(task, tmp_path / "one")) == 0
    both, alone = contents(tmp_path / "two"), contents(tmp_path / "one")
    assert both == alone
    assert len(alone) == (5 if task == "passkey" else 2)
    assert done.stdout.count("wrote") == 1
    # the bar is that of the first process, whose share is half the rows
    rows = next(len(value) for value in alone.values() if isinstance(value, list))
    assert f" {rows // 2}/{rows // 2} " in done.stderr


def test_two_processes_go_on_where_one_was_killed(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(command("perplexity", tmp_path / "run")) == 0
    whole = contents(tmp_path)
    (tmp_path / "run" / "metrics.json").unlink()
    rows = tmp_path / "run" / "predictions.jsonl"
    kept = rows.read_text().splitlines()[:2]
    marked = [json.dumps(json.loads(row) | {"read_seconds": 99.0}) for row in kept]  # so as to tell them from new ones
    rows.write_text("\n".join(marked) + "\n")
    done = launch("torchrun", command("perplexity", tmp_path / "run"), folder)
    assert contents(tmp_path) == whole
    assert " 2/2 " in done.stderr
    found = [json.loads(line)["read_seconds"] for line in rows.read_text().splitlines()]
    assert [seconds == 99.0 for seconds in found] == [True, True, False, False, False, False]
