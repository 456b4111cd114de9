# SPDX-License-Identifier: Apache-2.0
"""A training's output becomes a folder that can be shipped, and its card says what was measured."""

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from plotted import metrics, write
from safetensors.torch import load_file, save_file
from shipping_tiny import trained_output

from rcc_hf.checkpoints import load_model, load_tokenizer
from rcc_hf.cli import main
from rcc_hf.shipping import faults, pack, read_facts, result_tables
from rcc_hf.shipping.facts import check_steps

CARDS = Path(__file__).parent.parent / "examples" / "cards"
FACTS = {
    "title": "A tiny compressor",
    "summary": "Reads bytes.",
    "base_model": "org/base",
    "license": "apache-2.0",
    "recipe": "recipes/tiny.yaml",
    "steps": 3100,
    "source_tokens": 250_000_000,
    "gpu_minutes": 29.5,
    "hardware": "4 x H200",
    "data": [
        {"name": "books", "license": "public domain", "use": "75 M tokens", "url": "https://example.org/books"},
        {"name": "questions", "license": "CC-BY-4.0", "use": "500 rows", "hub": "org/questions"},
    ],
    "limits": ["It knows bytes only."],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return trained_output(tmp_path_factory.mktemp("shipping"))


@pytest.fixture
def tiny(trained, monkeypatch):
    """The output of a training whose base is found as the bundled one is."""
    base, folder = trained
    monkeypatch.setattr("rcc_hf.smollm.smollm2_path", lambda *_, **__: base)
    return folder


@pytest.fixture
def ship():
    file = Path(__file__).parent.parent / "examples" / "ship_checkpoint.py"
    spec = importlib.util.spec_from_file_location("ship_checkpoint", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def facts(tmp_path):
    file = tmp_path / "facts.yml"
    file.write_text(yaml.safe_dump(FACTS))
    return file


def test_a_packed_folder_has_no_faults_and_the_same_weights(tiny, tmp_path):
    (told, left) = faults(tiny)
    assert told.startswith("its base lies at /")
    assert "all_results.json, checkpoint-3100, mixture.json, training_args.bin are of its training" in left
    pack(tiny, tmp_path / "out" / "tiny", card="# Card\n")
    packed = tmp_path / "out" / "tiny"
    assert faults(packed) == []
    assert [file.name for file in packed.parent.iterdir()] == ["tiny"]
    assert (packed / "README.md").read_text() == "# Card\n"
    old, new = (load_file(folder / "model.safetensors") for folder in (tiny, packed))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    config = json.loads((packed / "config.json").read_text())
    assert (config["base_model_name_or_path"], config["use_cache"]) == ("smollm2", True)
    ids = load_tokenizer(load_model(str(packed)), str(packed))("a b", return_tensors="pt")["input_ids"]
    assert torch.equal(load_model(str(packed))(ids).logits, load_model(str(tiny))(ids).logits)


def test_faults_are_told(tiny, tmp_path):
    pack(tiny, tmp_path / "own")
    file = tmp_path / "own" / "config.json"
    config = json.loads(file.read_text())
    for name in ("base_model_name_or_path", "text_config"):
        place = {"_name_or_path": "/home/me/base"} if name == "text_config" else "/home/me/base"
        file.write_text(json.dumps({**config, name: place}))
        assert faults(tmp_path / "own") == ["its base lies at /home/me/base, on one machine; name it"]
    (tmp_path / "own" / "optimizer.pt").write_bytes(b"")
    (tmp_path / "own" / "memory.py").write_text("# changed\n")
    file.write_text(json.dumps({**config, "base_fingerprint": None}))
    told = faults(tmp_path / "own", most_bytes=1000)
    assert [line.split()[0] for line in told] == ["it", "optimizer.pt", "its", "its"]
    assert "memory.py" in told[2]


def test_what_cannot_be_packed_is_refused_and_leaves_nothing(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be shipped: its weights have \d+ bytes, at most 1000 are shipped"):
        pack(tiny, tmp_path / "out", most_bytes=1000)
    other = shutil.copytree(tiny, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: t.to(torch.float64) for name, t in weights.items()}, other / "model.safetensors")
    with pytest.raises(ValueError, match=r"the weights of .*other are not those that would be shipped"):
        pack(other, tmp_path / "out")
    file = other / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_fingerprint": "0" * 16}))
    with pytest.raises(ValueError, match=r"trained on a base with the fingerprint 0{16}; that of smollm2 is"):
        pack(other, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["other"]
    with pytest.raises(ValueError, match="other exists; remove it"):
        pack(tiny, other)


def test_the_card_has_the_numbers_of_the_metrics_files(tiny, ship, facts, tmp_path, capsys):
    lengths = [
        {"length": n, "num_examples": 25, "bleu4": {"mean": b, "stderr": 0.01}} for n, b in ((512, 0.9), (1024, 0.7))
    ]
    write(
        tmp_path / "results",
        metrics("reconstruction", "rcc", 8, 0.8, "bleu4", groups=lengths, nbytes_per_example=2_900_000),
        metrics("qa", "rcc", 32, 0.412, data="nq/qa.jsonl"),
        metrics("qa", "truncate-head", 32, 0.123, data="nq/qa.jsonl"),
        metrics("qa", "full", 32, 0.5, data="nq/qa.jsonl"),
        metrics("passkey", "rcc", 32, 0.95, "accuracy"),
        metrics("perplexity", "rcc", 32) | {"overall": {"perplexity": {"mean": 37.25, "stderr": 1.44}}},
        metrics("cost", "rcc", 32) | {"overall": {}},
    )
    ship([str(tiny), str(tmp_path / "out"), "--facts", str(facts), "--results", str(tmp_path / "results")])
    assert "model.safetensors" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "**Reconstruction**: BLEU-4 by tokens of context; 50 examples.\n\n| method | 512 | 1K | all | MB kept |" in card
    )
    for row in (
        "| RCC (ours) 8x | 0.900 | 0.700 | 0.800 ± 0.020 | 2.9 |",
        "| RCC (ours) 32x | 0.412 ± 0.020 |  |",
        "| full context | 0.500 ± 0.020 |  |",
        "| truncate-head 32x | 0.123 ± 0.020 |  |",
        "| RCC (ours) 32x | 0.950 ± 0.020 |  |",
        "| RCC (ours) 32x | 37.2 ± 1.4 |  |",
        "| GPU minutes | 29.5 (4 x H200) |",
        "| [books](https://example.org/books) | 75 M tokens | public domain |",
    ):
        assert row in card
    header = yaml.safe_load(card.split("---\n")[1])
    assert (header["base_model"], header["license"]) == ("org/base", "apache-2.0")
    assert header["datasets"] == ["org/questions"]
    assert {"rcc", "context-compression"} <= set(header["tags"])
    assert str(tmp_path) not in re.sub(re.escape(str(tmp_path / "out")), "", card)


def test_what_the_card_shows_runs(tiny, ship, facts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ship([str(tiny), "shipped/tiny", "--facts", str(facts)])
    card = (tmp_path / "shipped/tiny/README.md").read_text()
    shutil.copy("shipped/tiny/README.md", "README.md")
    (python,), (console,) = (re.findall(rf"^```{name}\n(.*?)^```", card, re.M | re.S) for name in ("python", "console"))
    names = {}
    exec(compile(python, "card", "exec"), names)  # our own text
    assert names["memory"].num_slots > 0
    assert names["answer"].shape[1] > names["question"].shape[1]
    commands = [shlex.split(line)[1:] for line in console.splitlines() if line.startswith("rcc ")]
    assert [arguments[0] for arguments in commands] == ["compress", "generate"]
    for arguments in commands:
        assert main(arguments) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": None}, "steps is None; expected a number above 0"),
        ({"author": "me"}, "unknown: author. The fields are title, "),
        ({"data": [{"name": "books"}]}, "data: missing: license, use"),
        ({"tags": "one"}, "tags is 'one'; expected a list"),
    ],
)
def test_facts_that_are_none_are_refused(change, message, tmp_path):
    (tmp_path / "facts.yml").write_text(yaml.safe_dump({**FACTS, **change}))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_facts(tmp_path / "facts.yml")


def test_facts_of_another_training_are_refused(tiny, ship, tmp_path):
    (tmp_path / "facts.yml").write_text(yaml.safe_dump({**FACTS, "steps": 3000}))
    with pytest.raises(ValueError, match=r"mixture.json says 3100 steps, and the facts say 3000"):
        ship([str(tiny), str(tmp_path / "out"), "--facts", str(tmp_path / "facts.yml")])


def test_facts_of_a_checkpoint_in_the_midst_are_refused(tmp_path):
    (tmp_path / "facts.yml").write_text(yaml.safe_dump(FACTS))
    facts = read_facts(tmp_path / "facts.yml")
    check_steps(facts, tmp_path)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": facts.steps - 1}))
    with pytest.raises(ValueError, match=r"trainer_state.json says"):
        check_steps(facts, tmp_path)


def test_results_without_a_metric_make_no_table(tmp_path):
    write(tmp_path, metrics("cost", "rcc", 32) | {"overall": {}})
    assert result_tables([tmp_path]) == ""


@pytest.mark.parametrize("file", sorted(CARDS.glob("*.yaml")), ids=lambda file: file.stem)
def test_facts_of_cards_that_are_shipped_can_be_read(file):
    facts = read_facts(file)
    assert (CARDS.parents[1] / facts.recipe).exists()
    assert all(source.license for source in facts.data)
