# SPDX-License-Identifier: Apache-2.0
"""benchmarks/learning_curves.py: which lines of which logs it draws, one stage behind the other."""

import json
import runpy
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
FILE = Path(__file__).parent.parent / "benchmarks" / "learning_curves.py"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="needs benchmarks/, which the source archive leaves out")


@pytest.fixture
def script():
    return runpy.run_path(str(FILE))


def state(*accuracies, objective="copy"):
    lines = [
        {"step": 10 * (i + 1), "loss": 2.0 - a, f"token_accuracy_{objective}": a, "grad_norm": 1.0}
        for i, a in enumerate(accuracies)
    ]
    return {"log_history": [*lines, {"step": 10 * len(lines), "eval_loss": 3.0}], "best_metric": None}


def write(file, data):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data))
    return file


def test_stages_follow_each_other(tmp_path, script, capsys):
    write(tmp_path / "first" / "checkpoint-9" / "trainer_state.json", state(0.1))
    write(tmp_path / "first" / "checkpoint-10" / "trainer_state.json", state(0.1, 0.5))
    second = write(tmp_path / "second.json", state(0.75, 0.8, objective="find"))
    picture, log = tmp_path / "curves.png", tmp_path / "log.json"
    script["main"]([str(tmp_path / "first"), str(second), "--output", str(picture), "--log", str(log)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "4 lines of 2 stages" in capsys.readouterr().out
    stages = json.loads(log.read_text())
    assert [[line["step"] for line in stage] for stage in stages] == [[10, 20], [10, 20]]
    assert "grad_norm" not in stages[0][0]
    assert script["read_stages"](log) == stages
    above, below = script["draw"](stages).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in above.lines}
    assert drawn["copy"] == [[10, 0.1], [20, 0.5]]
    assert drawn["find"] == [[30, 0.75], [40, 0.8]]
    assert below.lines[0].get_xydata().tolist() == [[10, 1.9], [20, 1.5], [30, 1.25], [40, 1.2]]


def test_logs_without_training_are_refused(tmp_path, script):
    with pytest.raises(FileNotFoundError, match=r"neither trainer_state\.json nor a checkpoint"):
        script["read_stages"](tmp_path)
    empty = write(tmp_path / "empty.json", {"log_history": [{"step": 3, "eval_loss": 1.0}]})
    with pytest.raises(ValueError, match="no line of training"):
        script["read_stages"](empty)
