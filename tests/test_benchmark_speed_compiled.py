# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811 -- the fixture that is imported
"""benchmarks/speed/: sides with compiled layers and with merged adapters, where they are asked for."""

import pytest
import torch
from test_benchmark_speed import CPU, limits, measure, pytestmark, speed  # noqa: F401 -- a mark
from tiny import ratio_of_norms


def test_compiled_layers_compute_the_same(speed, monkeypatch):
    monkeypatch.setattr(speed.compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    pair = speed.shapes.build("micro", "sdpa", "cpu", torch.float64, segment_length=32, ratio=8)
    ids = pair.random_ids(2, 40)
    with torch.no_grad():
        expected = pair.base(ids, use_cache=True)
        graphs = speed.compiled.compiled_graphs()
        with speed.compiled.compiled(pair, "base_compiled"):
            found = pair.base(ids, use_cache=True)
        assert speed.compiled.compiled_graphs() - graphs == 1  # for all layers, with a cache too
    assert ratio_of_norms(found.logits, expected.logits) <= 1e-10
    for layer, other in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert ratio_of_norms(layer.keys, other.keys) <= 1e-10
    torch._dynamo.reset()


@pytest.mark.parametrize(("part", "rows"), [("compression", 1), ("first_token", 2)])
def test_compiled_sides(speed, part, rows, tmp_path, monkeypatch, capsys):
    """They are there where they are asked for, also behind rows of before, and no timed run compiles."""
    monkeypatch.setattr(speed.compiled, "BACKEND", "eager")
    file, more = tmp_path / "speed.json", ("--parts", part, "--lengths", "96", "160")
    data = measure(speed, file, *more)
    assert all(row["sides"].keys() == {"base", "rcc"} for row in data["rows"])
    assert "compiled" not in speed.tables.markdown(data)
    torch._dynamo.reset()
    data = measure(speed, file, *more, "--compile")
    assert [row["run"] for row in data["rows"]] == [1] * rows
    for row in data["rows"]:
        assert {side["status"] for side in row["sides"].values()} == {"ok"}
        for name in ("base_compiled", "rcc_compiled"):
            side = row["sides"][name]
            assert side["first_call_seconds"] > 0
            assert side["graphs"] == 0
        assert row["sides"]["rcc_compiled"]["slots"] == row["sides"]["rcc"]["slots"]
        assert (row["sides"]["rcc_compiled"].get("ceiling_share", 0) > 0) is (part == "compression")
    capsys.readouterr()
    speed.report.main([str(file)])
    text = capsys.readouterr().out
    assert "| base, compiled | ours, compiled |" in text
    assert ("| ours is as fast, both compiled |" in text) is (part == "first_token")
    torch._dynamo.reset()


def test_compiling_counts_for_nothing(speed):
    def side():
        return speed.timing.Sample(1.0, preparing=-100.0)

    found = speed.timing.compare({"base": side, "rcc": side}, limits(speed), CPU)
    assert found["rcc"]["wall_seconds"] >= 100
    assert len(found["rcc"]["seconds"]) == 1


def test_contexts_are_compiled_for_by_shorter_ones(speed):
    pair = speed.shapes.build("micro", "sdpa", "cpu", torch.float32, segment_length=32, ratio=8)
    pair.rcc.config.encode_batch_tokens = 128
    assert [speed.first_token.first_length(pair, n) for n in (64, 128, 160, 256, 300, 1000)] == [
        64, 128, 160, 128, 172, 232,
    ]  # fmt: skip


def test_a_merged_side(speed, tmp_path, monkeypatch, capsys):
    """Merging is the model's own; here one that counts."""
    calls = []
    kind = speed.shapes.RCCForCausalLM
    monkeypatch.setattr(kind, "fuse_adapters", lambda self, which: calls.append(which), raising=False)
    monkeypatch.setattr(kind, "unfuse_adapters", lambda self: calls.append("off"), raising=False)
    more = ("--parts", "decode", "--caches", "dynamic", "--batches", "1", "--fuse")
    data = measure(speed, tmp_path / "speed.json", *more)
    side, plain = (data["rows"][0]["sides"][name] for name in ("rcc_fused", "rcc"))
    assert calls == ["read", "off"]
    assert (side["status"], side["slots"], side["kept_bytes"]) == ("ok", plain["slots"], plain["kept_bytes"])
    maps = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48
    assert side["fused_bytes"] == side["weight_bytes"] - plain["weight_bytes"] == 2 * maps * 4
    assert "| ours, merged |" in speed.tables.markdown(data)
