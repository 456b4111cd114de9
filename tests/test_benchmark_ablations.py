# SPDX-License-Identifier: Apache-2.0
"""benchmarks/ablations.py: its variants, its clock, and small runs of it that are killed and that fail."""

import importlib
import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from evaluating import texts_file
from objective_data import chat_tokenizer
from tiny import base_model

from rcc_hf.checkpoints import load_model
from rcc_hf.objectives import Phases
from rcc_hf.recipes import Recipe, build_objectives, read_sources
from rcc_hf.recipes.running import _check_shapes
from rcc_hf.training import TrainSettings
from rcc_hf.training.parts import choose_parts

FOLDER = Path(__file__).parent.parent / "benchmarks"
VARIANTS = FOLDER / "ablations.yaml"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="needs benchmarks/, which the source archive leaves out")
NAMES = list(yaml.safe_load(VARIANTS.read_text(encoding="utf-8"))["variants"]) if FOLDER.exists() else []
RESULT = {
    "commit": "c",
    "hardware": "h",
    "result": {
        "trained_parameters": 1_500_000,
        "checkpoint_bytes_in_bf16": 3_000_000,
        "steps": 1200,
        "seconds": 90.25,
        "source_tokens": 19_660_800,
        "source_tokens_per_second": 217_800.0,
        "graphs_while_timed": 0,
        "peak_memory_gib": 21.0,
        "held_out": {str(ratio): {"loss": 2.5, "token_accuracy": 0.5} for ratio in (8, 16, 32)},
    },
}


@pytest.fixture
def ablations(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)  # as when it is run
    return importlib.import_module("ablations")


