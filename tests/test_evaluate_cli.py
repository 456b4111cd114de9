# SPDX-License-Identifier: Apache-2.0
"""rcc evaluate on a tiny model: files that it writes, several ratios, resuming, plain bases, and messages."""

import csv
import json

import pytest
import torch
import yaml
from evaluating import SENTENCES, byte_tokenizer, write_rows
from tiny import base_model, rcc_model, text_config

import rcc_hf
from rcc_hf.cli import evaluate, main
from rcc_hf.evaluation.methods import METHODS

SIZE = {"vocab_size": 260, "max_position_embeddings": 4096}
TEXT = " ".join(SENTENCES * 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, a plain base, and data."""
    root = tmp_path_factory.mktemp("evaluate")
    model = rcc_model(dtype=torch.float32, text_config=text_config(**SIZE))
    model.config.reconstruction_prompt_ids = byte_tokenizer()("\nRepeat:")["input_ids"]
    for name, saved in (("rcc", model), ("base", base_model(**SIZE))):
        saved.save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    rows = {
        "texts": [{"text": TEXT[start:]} for start in (0, 1, 40)],
        "qa": [
            {
                "context": TEXT,
                "question": f"\nAnd {name}?",
                "answer_prefix": " It is",
                "answer": [a],
                "max_new_tokens": 4,
            }
            for name, a in (("one", "red"), ("two", "blue"))
        ],
    }
    for name, lines in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def run(folder, output, task, *arguments, model="rcc"):
    """The status of a command on the CPU, and what metrics.json holds."""
    given = ["--task", task, "--output", output, "--no_progress", "--device", "cpu", *arguments]
    status = main(["evaluate", str(folder / model), *map(str, given)])
    file = output / "metrics.json"
    return status, json.loads(file.read_text()) if file.exists() else None


def test_reconstruction_of_a_file(folder, tmp_path, capsys):
    status, metrics = run(folder, tmp_path / "out", "reconstruction", "--data", folder / "texts.jsonl")
    assert status == 0
    assert metrics["bleu4"] == metrics["overall"]["bleu4"]["mean"]
    assert 0 <= metrics["bleu4"] < 0.1
    sizes = [len(TEXT) - start for start in (0, 1, 40)]
    assert metrics["text_tokens"] == sum(sizes)
    assert metrics["scored_tokens"] == sum(size - size % 16 for size in sizes)
    assert metrics | {"task": "reconstruction", "method": "rcc", "ratio": 4, "num_examples": 3} == metrics
    assert metrics["entries_per_example"] == metrics["scored_tokens"] / 3 / 4
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == ["\nRepeat:"] * 3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    guarded = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert {name: config[name] for name in guarded} == guarded
    assert guarded | {"press_name": "rcc", "compression_ratio": 0.75, "seed": 42, "dtype": "float32"} == guarded
    assert config["environment"]["versions"]["rcc_hf"] == rcc_hf.__version__
    with (tmp_path / "out" / "predictions.csv").open(encoding="utf-8", newline="") as file:
        assert next(csv.DictReader(file))["answer"] == rows[0]["answer"]
    out = capsys.readouterr().out
    assert "reconstruction, rcc, ratio 4: 3 rows" in out
    assert "bleu4" in out


def test_several_ratios_have_folders_of_their_own(folder, tmp_path):
    arguments = ("--data", folder / "qa.jsonl", "--ratio", 2, 8)
    status, metrics = run(folder, tmp_path, "qa", *arguments)
    assert status == 0
    assert metrics["ratios"] == [2, 8]
    for ratio, found in zip((2, 8), metrics["runs"], strict=True):
        assert json.loads((tmp_path / f"ratio-{ratio}" / "metrics.json").read_text()) == found
        assert found["ratio"] == ratio
        local = len(TEXT) % 16
        assert found["entries_per_example"] == (len(TEXT) - local) / ratio + local


def test_questions_among_the_documents_of_others(folder, tmp_path):
    lines = [
        {"context": f"Box {i}: {TEXT}"[:90], "question": f"\n{i}?", "answer": "-", "max_new_tokens": 2}
        for i in range(9)
    ]
    data = write_rows(tmp_path / "qa.jsonl", lines)
    status, metrics = run(folder, tmp_path / "out", "qa", "--data", data, "--context_tokens", 320)
    assert status == 0
    assert (metrics["context_tokens_per_example"], metrics["entries_per_example"]) == (320, 80)
    assert [group["length"] for group in metrics["groups"]] == [320]
    assert metrics["data"] == "qa.jsonl, 320 tokens"  # wherever the file lies
    assert run(folder, tmp_path / "no", "ruler", "--context_tokens", 320)[0] == 2


def test_short_contexts_are_compressed_whole_if_segments_are_filled(folder, tmp_path, capsys):
    arguments = ("qa", "--data", folder / "qa.jsonl", "--fill_segments")
    status, metrics = run(folder, tmp_path / "out", *arguments)
    assert status == 0
    segments = -(-len(TEXT) // 16)
    assert (metrics["entries_per_example"], metrics["context_tokens_per_example"]) == (segments * 4, len(TEXT))
    status, other = run(folder, tmp_path / "tail", *arguments, "--method", "truncate-tail")
    assert (status, other["nbytes_per_example"]) == (0, metrics["nbytes_per_example"])
    texts = ("reconstruction", "--data", folder / "texts.jsonl", "--tail", "pad")
    for method in ("rcc", "truncate-head"):
        status, padded = run(folder, tmp_path / method, *texts, "--method", method)
        sizes = [len(TEXT) - start for start in (0, 1, 40)]
        assert (status, padded["scored_tokens"]) == (0, sum(sizes))
        assert padded["entries_per_example"] == sum(-(-size // 16) * 4 for size in sizes) / 3
    assert run(folder, tmp_path / "no", "reconstruction", "--fill_segments")[0] == 2
    assert "texts to reconstruct have --tail pad" in capsys.readouterr().err


def test_a_finished_run_is_not_repeated_and_another_one_is_refused(folder, tmp_path, monkeypatch, capsys):
    arguments = ("--data", folder / "qa.jsonl", "--batch_size", 1)
    first = run(folder, tmp_path, "qa", *arguments)
    monkeypatch.setattr(METHODS["rcc"], "read", lambda *_: pytest.fail("read again"))
    assert run(folder, tmp_path, "qa", *arguments[:2]) == first
    assert run(folder, tmp_path, "qa", *arguments, "--ratio", 2)[0] == 2
    assert "ratio is 4 there, 2 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("passkey", "--lengths", 300, "--depths", 0.5, "--num_examples", 2),
        ("needles", "--lengths", 600, "--fillers", "words", "--fraction", 0.4, "--num_needles", 2, "--num_queries", 1),
        ("ruler", "--lengths", 900, "--ruler_tasks", "niah_single_1", "--num_examples", 2, "--max_new_tokens", 3),
        ("perplexity", "--data", "texts.jsonl", "--lengths", 0, 32, "--num_tokens", 8, "--num_examples", 2),
        ("cost", "--lengths", 64, "--num_tokens", 3, "--num_examples", 1),
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize("method", METHODS)
def test_every_task_runs_with_every_method(arguments, method, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    status, metrics = run(folder, tmp_path / "out", *arguments, "--method", method)
    if arguments[0] == "cost" and method.startswith("wrong"):
        assert (status, metrics) == (2, None)
        return
    assert status == 0
    assert (metrics["task"], metrics["method"]) == (arguments[0], method)
    assert metrics["groups"]


def test_a_plain_base_has_every_method_but_ours(folder, tmp_path, capsys):
    arguments = ("--data", folder / "texts.jsonl", "--segment_length", 32, "--max_new_tokens", 5)
    status, metrics = run(folder, tmp_path / "full", "reconstruction", *arguments, "--method", "full", model="base")
    assert status == 0
    assert metrics["scored_tokens"] == 15
    assert json.loads((tmp_path / "full" / "config.json").read_text())["compression_ratio"] == 0
    assert metrics["entries_per_example"] == sum((len(TEXT) - start) // 32 * 32 for start in (0, 1, 40)) / 3
    assert run(folder, tmp_path / "rcc", "reconstruction", *arguments, model="base") == (2, None)
    assert "rcc" in capsys.readouterr().err
    assert not (tmp_path / "rcc").exists()


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("passkey", ["--method", "magic"], "there is no method 'magic'; choose one of rcc"),
        ("passkey", ["--ratio", 3], "ratio=3 does not divide segment_length=16"),
        ("passkey", ["--lengths", 9], "tokens are too few"),
        ("passkey", ["--segment_length", 32], "can be set for a plain base only"),
        ("passkey", ["--chat"], "this tokenizer has none"),
        ("passkey", ["--method", "wrong", "--lengths", 300, "--depths", 0], "there is only one; give more examples"),
        ("cost", ["--method", "wrong-rcc"], "wrong-rcc costs what the method does whose reading it takes"),
        ("qa", [], "qa needs data"),
        ("qa", ["--data", "absent.jsonl"], "absent.jsonl"),
        ("reconstruction", ["--data", "qa.jsonl"], 'qa.jsonl, line 1: expected {"text": ...}'),
        ("perplexity", ["--data", "texts.jsonl", "--lengths", 9999], "no document has 10255 tokens"),
    ],
)
def test_a_wrong_command_says_what_is_wrong_and_writes_nothing(
    task, arguments, message, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(folder)
    assert run(folder, tmp_path / "out", task, *arguments) == (2, None)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_needs_no_model_is_checked_before_one_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "_load", lambda *_: pytest.fail("loaded"))
    assert main(["evaluate", "m", "--task", "benchmark", "--data", "d", "--output", "o"]) == 2
    assert "benchmark is not given" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "m", "--task", "poetry", "--output", "o"])
    assert "invalid choice: 'poetry' (choose from" in capsys.readouterr().err
