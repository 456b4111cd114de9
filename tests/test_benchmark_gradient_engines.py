# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gradient_engines.py: a run on a tiny base, and one that runs out of memory."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from tiny import base_model

pytest.importorskip("matplotlib")
FILE = Path(__file__).parent.parent / "benchmarks" / "gradient_engines.py"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="needs benchmarks/, which the source archive leaves out")


@pytest.fixture
def command(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    flags = f"--model {tmp_path / 'base'} --segments 3 9 --segment_length 16 --ratio 16 --repeats 1 --dtype float32"
    return [str(tmp_path / "out.json"), *flags.split()]


def test_a_run(command, tmp_path, capsys):
    script = runpy.run_path(str(FILE))
    script["main"]([*command, "--engines", "full", "two-pass", "--plot", str(tmp_path / "out.png")])
    report = json.loads((tmp_path / "out.json").read_text())
    rows = {(row["engine"], row["num_segments"]): row for row in report["rows"]}
    assert rows.keys() == {("full", 3), ("full", 9), ("two-pass", 3), ("two-pass", 9)}
    for row in report["rows"]:
        assert row["microseconds_per_token"] == pytest.approx(1e6 * row["seconds"] / (row["num_segments"] * 16))
    assert rows["full", 9]["peak_bytes"] > 3 * rows["full", 3]["peak_bytes"]
    assert rows["two-pass", 9]["peak_bytes"] < 1.1 * rows["two-pass", 3]["peak_bytes"]
    assert {"commit", "command"} <= report.keys()
    assert capsys.readouterr().out.count("\n| two-pass |") == 2
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_an_engine_that_runs_out_of_memory_is_not_tried_further(command, tmp_path):
    script = runpy.run_path(str(FILE))
    measure = script["run"].__globals__["measure"]

    def fail(model, num_segments, engine, settings):
        if engine is script["run"].__globals__["choose_engine"]("full", size=1, seed=0):
            raise torch.OutOfMemoryError("no room")
        return measure(model, num_segments, engine, settings)

    script["run"].__globals__["measure"] = fail
    script["main"]([*command, "--engines", "full", "two-pass"])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["engine"], row["num_segments"], row.get("error")) for row in rows] == [
        ("full", 3, "out of memory"), ("two-pass", 3, None), ("two-pass", 9, None),
    ]  # fmt: skip
