# SPDX-License-Identifier: Apache-2.0
"""benchmarks/speed/: shapes, medians and shares, a small run of every part, and what happens when one side fails."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks" / "speed"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="needs benchmarks/, which the source archive leaves out")
CPU = torch.device("cpu")
MICRO = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
ARGUMENTS = (
    *("--small", "--shapes", "micro", "--segment_length", "32", "--ratio", "8", "--repeats", "2"),
    *("--lengths", "64", "128", "--decode_length", "128", "--batches", "1", "2", "--batch_tokens", "64"),
    *("--prompts", "16", "--new_tokens", "4"),
)


@pytest.fixture
def speed(monkeypatch):
    """The modules of the folder by name, with a shape that is smaller than any; forgotten afterwards."""
    monkeypatch.syspath_prepend(FOLDER)
    names = [file.stem for file in FOLDER.glob("*.py")]
    # report.py imports it where figures are asked for: matplotlib need not be there
    found = SimpleNamespace(**{name: importlib.import_module(name) for name in names if name != "figures"})
    monkeypatch.setitem(found.shapes.SHAPES, "micro", MICRO)
    threads = torch.get_num_threads()
    yield found
    torch.set_num_threads(threads)
    for name in names:
        sys.modules.pop(name, None)


def measure(speed, file, *more):
    speed.run.main([str(file), *ARGUMENTS, *more])
    return json.loads(file.read_text())


def statuses(data, side):
    return [row["sides"][side]["status"] for row in data["rows"]]


@pytest.mark.parametrize(
    ("shape", "expected"), [("llama-3.1-8b", 8_030_261_248), ("mistral-7b", 7_241_732_096), ("smollm2", 134_515_008)]
)
def test_shapes_have_the_published_number_of_parameters(speed, shape, expected):
    assert speed.shapes.count_parameters(shape) == expected


def test_both_sides_have_one_set_of_weights(speed):
    pair = speed.shapes.build("micro", "sdpa", "cpu", torch.float32, segment_length=32, ratio=8)
    ids = pair.random_ids(2, 16)
    with torch.no_grad():
        assert torch.equal(pair.base(ids).logits, pair.rcc(ids).logits)
    own = {p.data_ptr() for p in pair.rcc.parameters()}
    assert all(p.data_ptr() in own for p in pair.base.parameters())
    assert all(bool(p.any()) for p in pair.rcc.parameters())
    assert speed.shapes.kv_bytes(pair.base.config, torch.bfloat16) == 2 * 2 * 2 * 8 * 2


def test_medians_and_quartiles(speed):
    found = speed.timing.summary([4.0, 1.0, 2.0, 3.0, 10.0])
    assert (found["median_seconds"], found["quartiles_seconds"]) == (3.0, [2.0, 4.0])
    assert speed.timing.summary([1.0, 3.0])["quartiles_seconds"] == [1.5, 2.5]
    assert speed.timing.summary([2.0])["quartiles_seconds"] == [2.0, 2.0]


def limits(speed, repeats=3, row_seconds=60.0, seconds=None):
    return speed.timing.Limits(repeats, row_seconds, speed.timing.Budget(seconds))


def test_sides_take_turns_and_the_first_run_does_not_count(speed):
    order = []

    def side(name):
        order.append(name)
        return speed.timing.Sample(float(len(order)), {"kept_bytes": len(order)})

    sides = {name: lambda name=name: side(name) for name in ("base", "rcc")}
    found = speed.timing.compare(sides, limits(speed), CPU)
    assert order == ["base", "rcc"] * 4
    assert (found["base"]["seconds"], found["base"]["kept_bytes"]) == ([3.0, 5.0, 7.0], 7)
    assert found["rcc"]["median_seconds"] == 6.0
    alone = speed.timing.compare(sides, limits(speed, row_seconds=0.0), CPU)
    assert len(alone["base"]["seconds"]) == 1
    assert not alone["base"]["warmed_up"]
    late = speed.timing.compare(sides, limits(speed, seconds=50.0), CPU, expected={"base": 100.0, "rcc": 1.0})
    assert late["base"]["status"] == "skipped"
    assert "100 s a run" in late["base"]["reason"]
    assert late["rcc"]["status"] == "ok"


def test_too_little_memory_on_one_side_leaves_the_other(speed):
    tried = []

    def large():
        tried.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB.\nMore lines")

    def wrong():
        raise ValueError("no such kernel")

    sides = {"base": large, "rcc": lambda: speed.timing.Sample(1.0), "other": wrong}
    found = speed.timing.compare(sides, limits(speed), CPU)
    assert (found["base"]["status"], len(tried)) == ("out of memory", 2)  # tried again with memory given back
    assert found["base"]["reason"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 64.00 GiB."
    assert found["rcc"]["seconds"] == [1.0] * 3
    assert (found["other"]["status"], found["other"]["reason"]) == ("failed", "ValueError: no such kernel")


def test_what_counts_as_too_little_memory(speed):
    errors = [MemoryError(), torch.OutOfMemoryError(), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]
    assert [speed.timing.status_of(error)[0] for error in errors] == ["out of memory"] * 3
    assert speed.timing.status_of(ValueError("out of memory"))[0] == "failed"


def test_operations_and_shares_by_hand(speed):
    pair = speed.shapes.build("micro", "sdpa", "cpu", torch.float32, segment_length=32, ratio=8, scheme_options={
        "write_rank": 2, "read_rank": 1, "map_rank": 3,
    })  # fmt: skip
    record = SimpleNamespace(data={"runs": [{"ceiling_tflops": 2e-6}]})
    context = SimpleNamespace(pair=pair, record=record)
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48  # q, o; k, v; gate, up, down
    rank_1 = (32 + 32) * 2 + (32 + 16) * 2 + 3 * (32 + 48)
    counts = speed.compression.operations(context, 64)
    attention = 2 * 64 * 32 * (4 * 8 * 2)
    assert counts["wanted"] == 2 * 64 * 2 * layer
    assert counts["base"] == counts["wanted"] + attention
    write = 2 * 64 * 2 * rank_1  # rank 2 in all layers but the last
    slots = 2 * 8 * (2 * layer + 2 * rank_1 + 2 * 3 * (32 + 32)) + 2 * 8 * 4 * 64
    assert counts["rcc"] == counts["base"] + write + slots
    rates = speed.compression.rates(context, "rcc", 64, 2.0)
    assert rates["tokens_per_second"] == 32
    assert rates["tflops"] == pytest.approx(counts["wanted"] / 2e12)
    assert rates["ceiling_share"] == pytest.approx(counts["wanted"] / 4e6)
    assert rates["ceiling_share_done"] == pytest.approx(counts["rcc"] / 4e6)


def test_all_parts_and_the_report(speed, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    data = measure(speed, tmp_path / "speed.json")
    assert list(dict.fromkeys(row["key"]["part"] for row in data["rows"])) == list(speed.options.PARTS)
    assert set(statuses(data, "base") + statuses(data, "rcc")) == {"ok"}
    out = capsys.readouterr().out
    assert out.count("say nothing of a GPU") == 2
    decode = [row for row in data["rows"] if row["key"]["part"] == "decode"]
    assert [(r["key"]["batch"], r["key"]["cache"]) for r in decode] == [
        (1, "static"), (2, "static"), (1, "dynamic"), (2, "dynamic"),
    ]  # fmt: skip
    assert all(row["sides"]["rcc"]["slots"] == 16 for row in decode)
    assert {"commit", "versions", "ceiling_tflops"} <= data["runs"][0].keys()

    speed.report.main([str(tmp_path / "speed.json"), "--output", str(tmp_path / "images")])
    text = capsys.readouterr().out
    assert all(f"### {title}" in text for title in speed.tables.TITLES.values())
    assert "SMALL run on a CPU" in text
    assert "### Not measured" not in text
    written = {file.name for file in (tmp_path / "images").iterdir()}
    assert {"speed-first-token.png", "speed-decode.png", "speed-compression.png"} <= written


def test_files_of_several_gpus_are_reported_as_one(speed):
    def file(commit, shape, ratio=8):
        return {"setup": {"ratio": ratio}, "runs": [{"commit": commit}], "rows": [{"key": {"shape": shape}, "run": 0}]}

    found = speed.report.merge([file("a", "one"), file("b", "two")])
    assert [(row["key"]["shape"], found["runs"][row["run"]]["commit"]) for row in found["rows"]] == [
        ("one", "a"),
        ("two", "b"),
    ]
    with pytest.raises(ValueError, match="different ratio"):
        speed.report.merge([file("a", "one"), file("b", "two", ratio=4)])


def test_it_goes_on_where_it_was(speed, tmp_path, capsys):
    file = tmp_path / "speed.json"
    data = measure(speed, file, "--parts", "first_token", "compression")
    seconds = [row["sides"]["rcc"]["seconds"] for row in data["rows"]]
    data["rows"][1]["sides"]["base"] = {"status": "failed", "reason": "killed"}
    file.write_text(json.dumps(data))
    again = measure(speed, file, "--parts", "first_token", "compression")
    assert len(again["rows"]) == len(seconds)
    assert [row["run"] for row in again["rows"]] == [0, 0, 1]  # the one that had failed, now last
    assert [row["sides"]["rcc"]["seconds"] for row in again["rows"][:2]] == [seconds[0], seconds[2]]
    with pytest.raises(ValueError, match="measured with another ratio"):
        measure(speed, file, "--ratio", "16")


def test_rows_are_written_one_by_one(speed, tmp_path, monkeypatch):
    file = tmp_path / "speed.json"

    def killed(context, key):
        raise KeyboardInterrupt

    monkeypatch.setattr(speed.first_token, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        measure(speed, file, "--parts", "first_token", "compression")
    assert [row["key"]["part"] for row in json.loads(file.read_text())["rows"]] == ["compression"]


def test_the_base_prefills_in_chunks_where_it_has_too_little_memory(speed, tmp_path, monkeypatch):
    whole = speed.context.Context.generate

    def generate(self, side, **arguments):
        if side == "base" and "prefill_chunk_size" not in arguments:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, side, **arguments)

    monkeypatch.setattr(speed.context.Context, "generate", generate)
    file = tmp_path / "speed.json"
    data = measure(speed, file, "--parts", "first_token", "--prefill_chunk", "50")
    assert statuses(data, "base") == ["ok"] * 2
    assert data["rows"][0]["sides"]["base"]["prefill_chunk_size"] == 50
    assert "prefill in chunks of 50" in speed.tables.markdown(data)

    monkeypatch.setattr(speed.context.Context, "fits", lambda self, length: length < 100)
    more = ("--parts", "first_token", "decode", "--caches", "dynamic")
    data = measure(speed, tmp_path / "other.json", *more)
    assert statuses(data, "base") == ["ok"] + ["out of memory"] * 3
    assert statuses(data, "rcc") == ["ok"] * 4


def test_a_gpu_that_crashed_ends_the_call_and_is_passed_over_by_the_next(speed, tmp_path, monkeypatch):
    def crash(context, key):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(speed.decoding, "filled_cache", crash)
    file, more = tmp_path / "speed.json", ("--parts", "decode", "--caches", "dynamic", "--batches", "1", "2")
    for rows in (1, 2):
        with pytest.raises(SystemExit, match="call again"):
            measure(speed, file, *more)
        data = json.loads(file.read_text())
        assert statuses(data, "base") == ["crashed"] * rows
        assert statuses(data, "rcc") == ["skipped"] * rows


def test_flash_attention_has_no_static_cache_behind_a_memory(speed):
    pair = speed.shapes.build("micro", "sdpa", "cpu", torch.float32, segment_length=32, ratio=8)
    settings = speed.context.Settings(prompt=3, new_tokens=4)
    names = {"attention": "flash_attention_4"}
    context = speed.context.Context(pair, settings, limits(speed), SimpleNamespace(), names)
    found = speed.decoding.measure(context, {"length": 64, "batch": 1, "cache": "static"})
    assert (found["base"]["status"], found["rcc"]["status"]) == ("ok", "unavailable")


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("ok", "ok", True),
        ("ok", "unavailable", True),
        ("out of memory", "ok", True),
        ("unavailable", "unavailable", False),
        ("ok", "failed", False),
        ("skipped", "ok", False),
        ("skipped", "crashed", True),
    ],
)
def test_what_is_measured_again(speed, tmp_path, first, second, expected):
    record = speed.record.Record(tmp_path / "speed.json", {}, {})
    record.add({"part": "decode"}, {"base": {"status": first}, "rcc": {"status": second}})
    assert record.is_done({"part": "decode"}) is expected
    assert not record.is_done({"part": "memory"})


def test_memory_is_measured_on_its_own_too(speed, tmp_path):
    data = measure(speed, tmp_path / "speed.json", "--parts", "memory")
    first = data["rows"][0]["sides"]
    assert first["base"]["kept_bytes"] == 64 * 2 * 2 * 2 * 8 * 4
    assert first["rcc"]["kept_bytes"] == 8 * 2 * 2 * 2 * 8 * 4  # slots; nothing is left behind them
    assert "seconds" not in first["rcc"]


def test_one_side_without_memory_and_an_attention_that_is_missing(speed, tmp_path, monkeypatch, capsys):
    def too_large(context, key):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(speed.decoding, "filled_cache", too_large)
    more = ("--parts", "decode", "--caches", "dynamic", "--attention", "flash_attention_4", "sdpa")
    file = tmp_path / "speed.json"
    data = measure(speed, file, *more)
    assert statuses(data, "base") == ["unavailable"] * 2 + ["out of memory"] * 2
    assert statuses(data, "rcc") == ["unavailable"] * 2 + ["ok"] * 2
    assert "flash_attention_4 runs on a CUDA GPU" in data["rows"][0]["sides"]["rcc"]["reason"]
    capsys.readouterr()
    speed.report.main([str(file)])
    text = capsys.readouterr().out
    assert "- base, out of memory: OutOfMemoryError: CUDA out of memory (2 rows)" in text
    assert "| out of memory |" in text


def test_rows_beyond_the_budget_are_skipped(speed, tmp_path):
    data = measure(speed, tmp_path / "speed.json", "--parts", "first_token", "--seconds", "1e-6")
    assert statuses(data, "rcc") == ["skipped"] * 2
    assert data["rows"][0]["sides"]["rcc"]["reason"] == "no time was left"


def test_a_filled_cache_is_decoded_from(speed):
    pair = speed.shapes.build("micro", "sdpa", "cpu", torch.float32, segment_length=32, ratio=8)
    settings = speed.context.Settings(prompt=3, new_tokens=4)
    context = speed.context.Context(pair, settings, limits(speed), SimpleNamespace(), {})
    for kind in ("dynamic", "static"):
        cache = speed.decoding.filled_cache(context, {"length": 20, "batch": 2, "cache": kind})
        assert int(cache.get_seq_length()) == 20
        assert all(bool(layer.keys[:, :, :20].all()) for layer in cache.layers)
        ids = pair.random_ids(2, 23)
        context.generate("base", input_ids=ids, past_key_values=cache, max_new_tokens=4)
        assert int(cache.get_seq_length()) == 20 + 3 + 4 - 1
