# SPDX-License-Identifier: Apache-2.0
"""The evaluation harness: a perfect reader gets everything, a broken one nothing, and a killed run goes on."""

import json
import threading
from dataclasses import dataclass, replace

import pytest
from evaluating import TASKS, Broken, Perfect, build, byte_tokenizer, rows_of, run
from tiny import base_model, rcc_model, tokenizer, words
from tiny import tokens as random_ids

from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.methods import METHODS, make_method
from rcc_hf.evaluation.outputs import RunFolder
from rcc_hf.evaluation.processes import Processes
from rcc_hf.evaluation.runner import cut_batches, evaluate, find_stop_ids
from rcc_hf.evaluation.tasks import GROUP_BY

STABLE = ("index", "fingerprint", "predicted_answer", "context_tokens", "entries", "nbytes", "compression_ratio")


@pytest.fixture(scope="module")
def letters():
    return byte_tokenizer()


@pytest.mark.parametrize("task", TASKS)
def test_a_perfect_reader_gets_everything_and_a_broken_one_nothing(task, letters, tmp_path):
    settings, names = TASKS[task]
    examples, encode = build(task, letters, tmp_path, **settings)
    for method, expected in ((Perfect(letters), 1.0), (Broken(letters), 0.0)):
        about = {"task": task, "method": method.name, "model": "none", "ratio": 1}
        folder = tmp_path / method.name
        metrics = run(method, examples, encode, folder, group_by=GROUP_BY[task], about=about)
        assert metrics == json.loads((folder / "metrics.json").read_text())
        for name in names:
            # texts of the same letters are never entirely different
            slack = 0.3 if name == "edit_similarity" else 0.03 if name == "bleu4" else 0
            assert (
                metrics[name] == metrics["overall"][name]["mean"] == pytest.approx(expected, abs=slack * (1 - expected))
            )
            assert {group[name]["mean"] for group in metrics["groups"]} == {1.0} or expected == 0
        assert metrics["num_examples"] == len(examples) == sum(group["num_examples"] for group in metrics["groups"])
        assert metrics | about == metrics
        assert (
            metrics["nbytes_per_example"]
            == 4 * metrics["entries_per_example"]
            == 4 * metrics["context_tokens_per_example"]
        )


def test_groups_are_the_cells_of_the_grid_in_order(letters, tmp_path):
    examples, encode = build("passkey", letters, tmp_path, lengths=[900, 400], depths=[1.0, 0.5], num_examples=2)
    metrics = run(Perfect(letters), examples, encode, tmp_path / "run", group_by=GROUP_BY["passkey"])
    cells = [(group["length"], group["depth"], group["num_examples"]) for group in metrics["groups"]]
    assert cells == [(400, 0.5, 2), (400, 1.0, 2), (900, 0.5, 2), (900, 1.0, 2)]
    assert metrics["tasks"]["passkey_repetitive_number"]["accuracy"] == 1.0
    assert "stderr" in metrics["groups"][0]["accuracy"]


def test_questions_about_one_context_share_its_reading(letters, tmp_path):
    examples, encode = build("qa", letters, tmp_path)
    method = Perfect(letters)
    run(method, examples, encode, tmp_path / "run", batch_size=8)
    assert (len(method.read_batches), len(method.read_batches[0]), method.asked) == (1, 2, 4)
    method = Perfect(letters)
    run(method, examples, encode, tmp_path / "one", batch_size=1)
    assert ([len(batch) for batch in method.read_batches], method.asked) == ([1, 1], 4)


class Killed(Exception):
    pass


class Dying(Perfect):
    """Ends the process after so many calls."""

    def __init__(self, tokenizer, calls):
        super().__init__(tokenizer)
        self.calls = calls

    def generate(self, *arguments, **options):
        self.calls -= 1
        if self.calls < 0:
            raise Killed
        return super().generate(*arguments, **options)


def test_a_killed_run_goes_on_and_asks_nothing_twice(letters, tmp_path):
    examples, encode = build("passkey", letters, tmp_path, lengths=[300, 600])
    with pytest.raises(Killed):
        run(Dying(letters, 3), examples, encode, tmp_path / "run", batch_size=2)
    finished = rows_of(tmp_path / "run")
    assert len(finished) == 6
    assert not (tmp_path / "run" / "metrics.json").exists()
    # what was being written when it ended
    with (tmp_path / "run" / "predictions.jsonl").open("a") as file:
        file.write('{"index": 7, "predicted')
    method = Perfect(letters)
    metrics = run(method, examples, encode, tmp_path / "run", batch_size=2)
    assert (method.asked, metrics["accuracy"], metrics["num_examples"]) == (4, 1.0, 10)
    rows = rows_of(tmp_path / "run")
    assert [row["index"] for row in rows] == list(range(10))
    assert [row for row in rows if row["index"] in {done["index"] for done in finished}] == sorted(
        finished, key=lambda row: row["index"]
    )
    again = Perfect(letters)
    assert run(again, examples, encode, tmp_path / "run") == metrics
    assert again.asked == 0


