# SPDX-License-Identifier: Apache-2.0
"""What stands beside measured numbers."""

import json
import subprocess
import sys

import torch
import transformers

from rcc_hf.surroundings import surroundings


def test_what_a_result_needs_to_be_rerun(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/one.py", "out.json", "--rounds", "3"])
    found = surroundings()
    assert found["command"] == ["python", "benchmarks/one.py", "out.json", "--rounds", "3"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["transformers"] == transformers.__version__
    assert "CPU" in found["hardware"]
    assert json.loads(json.dumps(found)) == found


def test_no_path_of_this_machine(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/someone/bin/rcc", "evaluate"])
    assert surroundings()["command"] == ["rcc", "evaluate"]


def test_without_git(monkeypatch):
    def absent(*arguments, **keywords):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", absent)
    assert (surroundings()["commit"], surroundings()["uncommitted_changes"]) == (None, False)
