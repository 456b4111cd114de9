# SPDX-License-Identifier: Apache-2.0
"""Recipes: what a file may say, what is made of it, and that running one twice gives the same compressor."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from evaluating import questions_file, texts_file
from objective_data import chat_tokenizer
from safetensors.torch import load_file
from tiny import base_model
from transformers import TrainerCallback

from rcc_hf.cli import main
from rcc_hf.objectives import Phases
from rcc_hf.recipes import OBJECTIVES, Recipe, build_objectives, read_recipe, read_sources
from rcc_hf.recipes.running import _held_out_shapes, run_recipe
from rcc_hf.training import TrainSettings

SHIPPED = sorted(Path(__file__).parents[1].glob("examples/recipes/*.yaml"))
SMALL = {
    "model": "base",
    "compressor": {"segment_length": 32, "ratio": 8, "window": 64, "write_rank": 2, "read_rank": 2, "map_rank": 2},
    "texts": ["texts.jsonl"],
    "questions": "qa.jsonl",
    "objectives": {
        "reconstruction": {"pad_share": 0.5},
        "near": {"type": "continuation", "local_length": 8},
        "passage": {"target_length": 8, "min_shown": 2, "max_shown": 4},
        "questions": {"haystack": "texts"},
        "unused": {"type": "conversations"},
    },
    "phases": [
        {"until": 0.5, "ratios": [8], "segments": [1], "objectives": ["reconstruction", "near"]},
        {"ratios": {4: 1, 8: 2}, "segments": [4], "objectives": {"questions": 1, "passage": 1}},
    ],
    "training": {"max_steps": 4, "batch_size": 2, "warmup_steps": 1, "save_steps": 2, "logging_steps": 1},
    "tiny": {"training": {"max_steps": 2}, "phases": {"ratios": 8, "segments": 1, "objectives": "near"}},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a base, texts and questions, which is where commands run."""
    base_model(vocab_size=300).float().save_pretrained(tmp_path / "base")
    chat_tokenizer().save_pretrained(tmp_path / "base")
    texts_file(tmp_path)
    questions_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder, **changes) -> str:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(SMALL | changes, sort_keys=False), encoding="utf-8")
    return str(folder / "recipe.yaml")


def weights(path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
@pytest.mark.parametrize("tiny", [False, True])
def test_shipped_recipes_are_whole(file, tiny):
    recipe = read_recipe(file, tiny=tiny)
    # a later stage has the segments of the checkpoint that it goes on from
    recipe.phases.check(recipe.compressor.get("segment_length", 512), list(recipe.objectives))
    for name, options in recipe.objectives.items():
        kind = OBJECTIVES[options.get("type", name)]
        assert set(options) - {"type"} <= kind.options()


def test_there_are_shipped_recipes():
    assert SHIPPED


def test_tiny_goes_into_mappings_and_takes_the_place_of_the_rest(folder):
    recipe, small = read_recipe(write(folder)), read_recipe(write(folder), tiny=True)
    assert recipe.training["max_steps"] == 4
    assert small.training == {**recipe.training, "max_steps": 2}
    assert (len(recipe.phases), len(small.phases)) == (2, 1)
    assert small.texts == recipe.texts == ["texts.jsonl"]
    assert recipe.questions == ["qa.jsonl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "x"}, "there is no field modle; the fields are chats, compressor, held_out, model"),
        ({"texts": 3}, "texts is 3; expected a source, or a list of them"),
        ({"objectives": {}}, "objectives are empty"),
        ({"objectives": ["reconstruction"]}, "expected names with values"),
        ({"phases": []}, "give a list of mappings"),
        ({"compressor": 4}, "compressor is 4; expected names with values"),
    ],
)
def test_wrong_fields_are_named(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(write(folder, **changes))


def test_what_is_no_recipe_is_refused(folder):
    (folder / "broken.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken.yaml is no YAML"):
        read_recipe(folder / "broken.yaml")
    (folder / "list.yaml").write_text("- a", encoding="utf-8")
    with pytest.raises(ValueError, match="a recipe is"):
        read_recipe(folder / "list.yaml")
    with pytest.raises(ValueError, match="model, phases missing; a recipe needs model, objectives, phases"):
        Recipe.parse({"objectives": {"reconstruction": {}}})
    without = {name: value for name, value in SMALL.items() if name != "tiny"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(without), encoding="utf-8")
    with pytest.raises(ValueError, match="there is no field tiny"):
        read_recipe(folder / "recipe.yaml", tiny=True)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"repeat": {}}, "objective repeat: there is no type 'repeat'; choose of reconstruction, passage"),
        ({"reconstruction": {"rate": 1}}, "reconstruction has no option rate; it has fill_id, max_target, pad_share"),
        ({"reconstruction": {"pad_share": 2}}, "objective reconstruction: pad_share is 2"),
        ({"conversations": {}}, "objective conversations: it needs conversations, and the recipe names no chats"),
        ({"needles": {"haystacks": ["hay"]}}, "there is no text 'hay'; choose of texts, repetitive"),
        ({"questions": {}}, "it needs questions, and the recipe names none"),
    ],
)
def test_objectives_that_cannot_be_made(folder, wanted, message):
    tokenizer = chat_tokenizer()
    sources = read_sources(tokenizer, texts=["texts.jsonl"], progress=False)
    with pytest.raises(ValueError, match=message):
        build_objectives(wanted, sources, tokenizer, [1, 2])


