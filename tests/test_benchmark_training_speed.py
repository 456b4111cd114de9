# SPDX-License-Identifier: Apache-2.0
"""benchmarks/training_speed.py: a run on a tiny base."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from tiny import base_model

FILE = Path(__file__).parent.parent / "benchmarks" / "training_speed.py"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="needs benchmarks/, which the source archive leaves out")


def test_a_run(tmp_path, monkeypatch, capsys):
    base_model().save_pretrained(tmp_path / "base")
    output, kernels = tmp_path / "speed.json", tmp_path / "kernels.txt"
    command = [str(FILE), str(output), "--model", str(tmp_path / "base"), "--modes", "eager", "--batches", "1", "2"]
    command += ["--steps", "1", "--segment_length", "16", "--ratio", "4", "--ranks", "2", "2", "2", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", [*command, "--dtype", "float32", "--profile", str(kernels)])
    runpy.run_path(str(FILE), run_name="__main__")
    report = json.loads(output.read_text())
    assert [(r["mode"], r["batch_size"]) for r in report["results"]] == [("eager", 1), ("eager", 2)]
    for result in report["results"]:
        tokens = result["batch_size"] * 16
        assert result["source_tokens_per_second"] * result["step_ms"] / 1000 == pytest.approx(tokens)
    assert {"commit", "command"} <= report.keys()
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("eager")]) == 2
    assert "aten::" in kernels.read_text()
