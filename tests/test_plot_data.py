# SPDX-License-Identifier: Apache-2.0
"""`rcc plot`: titles name the data, and results of other libraries stand beside ours on the same."""

import pytest
from plotted import lines, metrics, write

from rcc_hf.cli import main
from rcc_hf.plotting.figures import draw
from rcc_hf.plotting.labels import task_text
from rcc_hf.plotting.results import add_peers, read_results

GROUP = {"length": 64, "depth": 0.5, "num_examples": 50, "f1": {"mean": 0.5}}


@pytest.mark.parametrize(
    ("task", "data", "text"),
    [
        ("benchmark", "longbench/data/longbench/hotpotqa", "LongBench, hotpotqa"),
        ("benchmark", "infinitebench/org/set/kv_retrieval+passkey", "InfiniteBench, kv_retrieval, passkey"),
        ("benchmark", "kvpress/org/ruler/4096", "Benchmark, 4096"),
        ("qa", "nq/data/qa_eval.jsonl", "Question answering, qa_eval"),
        ("qa", "nq/data/qa_eval.jsonl, 2048 tokens", "Question answering, qa_eval, 2048 tokens"),
        ("qa", None, "Question answering"),
    ],
)
def test_titles_name_the_data(task, data, text, tmp_path):
    assert task_text(task, data) == text
    write(tmp_path, metrics(task, "rcc", 8, data=data, nbytes_per_example=8, groups=[GROUP]))
    figures = draw(read_results([tmp_path]))
    assert len(figures) == 3
    assert all(figure.get_suptitle().startswith(f"{text}: ") for figure in figures.values())


def peer(ratio, **more):
    return metrics("qa", "kvzip", ratio, 0.3, model="elsewhere", nbytes_per_example=2**24 / ratio, **more)


def test_peers_stand_by_the_results_of_their_task(tmp_path, capsys):
    data = {"data": "nq/qa.jsonl, 2048 tokens"}
    write(tmp_path / "ours", *(metrics("qa", "rcc", ratio, 0.4, **data) for ratio in (8, 16)))
    write(tmp_path / "peers", peer(8), peer(16))
    results = add_peers(read_results([tmp_path / "ours"]), [tmp_path / "peers"])
    figure = draw(results, kind="ratio")["ratio-qa-qa.jsonl-2048-tokens-f1"]
    assert lines(figure.axes[0]) == {"RCC (ours)": ([8, 16], [0.4, 0.4]), "kvzip": ([8, 16], [0.3, 0.3])}
    arguments = ["plot", tmp_path / "ours", "--peers", tmp_path / "peers", "--output", tmp_path / "out"]
    assert main(list(map(str, arguments))) == 0
    assert "results  4" in capsys.readouterr().out
    assert (tmp_path / "out" / "ratio-qa-qa.jsonl-2048-tokens-f1.png").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"task": "ruler"}, "is of task 'ruler'; the results that it could stand by are of qa"),
        ({"data": "other"}, "is of task 'qa'; the results that it could stand by are of qa"),
        ({}, "names no data, and the results of 'qa' are on one, two; give some"),
        ({"data": "one", "num_examples": 7}, r"has 7 examples, the results of 'qa' \{50\}"),
    ],
)
def test_peers_that_stand_nowhere_are_refused(content, message, tmp_path):
    write(tmp_path / "one", metrics("qa", "rcc", 8, data="one"))
    write(tmp_path / "two", metrics("qa", "rcc", 8, data="two"))
    write(tmp_path / "peers", peer(8) | content)
    with pytest.raises(ValueError, match=message):
        add_peers(read_results([tmp_path / "one", tmp_path / "two"]), [tmp_path / "peers"])