def test_objectives_without_texts_are_refused():
    tokenizer = chat_tokenizer()
    with pytest.raises(ValueError, match="objective passage: it needs documents, and the recipe has no texts"):
        build_objectives({"passage": {}}, read_sources(tokenizer), tokenizer, [1, 2])


def test_shards_are_read_as_the_texts_they_were_made_of(folder):
    tokenizer = chat_tokenizer()
    assert main(["tokenize", "texts.jsonl", "--tokenizer", "base", "--output", "shards", "--no_progress"]) == 0
    one = read_sources(tokenizer, texts=["texts.jsonl"], progress=False).texts
    other = read_sources(tokenizer, texts=["shards"], progress=False).texts
    assert one.fingerprint == other.fingerprint
    with pytest.raises(ValueError, match="one folder of shards alone"):
        read_sources(tokenizer, texts=["shards", "texts.jsonl"])


def test_a_recipe_trains_what_it_says_and_again(folder, capsys):
    """Interrupted, and run at one go: the same compressor; what no phase draws is never made."""
    recipe = write(folder)
    assert main(["train", recipe, "--output", "whole", "--held_out", "texts.jsonl", "--held_out_examples", "2"]) == 0
    shown = capsys.readouterr().out
    assert "eval_token_accuracy" in shown
    log = json.loads((folder / "whole" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    drawn = {name.removeprefix("cross_entropy_") for row in log for name in row if name.startswith("cross_entropy_")}
    assert drawn & {"reconstruction", "near"}
    assert drawn & {"questions", "passage"}
    assert main(["train", recipe, "--output", "again"]) == 0
    (folder / "again" / "checkpoint-4").rename(folder / "gone")
    assert main(["train", recipe, "--output", "again", "--resume"]) == 0
    assert equal(weights(folder / "whole"), weights(folder / "again"))
    assert main(["train", recipe, "--output", "again", "--resume", "--batch_size", "4"]) == 2
    assert "examples_per_step=2 there, 4 here" in capsys.readouterr().err
    config = json.loads((folder / "whole" / "config.json").read_text())
    assert (config["segment_length"], config["ratio"], config["adapter_only"]) == (32, 8, True)


def test_held_out_texts_are_measured_at_every_ratio_and_length(folder):
    phases = {"ratios": [4, 8], "segments": [1, 2], "objectives": "near"}
    recipe = write(folder, phases=phases, training={**SMALL["training"], "max_steps": 1})
    assert main(["train", recipe, "--output", "out", "--held_out", "texts.jsonl", "--held_out_examples", "8"]) == 0
    found = json.loads((folder / "out" / "all_results.json").read_text())
    for shape in ("r4_s1", "r4_s2", "r8_s1", "r8_s2"):
        assert 0 <= found[f"eval_token_accuracy_reconstruction_{shape}"] <= 1


def test_held_out_texts_are_measured_at_other_ratios_if_asked(folder):
    recipe, watched = read_recipe(write(folder), tiny=True), []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            watched.append(state.global_step)

    settings = TrainSettings(output="out", max_steps=2, batch_size=2)
    how = {"held_out_ratios": [16, 2], "held_out_examples": 4, "callbacks": [Watch()]}
    found = run_recipe(replace(recipe, held_out=["texts.jsonl"]), settings, **how)
    measured = {name for name in found if name.startswith("eval_token_accuracy_")}
    assert measured == {"eval_token_accuracy_reconstruction_r2_s1", "eval_token_accuracy_reconstruction_r16_s1"}
    assert watched == [1, 2]


def test_nothing_is_a_value_of_a_compressor(folder):
    """An option may be None, as the rank of full slot maps is."""
    compressor = {**SMALL["compressor"], "map_rank": None}
    assert main(["train", write(folder, compressor=compressor), "--tiny", "--output", "out"]) == 0
    assert json.loads((folder / "out" / "config.json").read_text())["scheme_options"]["map_rank"] is None


def test_what_would_fail_hours_later_is_refused_at_once(folder, capsys):
    phases = [
        {"until": 0.9, "ratios": 8, "segments": 1, "objectives": "near"},
        {"ratios": 8, "segments": 64, "objectives": "near"},
    ]
    assert main(["train", write(folder, phases=phases), "--output", "o"]) == 2
    assert "phase 2, objective near, 64 segments: no document has 2056 tokens" in capsys.readouterr().err
    compressor = {**SMALL["compressor"], "head_length": 4}
    assert main(["train", write(folder, compressor=compressor), "--output", "o"]) == 2
    assert "head_length=4 would leave the end of training contexts raw" in capsys.readouterr().err
    assert main(["train", write(folder), "--output", "o", "--device", "cpu"]) == 2
    assert "device=cpu has no effect on a recipe" in capsys.readouterr().err


def test_flags_take_the_place_of_its_values(folder):
    recipe = write(folder, training={**SMALL["training"], "seed": 3})
    assert main(["train", recipe, "--tiny", "--output", "tiny", "--max_steps", "1"]) == 0
    assert (folder / "tiny" / "checkpoint-1").is_dir()
    assert main(["train", recipe, "--tiny", "--output", "other", "--max_steps", "1", "--seed", "4"]) == 0
    assert not equal(weights(folder / "tiny"), weights(folder / "other"))


def test_settings_that_there_are_not_and_ratios_that_do_not_fit(folder, capsys):
    assert main(["train", write(folder, training={"max_step": 1}), "--output", "o"]) == 2
    assert "training has no setting max_step" in capsys.readouterr().err
    phases = {"ratios": 5, "segments": 1, "objectives": "near"}
    assert main(["train", write(folder, phases=phases), "--output", "o"]) == 2
    assert "ratios 5 do not divide segment_length=32" in capsys.readouterr().err
    phases = {"ratios": 8, "segments": 1, "objectives": "far"}
    assert main(["train", write(folder, phases=phases), "--output", "o"]) == 2
    assert "a phase draws far, and objectives are reconstruction, near" in capsys.readouterr().err
    assert main(["train", str(folder / "absent.yaml"), "--output", "o"]) == 2
    assert "absent.yaml" in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_recipes_run(file, tmp_path):
    """Their trial run, on the real base."""
    assert main(["train", str(file), "--tiny", "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 16 * 2**20


def test_held_out_texts_are_as_long_as_those_that_are_rebuilt():
    phase = {"ratios": [4, 8], "segments": 1, "objectives": ["reconstruction", "needles"]}
    phases = Phases.parse(phase | {"segments_of": {"reconstruction": [2, 4], "needles": 8}})
    assert _held_out_shapes(phases, None) == [(4, 2), (4, 4), (8, 2), (8, 4)]
    assert _held_out_shapes(phases, [16]) == [(16, 2), (16, 4)]
    phases = Phases.parse(phase | {"ratios_of": {"reconstruction": 2}})
    assert _held_out_shapes(phases, None) == [(2, 1)]
