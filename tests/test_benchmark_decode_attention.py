# SPDX-License-Identifier: Apache-2.0
"""benchmarks/decode_attention.py: a small run, in which all ways compute the same."""

import json
import runpy
from pathlib import Path

import pytest

FILE = Path(__file__).parent.parent / "benchmarks" / "decode_attention.py"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="needs benchmarks/, which the source archive leaves out")

SMALL = "--entries 96 --batches 2 --query_heads 4 --key_heads 2 --width 8 --repeats 1 --dtype float32 --device cpu"


def test_all_ways_compute_the_same(tmp_path, capsys):
    script = runpy.run_path(str(FILE))
    script["main"]([str(tmp_path / "out.json"), *SMALL.split()])
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["way"] for row in report["rows"]] == list(script["WAYS"])
    assert "needs a GPU" in report["rows"][4]["error"]
    for row in report["rows"][:4] + report["rows"][5:]:
        assert row["difference"] < 1e-5
        assert row["gigabytes_per_second"] == pytest.approx(2 * 2 * 2 * 96 * 8 * 4 / row["seconds"] / 1e9)
    assert {"commit", "command"} <= report.keys()
    assert capsys.readouterr().out.count("\n| 96 | 2 |") == len(report["rows"])


def test_a_way_that_fails_is_a_row_too(tmp_path, capsys):
    script = runpy.run_path(str(FILE))

    def fails(*tensors):
        raise RuntimeError("no such kernel")

    script["WAYS"]["grouped"] = fails
    script["main"]([str(tmp_path / "out.json"), *SMALL.split(), "--ways", "grouped", "shared"])
    failed, worked = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert failed["error"] == "RuntimeError: no such kernel"
    assert worked["seconds"] > 0
    assert "no such kernel" in capsys.readouterr().out