def test_settings_and_data_of_another_run_are_refused(letters, tmp_path):
    examples, encode = build("passkey", letters, tmp_path, lengths=[300])
    run(Perfect(letters), examples, encode, tmp_path / "run", config={"seed": 1})
    with pytest.raises(ValueError, match="seed is 1 there, 2 here"):
        run(Perfect(letters), examples, encode, tmp_path / "run", config={"seed": 2})
    others, _ = build("passkey", letters, tmp_path, lengths=[300], seed=7)
    with pytest.raises(ValueError, match="the data have changed"):
        run(Perfect(letters), others, encode, tmp_path / "run", config={"seed": 1})


@dataclass(frozen=True)
class Threads(Processes):
    """Threads in the place of processes."""

    barrier: threading.Barrier | None = None

    def wait(self):
        self.barrier.wait(30)


def test_processes_share_the_work_and_the_first_one_joins_it(letters, tmp_path):
    examples, encode = build("passkey", letters, tmp_path, lengths=[300, 500], num_examples=2)
    with pytest.raises(Killed):
        run(Dying(letters, 1), examples, encode, tmp_path / "run", batch_size=3)
    methods, found, barrier = [Perfect(letters) for _ in range(3)], {}, threading.Barrier(3)

    def work(index):
        found[index] = run(
            methods[index], examples, encode, tmp_path / "run", batch_size=2, processes=Threads(index, 3, None, barrier)
        )

    threads = [threading.Thread(target=work, args=[index]) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(method.asked for method in methods) == [5, 6, 6]
    assert (found[1], found[2]) == ({}, {})
    assert found[0]["num_examples"] == 20
    assert [row["index"] for row in rows_of(tmp_path / "run")] == list(range(20))
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        "config.yaml", "metrics.json", "predictions.csv", "predictions.jsonl",
    }  # fmt: skip


# controls read whatever context stands beside one in the batch
@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("wrong")])
def test_predictions_depend_neither_on_the_batch_nor_on_the_run(name, tmp_path):
    model, text = rcc_model(), tokenizer()
    method = make_method(name, model, 4)
    examples = [
        Example(
            context=words(random_ids(1, length, seed=length)[0]),
            question=words(random_ids(1, 3 + place, seed=place)[0]),
            answer=words(random_ids(1, 2)[0]),
            max_new_tokens=4 + place,
            task="t",
            metric="squad",
        )
        for length in (16, 20, 37, 64)
        for place in (0, 1)
    ]
    found = {}
    for size in (1, 3, 8):
        with RunFolder(tmp_path / str(size), {}) as folder:
            evaluate(model, text, examples, method, folder, batch_size=size, stop_ids=frozenset({2}), progress=False)
        found[size] = [{name: row[name] for name in STABLE} for row in rows_of(tmp_path / str(size))]
    assert found[1] == found[3] == found[8]
    assert any(row["predicted_answer"] for row in found[1])
    entries = {"full": [16, 20, 37, 64], "none": [0, 0, 0, 0]}.get(name, [4, 8, 13, 16])
    assert [row["entries"] for row in found[1]] == [size for size in entries for _ in (0, 1)]
    assert found[1][2]["compression_ratio"] == pytest.approx(1 - entries[1] / 20)
    lengths = [len(text(row["predicted_answer"])["input_ids"]) for row in found[1]]
    assert all(length <= 4 + place for length, place in zip(lengths, [0, 1] * 4, strict=True))


def test_batches_hold_neither_too_many_contexts_nor_too_many_tokens():
    sizes = {0: 50, 1: 30, 2: 30, 3: 9, 4: 8, 5: 8, 6: 8}
    units = [[index] for index in sizes]
    cut = list(cut_batches(units, lambda unit: sizes[unit[0]], 3, 60))
    assert cut == [[[0]], [[1], [2]], [[3], [4], [5]], [[6]]]
    with pytest.raises(ValueError, match="batch_size is 0"):
        list(cut_batches(units, len, 0, 1))


def test_metrics_are_checked_before_the_model_works(letters, tmp_path):
    examples, encode = build("qa", letters, tmp_path, metric="beauty")
    method = Perfect(letters)
    with pytest.raises(ValueError, match="metric 'beauty'; it must be one of"):
        run(method, examples, encode, tmp_path / "run")
    with pytest.raises(ValueError, match="no examples"):
        run(method, [], encode, tmp_path / "run")
    assert method.read_batches == []


def test_answers_end_where_the_model_or_the_tokenizer_says(letters):
    model = base_model()
    assert find_stop_ids(model, letters) == {2, 256}
    model.generation_config.eos_token_id = [5, 6]
    assert find_stop_ids(model, letters) == {5, 6, 256}


def test_examples_of_several_metrics_are_averaged_by_name(letters, tmp_path):
    examples, encode = build("qa", letters, tmp_path)
    mixed = [replace(example, metric="exact_match", task="other") for example in examples[:1]] + examples[1:]
    metrics = run(Perfect(letters), mixed, encode, tmp_path / "run")
    assert metrics["overall"]["exact_match"]["mean"] == 1.0
    assert [group["task"] for group in metrics["groups"]] == ["other", "qa"]
