# SPDX-License-Identifier: Apache-2.0
"""Examples and their files, and the folder of a run."""

import csv
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

import rcc_hf
from rcc_hf.evaluation.examples import Example, read_examples, write_examples
from rcc_hf.evaluation.outputs import RunFolder, folder_name

CONFIG = {
    "dataset": "ruler",
    "seed": 42,
    "rate": 1e-05,
    "fraction": 1.0,
    "model_kwargs": {"dtype": "auto"},
    "dir": None,
}


def example(number=0, **changes):
    fields = {
        "context": f"The key is {number}.\n",
        "question": "What is the key?\u2028é",
        "answer_prefix": "The key is",
        "answer": ("5", "five"),
        "max_new_tokens": 8,
        "task": "keys",
        "metric": "squad",
        "metadata": {"length": 12, "depth": 0.5},
    }
    return Example(**fields | changes)


def test_examples_survive_their_file(tmp_path):
    written = [example(), example(1, answer="5", metadata={})]
    assert write_examples(tmp_path / "x.jsonl", written) == 2
    assert read_examples(tmp_path / "x.jsonl") == written
    assert (tmp_path / "x.jsonl").read_text(encoding="utf-8").count("\n") == 2


def test_a_row_of_kvpress_is_an_example_and_other_columns_are_metadata():
    row = {"context": "c", "question": "q", "answer_prefix": "a", "answer": ["x"], "max_new_tokens": 3, "length": 9}
    made = Example.from_row(row)
    assert (made.answers, made.metadata, made.task) == (("x",), {"length": 9}, "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 3}, r"context is '3' \(int\); it must be a string"),
        ({"answer": []}, r"answer is .*a string or a list of strings, none of them empty"),
        ({"answer": ["a", ""]}, r"answer is .*none of them empty"),
        ({"answer": ""}, r"answer is .*none of them empty"),
        ({"max_new_tokens": 0}, r"max_new_tokens is '0' .*positive integer"),
        ({"max_new_tokens": True}, r"max_new_tokens is 'True' .*positive integer"),
        ({"metadata": [1]}, r"metadata is .*a dictionary"),
    ],
)
def test_an_invalid_line_names_file_line_and_field(tmp_path, change, message):
    rows = [example().to_row(), {**example().to_row(), **change}]
    (tmp_path / "x.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 3: {message}"):
        read_examples(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"context": "c", "question": "q"}', "line 1: answer, max_new_tokens missing; found context, question"),
        ("{broken", "line 1: no JSON"),
        ("[1]", "line 1: expected an object"),
        ("\n", "holds no examples"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, text, message):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / "x.jsonl")


def test_the_folder_has_the_name_that_kvpress_gives():
    assert folder_name("ruler", data_dir="4096", model="org/model", method="rcc", compression_ratio=0.9375) == (
        "ruler__4096__org--model__rcc__0.94"
    )
    long = folder_name(
        "loogle", model="m", method="rcc", compression_ratio=0.5, fraction=0.1, max_context_length=99, query_aware=True
    )
    assert long == "loogle__m__rcc__0.50__fraction0.100__max_context99__query_aware"
    with pytest.raises(ValueError, match=r"compression_ratio is 16.*1 - 1/r"):
        folder_name("ruler", model="m", method="rcc", compression_ratio=16)


def test_a_run_goes_on_where_it_was(tmp_path):
    examples = [example(i) for i in range(4)]
    with RunFolder(tmp_path / "run", CONFIG) as run:
        assert run.remaining(examples) == [0, 1, 2, 3]
        run.add(2, examples[2], "five", compression_ratio=0.75)
        run.add(0, examples[0], "4\n")
        assert run.remaining(examples) == [1, 3]  # flushed, though the file is still open
    # what a killed process had written of its next row
    with (tmp_path / "run" / "predictions.jsonl").open("ab") as file:
        file.write('{"index": 1, "predicted_answer": "é'.encode()[:-1])
    with RunFolder(tmp_path / "run", dict(reversed(CONFIG.items()))) as run:
        assert run.remaining(examples) == [1, 3]
        run.add(1, examples[1], "b")
        run.add(3, examples[3], "c")
        rows = run.merge()
    assert [row["predicted_answer"] for row in rows] == ["4\n", "b", "five", "c"]
    lines = (tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line) for line in lines] == rows
    assert "context" not in rows[0]
    assert rows[2] | {"question": examples[2].question, "answer": ["5", "five"], "compression_ratio": 0.75} == rows[2]


def test_a_killed_process_loses_nothing(tmp_path):
    # The package's own __init__ is left out: its imports take seconds.
    code = """
        import os, signal, sys, types
        sys.modules["rcc_hf"] = types.ModuleType("rcc_hf")
        sys.modules["rcc_hf"].__path__ = [sys.argv[2]]
        from rcc_hf.evaluation.examples import Example
        from rcc_hf.evaluation.outputs import RunFolder
        run = RunFolder(sys.argv[1], {})
        for index in range(3):
            run.add(index, Example(context=str(index), question="q", answer="a", max_new_tokens=1), "p")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    package = Path(rcc_hf.__file__).parent
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path, package], check=False)
    assert done.returncode == -9
    asked = [Example(context=str(index), question="q", answer="a", max_new_tokens=1) for index in range(4)]
    with RunFolder(tmp_path, {}) as run:
        assert run.remaining(asked) == [3]


def test_several_processes_share_a_folder(tmp_path):
    examples = [example(i) for i in range(4)]
    for rank in (0, 1):
        with RunFolder(tmp_path, CONFIG, process_index=rank) as run:
            for index in range(rank, 4, 2):
                run.add(index, examples[index], f"by {rank}")
    with RunFolder(tmp_path, CONFIG) as run:
        assert run.remaining(examples) == []
        assert [row["predicted_answer"] for row in run.merge()] == ["by 0", "by 1", "by 0", "by 1"]
        assert run.remaining(examples) == []
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "predictions.jsonl"]


def test_other_settings_are_refused_with_both_values(tmp_path):
    RunFolder(tmp_path, CONFIG)
    other = {**CONFIG, "seed": 43, "new": "x"}
    del other["dir"]
    with pytest.raises(ValueError, match=r"seed is 42 there, 43 here; dir is null there, absent here; new is absent"):
        RunFolder(tmp_path, other)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "predictions.jsonl").touch()
    with pytest.raises(ValueError, match=r"predictions but no config\.yaml"):
        RunFolder(tmp_path, CONFIG)


def test_other_data_are_refused(tmp_path):
    with RunFolder(tmp_path, CONFIG) as run:
        run.add(1, example(1), "p")
        with pytest.raises(ValueError, match=r"prediction 1 .*another example"):
            run.remaining([example(0), example(2)])
        with pytest.raises(ValueError, match=r"prediction 1 .*another example"):
            run.remaining([example(0)])


def test_the_files_are_those_of_kvpress(tmp_path):
    with RunFolder(tmp_path, CONFIG) as run:
        run.add(0, example(), 'a "quoted"\nanswer', compression_ratio=0.9375)
        run.write_csv()
        run.write_metrics({"keys": {"f1": 0.5}})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8")) == CONFIG
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == {"keys": {"f1": 0.5}}
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["predicted_answer"], row["compression_ratio"]) == ('a "quoted"\nanswer', "0.9375")
    kvpress = {"question", "answer_prefix", "answer", "max_new_tokens", "task", "predicted_answer", "compression_ratio"}
    assert set(row) == kvpress
