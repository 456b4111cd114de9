# SPDX-License-Identifier: Apache-2.0
"""benchmarks/baselines.py: the commands that it runs, and on which GPU."""

import importlib.util
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

FILE = Path(__file__).parent.parent / "benchmarks" / "baselines.py"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="needs benchmarks/, which the source archive leaves out")


@pytest.fixture
def baselines(monkeypatch):
    monkeypatch.syspath_prepend(FILE.parent)  # as when it is run
    spec = importlib.util.spec_from_file_location("baselines", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def numbers(baselines, *argv):
    """Of each task what is said behind --num_examples."""
    found = {}
    for folder, command in baselines.runs(baselines.parse(["out", "--qa", "qa.jsonl", *argv])):
        found.setdefault(folder.parent.name, set()).add(command[command.index("--num_examples") + 1])
    assert all(len(counts) == 1 for counts in found.values())
    return {task: int(counts.pop()) for task, counts in found.items()}


@pytest.fixture
def started(baselines, monkeypatch):
    """What the environment of each run names, in place of running it; as many runs at a time as there are workers."""
    found, together = [], threading.Barrier(4, timeout=10)

    def run(command, env, **_):
        together.wait()
        found.append(None if env is None else env["CUDA_VISIBLE_DEVICES"])
        folder = Path(command[command.index("--output") + 1])
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text("{}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(baselines.subprocess, "run", run)
    return found


@pytest.mark.parametrize(("gpus", "expected"), [(0, {None: 8}), (2, {"0": 4, "1": 4}), (4, dict.fromkeys("0123", 2))])
def test_workers_are_spread_over_gpus(baselines, started, tmp_path, gpus, expected):
    chosen = [(tmp_path / str(i), ["--output", str(tmp_path / str(i)), "--num_examples", "4"]) for i in range(8)]
    baselines.run_all(chosen, workers=4, gpus=gpus)
    assert Counter(started) == expected
    for turn in (started[:4], started[4:]):  # those that run at the same time
        assert set(Counter(turn).values()) == {4 // max(1, gpus)}


def test_numbers_of_examples_are_scaled_or_given(baselines):
    assert numbers(baselines) == baselines.EXAMPLES
    quarter = {"passkey": 1, "needles": 1, "ruler": 6, "reconstruction": 8, "perplexity": 2, "qa": 100, "cost": 5}
    assert numbers(baselines, "--scale", "0.25") == quarter
    given = numbers(baselines, "--scale", "0.01", "--examples", "passkey=7", "qa=30")
    assert given == {**dict.fromkeys(quarter, 1), "cost": 5, "qa": 30, "passkey": 7}
    for wrong in ("poetry=3", "qa=0", "qa=x", "qa"):
        with pytest.raises(ValueError, match="write TASK=NUMBER"):
            numbers(baselines, "--examples", wrong)


def test_a_run_that_is_done_is_left_alone_and_another_one_is_not_taken_for_it(baselines, monkeypatch, tmp_path):
    command = ["smollm2", "--num_examples", "4"]
    monkeypatch.setattr(baselines.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    (tmp_path / "metrics.json").write_text("{}")  # of a run that was killed behind it, perhaps: it is run again
    assert baselines.run(tmp_path, command) == f"{tmp_path}: 2 bytes"
    monkeypatch.setattr(baselines.subprocess, "run", lambda *_, **__: pytest.fail("run again"))
    assert baselines.run(tmp_path, command) == f"{tmp_path}: 2 bytes"
    for other in (["smollm2", "--num_examples", "8"], ["other", "--num_examples", "4"]):
        assert "it is done with other settings" in baselines.run(tmp_path, other)
        assert not baselines.run_all([(tmp_path, other)], 1, 0)


def test_gpus_are_those_that_the_caller_may_use(baselines, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [baselines.environment(i)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["4", "6"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert baselines.environment(1)["CUDA_VISIBLE_DEVICES"] == "1"