@pytest.fixture
def variant(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("ablation_variant")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base with room for long segments, its tokenizer, and texts as long."""
    folder = tmp_path_factory.mktemp("base")
    base_model(vocab_size=300, max_position_embeddings=4096).float().save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    texts_file(folder, count=2, length=2**14)
    return folder


def made(row: dict, accuracy: float = 0.5) -> dict:
    """A result as a variant leaves it, of another accuracy at ratio 32."""
    row = json.loads(json.dumps(row))
    row["result"]["held_out"]["32"]["token_accuracy"] = accuracy
    return row


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_variant_can_be_trained_and_measured(ablations, base, name, tiny):
    recipes, ratios = ablations.read_variants(VARIANTS, tiny=tiny)
    recipe, texts = Recipe.parse(recipes[name]), [str(base / "texts.jsonl")]
    settings = TrainSettings(output="out", **recipe.training)
    kinds = {one.name: type(one.default) for one in fields(TrainSettings) if isinstance(one.default, (int, float))}
    for field, kind in kinds.items():
        assert type(getattr(settings, field)) is kind, field  # YAML takes 5e-4 for a text
    model = load_model(str(base), dtype="bfloat16", **recipe.compressor)
    choose_parts(model, settings.train_parts)
    length = model.config.segment_length
    if tiny or not name.startswith("batch-"):
        assert settings.batch_size * length == (2 * 64 if tiny else 32 * 512)
    assert all(length % ratio == 0 for ratio in ratios)
    sources = read_sources(chat_tokenizer(), texts=texts, progress=False)
    objectives = build_objectives(recipe.drawn(), sources, chat_tokenizer(), [1, 2])
    recipe.phases.check(length, list(objectives))
    _check_shapes(objectives, recipe.phases, length)


def test_variants_differ_from_the_common_recipe_in_what_they_say(ablations, base):
    recipes, _ = ablations.read_variants(VARIANTS)
    assert sum(recipe == recipes["default"] for recipe in recipes.values()) == 1
    made = {name: load_model(str(base), **recipes[name]["compressor"]) for name in ("default", "full-map", "full-base")}
    assert made["full-map"].config.scheme_options["map_rank"] is None
    names = [name for name, _ in made["full-base"].named_parameters() if ".rcc." in name]
    assert names
    assert all(".slot_map." in name or ".mark." in name for name in names)


def test_wrong_calls_are_refused(ablations, tmp_path):
    call = ["out", "--texts", "a", "--held_out", "b"]
    with pytest.raises(ValueError, match="there is no variant nothing; choose of default, unmarked"):
        ablations.jobs(ablations.parse([*call, "--variants", "nothing"]))
    with pytest.raises(ValueError, match="default has no texts, held_out; give --texts and --held_out"):
        ablations.jobs(ablations.parse(["out"]))
    with pytest.raises(ValueError, match="absent"):
        ablations.jobs(ablations.parse([*call, "--bleu", "4", "--bleu_texts", str(tmp_path / "absent.jsonl")]))
    data = yaml.safe_load(VARIANTS.read_text(encoding="utf-8"))
    for variants, message in (({"../x": {}}, "names a folder"), ({"x": {"phases": []}}, "x: phases are")):
        (tmp_path / "wrong.yaml").write_text(yaml.safe_dump({**data, "variants": variants}))
        with pytest.raises(ValueError, match=message):
            ablations.jobs(ablations.parse([*call, "--file", str(tmp_path / "wrong.yaml")]))
    for wrong in (["--minutes", "0"], ["--trial_steps", "1"], ["--workers", "0"]):
        with pytest.raises(SystemExit):
            ablations.parse([*call, *wrong])


def test_time_is_that_of_all_kinds_of_steps_by_their_share(variant, monkeypatch):
    """Of each kind only the second half counts: the first compiles."""
    phases = [
        {"until": 0.25, "ratios": 8, "segments": 1, "objectives": "a"},
        {"ratios": {8: 1, 32: 3}, "segments": 1, "objectives": {"a": 2}},
    ]
    recipe = Recipe.parse({"model": "m", "objectives": {"a": {}}, "phases": phases, "held_out": "x"})
    assert variant.shares(recipe.phases) == {(8, 1, "a"): 0.4375, (32, 1, "a"): 0.5625}
    costs = [*[100.0] * 3, *[2.0] * 3, *[50.0] * 3, *[1.0] * 3]
    now = iter([sum(costs[: step + 1]) for step in range(12) if step + 1 in (3, 6, 9, 12)])
    monkeypatch.setattr(variant.time, "perf_counter", lambda: next(now))

    def run(trial, settings, *, callbacks, **how):
        drawn = [trial.phases.at(step / settings.max_steps).ratios for step in range(settings.max_steps)]
        assert drawn == [{8: 1.0}] * 6 + [{32: 1.0}] * 6
        assert (how["held_out_examples"], how["held_out_ratios"]) == (1, [8])
        for step in range(settings.max_steps):
            callbacks[0].on_step_end(None, SimpleNamespace(global_step=step + 1), None)

    monkeypatch.setattr(variant, "run_recipe", run)
    assert variant.seconds_per_step(recipe, 6, [8], "auto") == pytest.approx(0.4375 * 2 + 0.5625)


def test_shares_add_up(variant):
    data = yaml.safe_load(VARIANTS.read_text(encoding="utf-8"))["common"]
    found = variant.shares(Phases.parse(data["phases"]))
    assert sum(found.values()) == pytest.approx(1)
    assert found[32, 1, "reconstruction"] == pytest.approx(0.25)


def test_the_best_is_first_and_errors_are_last(ablations):
    rows = {name: made(RESULT, accuracy)["result"] for name, accuracy in (("low", 0.25), ("high", 0.75))}
    rows = {"broken": {"error": "ValueError: a | b"}, **rows}
    found = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in ablations.table(rows, [8, 16, 32]).splitlines()
    ]
    assert [row[0] for row in found] == ["variant", "---", "high", "low", "broken"]
    assert len({len(row) for row in found}) == 1
    assert found[0][-6:] == ["accuracy 8", "accuracy 16", "accuracy 32", "loss 8", "loss 16", "loss 32"]
    assert found[2][1:8] == ["1.50", "3.0", "1,200", "90.2", "19.66", "217,800", "21.0"]
    assert found[4][1] == "ValueError: a / b"
    for row in list(rows.values())[1:]:
        row["held_out"]["32"]["bleu4"] = row["held_out"]["16"]["bleu4"] = row["held_out"]["8"]["bleu4"] = 0.125
    assert "BLEU-4 32" in ablations.table(rows, [8, 16, 32])


def test_one_gpu_each_and_a_failure_does_not_stop_the_others(ablations, monkeypatch, tmp_path):
    seen = []

    def run(called, stdout, stderr, env):
        folder = Path(called[2])
        seen.append((folder.name, env["CUDA_VISIBLE_DEVICES"]))
        if folder.name == "add":
            stdout.write("Traceback\nRuntimeError: out of memory\n 50%|####\rleaked semaphores\n")
            return SimpleNamespace(returncode=1)
        (folder / "result.json").write_text(json.dumps(RESULT))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(ablations, "subprocess", SimpleNamespace(run=run, STDOUT=None))
    call = [str(tmp_path), "--texts", "a", "--held_out", "b", "--variants", "default", "add", "scale-1", "--gpus", "3"]
    assert ablations.main([*call, "--workers", "1"]) == 1
    report = json.loads((tmp_path / "ablations.json").read_text())
    assert {"commit", "versions", "hardware", "command"} <= report.keys()
    error = f"RuntimeError: out of memory (status 1; see {tmp_path / 'add' / 'log.txt'})"
    assert report["results"]["add"] == {"error": error}
    assert report["results"]["scale-1"]["steps"] == 1200
    assert error in (tmp_path / "ablations.md").read_text()
    assert seen == [("default", "0"), ("add", "0"), ("scale-1", "0")]
    assert ablations.main(call) == 1
    assert [name for name, _ in seen[3:]] == ["add"]  # the others are done
    assert ablations.main([*call, "--minutes", "2", "--model", "m"]) == 1
    found = json.loads((tmp_path / "ablations.json").read_text())["results"]["default"]["error"]
    told = "recipe.model: 'smollm2' there, 'm' here, seconds: 90.0 there, 120.0 here"
    assert found == f"it is done with other settings ({told}); take another folder"


def test_a_small_run_of_two_variants_and_going_on(ablations, base, tmp_path):
    """Killed in the second variant, of which something was left: the first stays, the second is done anew."""
    texts = str(base / "texts.jsonl")
    call = [str(tmp_path), "--tiny", "--model", str(base), "--texts", texts, "--held_out", texts, "--dtype", "float32"]
    call += ["--minutes", "0.005", "--trial_steps", "2", "--held_out_tokens", "256"]
    call += ["--bleu", "1", "--bleu_texts", texts]
    assert ablations.main([*call, "--variants", "no-mixing"]) == 0
    first = (tmp_path / "no-mixing" / "result.json").stat()
    left = tmp_path / "full-base" / "model" / "model-00002.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"")
    (tmp_path / "full-base" / "job.json").write_text("{}")
    assert ablations.main([*call, "--variants", "no-mixing", "full-base"]) == 0
    assert (tmp_path / "no-mixing" / "result.json").stat() == first
    assert not left.exists()
    rows = json.loads((tmp_path / "ablations.json").read_text())["results"]
    for name, row in rows.items():
        assert row["held_out"].keys() == {"8", "16", "32"}
        for found in row["held_out"].values():
            assert found.keys() == {"loss", "token_accuracy", "bleu4"}
        assert row["source_tokens"] == row["steps"] * 2 * 64
        assert row["source_tokens_per_second"] == pytest.approx((row["steps"] - 1) * 2 * 64 / row["seconds"])
        assert not list((tmp_path / name / "model").glob("checkpoint-*"))
        model = load_model(str(tmp_path / name / "model"))
        choose_parts(model, ["write", "maps", "base"] if name == "full-base" else ["write", "read", "maps"])
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert row["trained_parameters"] == trained
        assert row["checkpoint_bytes_in_bf16"] == 2 * trained
