# SPDX-License-Identifier: Apache-2.0
"""Several processes train as one does with larger batches."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rcc_hf

TESTS = Path(__file__).parent


def run(folder, processes, batch_size, accumulation=1, steps=2, engine=""):
    """Losses of every step, evaluation metrics, and the trained weights."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    launch = launch if processes > 1 else [sys.executable]
    source = Path(rcc_hf.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(source), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    script = [str(TESTS / "training_process.py"), *map(str, (folder, batch_size, steps, accumulation)), *engine.split()]
    done = subprocess.run(launch + script, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    history = json.loads((folder / "out" / f"checkpoint-{steps}" / "trainer_state.json").read_text())["log_history"]
    metrics = json.loads((folder / "out" / "all_results.json").read_text())
    return history, metrics, load_file(folder / "out" / "model.safetensors")


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    found = []
    for number, arguments in enumerate(((1, 8), (2, 4), (2, 2, 2))):
        (tmp_path / str(number)).mkdir()
        found.append(run(tmp_path / str(number), *arguments))
    history, metrics, weights = found[0]
    for other_history, other_metrics, other_weights in found[1:]:
        for line, other in zip(history, other_history, strict=True):
            assert line.keys() == other.keys()
            for name in line.keys() & {"loss", "grad_norm", "cross_entropy", "distillation_copy", "token_accuracy"}:
                assert line[name] == pytest.approx(other[name], rel=1e-4), name
        for name in ("eval_loss", "eval_token_accuracy", "train_loss"):
            assert metrics[name] == pytest.approx(other_metrics[name], rel=1e-4), name
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, rtol=0, atol=2e-4, msg=name)


@pytest.mark.slow
def test_two_processes_with_an_engine_are_one(tmp_path):
    """One of them has a long text where the other has another batch."""
    found = []
    for number, arguments in enumerate(((1, 4, 2), (2, 4, 1), (2, 2, 2))):
        (tmp_path / str(number)).mkdir()
        found.append(run(tmp_path / str(number), *arguments, engine="two-pass"))
    history, _, weights = found[0]
    for other_history, _, other_weights in found[1:]:
        for line, other in zip(history, other_history, strict=True):
            for name in line.keys() & {"loss", "grad_norm", "cross_entropy", "cross_entropy_long", "token_accuracy"}:
                assert line[name] == pytest.approx(other[name], rel=1e-4), name
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, rtol=0, atol=2e-4, msg=name)
