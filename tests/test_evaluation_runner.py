# SPDX-License-Identifier: Apache-2.0
"""The evaluation harness: a perfect reader gets everything, a broken one nothing, and a killed run goes on."""

import json
import math
import random
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from evaluating import SENTENCES, Broken, Perfect, byte_tokenizer
from tiny import base_model, rcc_model, tokenizer, words
from tiny import tokens as random_ids

from rcc_hf.evaluation.cost import cost_examples, evaluate_cost
from rcc_hf.evaluation.encoding import TextEncoder
from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.methods import METHODS, make_method
from rcc_hf.evaluation.outputs import RunFolder
from rcc_hf.evaluation.passages import ReconstructionEncoder
from rcc_hf.evaluation.perplexity import continuations, evaluate_perplexity
from rcc_hf.evaluation.processes import Processes
from rcc_hf.evaluation.runner import cut_batches, evaluate, find_stop_ids
from rcc_hf.evaluation.tasks import GROUP_BY, TaskSettings, build_examples
from rcc_hf.objectives import RECONSTRUCTION_PROMPT

TEXT = "It was a bright cold day, and the clocks were striking; number {} went home. Nobody spoke until {} o'clock."
STABLE = ("index", "fingerprint", "predicted_answer", "context_tokens", "entries", "nbytes", "compression_ratio")


@pytest.fixture(scope="module")
def letters():
    return byte_tokenizer()


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def texts_file(folder, count=4, length=700):
    generator = random.Random(0)
    made = []
    for _ in range(count):
        text = ""
        while len(text) < length:
            text += TEXT.format(generator.randrange(10**6), generator.randrange(10**6)) + " "
        made.append({"text": text})
    return write_rows(folder / "texts.jsonl", made)


def questions_file(folder):
    context = " ".join(SENTENCES)
    rows = [
        {"question": f"\nWhat is the colour of box {name}?", "answer": [colour], "context": context + " " * extra}
        for extra in (0, 3)
        for name, colour in (("one", "red"), ("two", "blue"))
    ]
    return write_rows(folder / "qa.jsonl", [{"max_new_tokens": 8, "answer_prefix": " It is", **row} for row in rows])


def build(task, letters, tmp_path, **settings):
    """Examples of a task and their encoder."""
    if task == "reconstruction":
        settings.setdefault("data", texts_file(tmp_path))
    if task == "qa":
        settings.setdefault("data", questions_file(tmp_path))
    made = TaskSettings(**settings)
    examples = build_examples(task, letters, made, segment_length=64, prompt=RECONSTRUCTION_PROMPT)
    if task == "reconstruction":
        prompt_ids = letters(RECONSTRUCTION_PROMPT)["input_ids"]
        return examples, ReconstructionEncoder(letters, prompt_ids, letters.eos_token_id)
    return examples, TextEncoder(letters)


def run(method, examples, encode, path, **options):
    options = {"progress": False, "config": {}} | options
    with RunFolder(path, options.pop("config"), process_index=options.get("processes", Processes()).index) as folder:
        return evaluate(method.model, method.tokenizer, examples, method, folder, encode=encode, **options)


TASKS = {
    "reconstruction": ({}, ("bleu4", "exact_match", "edit_similarity")),
    "passkey": (
        {"lengths": [400, 900], "fillers": ["repetitive", "words"], "key_types": ["number", "uuid"]},
        ("accuracy",),
    ),
    "needles": ({"lengths": [900], "key_types": ["uuid"], "num_needles": 3, "num_queries": 2}, ("string_match",)),
    "ruler": (
        {"lengths": [1500], "ruler_tasks": ["niah_single_1", "niah_multikey_2", "niah_multikey_3"], "num_examples": 2},
        ("string_match",),
    ),
    "qa": ({}, ("exact_match", "f1")),
}  # fmt: skip


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


def rows_of(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


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


def test_a_fraction_is_a_part_of_the_same_examples(letters, tmp_path):
    grid = {"lengths": [300, 400, 500], "fillers": ["words"], "num_examples": 2}
    whole, _ = build("passkey", letters, tmp_path, **grid)
    part, _ = build("passkey", letters, tmp_path, **grid, fraction=0.2)
    assert len(whole) == 30
    assert len(part) == 6
    assert [example for example in whole if example in part] == part
    one, _ = build("qa", letters, tmp_path, fraction=0.01)
    assert len(one) == 1
    two, _ = build("qa", letters, tmp_path, num_examples=2)
    assert len(two) == 2


def test_seeds_fix_the_examples(letters, tmp_path):
    for task, settings in TASKS.items():
        first, second = (build(task, letters, tmp_path, **settings[0])[0] for _ in range(2))
        assert first == second, task
    other, _ = build("passkey", letters, tmp_path, **TASKS["passkey"][0], seed=1)
    assert other != build("passkey", letters, tmp_path, **TASKS["passkey"][0])[0]


@pytest.mark.parametrize(("tail", "read", "scored"), [("cut", 128, 128), ("raw", 150, 150), ("pad", 192, 150)])
def test_what_is_behind_the_last_segment(tail, read, scored, letters, tmp_path):
    data = write_rows(tmp_path / "x.jsonl", [{"text": ("é" + TEXT * 2)[:149]}])
    examples, encode = build("reconstruction", letters, tmp_path, data=data, tail=tail)
    ids, prompt = encode(examples[0])
    assert letters.decode(prompt) == RECONSTRUCTION_PROMPT
    assert len(ids) == examples[0].metadata["length"] == read
    assert ids[scored:].tolist() == [letters.eos_token_id] * (read - scored)
    method = Perfect(letters)
    metrics = run(method, examples, encode, tmp_path / "run", group_by=GROUP_BY["reconstruction"])
    assert (metrics["bleu4"], metrics["exact_match"]) == (1.0, 1.0)
    assert (metrics["text_tokens"], metrics["scored_tokens"]) == (150, scored)
    assert metrics["groups"][0]["length"] == read


def test_passages_are_cut_from_documents(letters, tmp_path):
    data = texts_file(tmp_path, count=3)
    settings = {"data": data, "lengths": [64, 128], "num_examples": 5}
    examples, encode = build("reconstruction", letters, tmp_path, **settings)
    assert [len(encode(example)[0]) for example in examples] == [64] * 5 + [128] * 5
    documents = [row["text"] for row in map(json.loads, Path(data).read_text().splitlines())]
    assert all(any(example.answer in document for document in documents) for example in examples)
    assert len({example.answer for example in examples}) == 10
    with pytest.raises(ValueError, match="length 100 is no whole number of segments of 64"):
        build("reconstruction", letters, tmp_path, data=data, lengths=[100])
    with pytest.raises(ValueError, match=r"no document has 6432 tokens, the longest has \d+"):
        build("reconstruction", letters, tmp_path, data=data, lengths=[6400])


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("poetry", {}, "task is 'poetry'; it must be one of reconstruction, passkey"),
        ("perplexity", {}, "perplexity is not made of examples"),
        ("qa", {"data": None}, "qa needs data: JSON lines with context, question"),
        ("qa", {"rows": [{"context": "c", "question": "q"}]}, r"rows\.jsonl, line 1: answer, max_new_tokens missing"),
        ("benchmark", {"data": "x"}, "benchmark is not given; it must be one of longbench"),
        ("reconstruction", {"rows": [{"content": "", "id": 3}]}, r'line 1: expected {"text": \.\.\.}.*found content'),
        ("reconstruction", {"rows": [{"text": "abc"}]}, r"rows\.jsonl, line 1: the text has 3 tokens, less than a seg"),
        ("reconstruction", {"data": "absent.jsonl"}, r"there is no file absent\.jsonl"),
        ("reconstruction", {"data": "absent"}, "absent is neither a file"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(task, settings, message, letters, tmp_path):
    if "rows" in settings:
        settings = {"data": write_rows(tmp_path / "rows.jsonl", settings["rows"])}
    with pytest.raises(ValueError, match=message):
        build_examples(task, letters, TaskSettings(**settings), segment_length=64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 0}, "fraction is 0; it must be above 0"),
        ({"num_examples": 0}, "num_examples is 0; it must be at least 1"),
        ({"fillers": ["words", "poems"]}, "fillers has poems; choose of repetitive, words, books"),
        ({"key_types": ["name"]}, "key_types has name; choose of number, uuid"),
        ({"ruler_tasks": ["niah"]}, "ruler_tasks has niah; choose of niah_single_1"),
        ({"lengths": [-1]}, "lengths are"),
        ({"benchmark": "mmlu"}, "benchmark is 'mmlu'; it must be one of longbench"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TaskSettings(**settings)


def test_metrics_are_checked_before_the_model_works(letters, tmp_path):
    examples, encode = build("qa", letters, tmp_path, metric="beauty")
    method = Perfect(letters)
    with pytest.raises(ValueError, match="metric 'beauty'; it must be one of"):
        run(method, examples, encode, tmp_path / "run")
    with pytest.raises(ValueError, match="no examples"):
        run(method, [], encode, tmp_path / "run")
    assert method.read_batches == []


def test_a_prompt_of_nothing_is_refused(letters):
    example = Example(context="c", question="", answer="a", max_new_tokens=1, task="t")
    with pytest.raises(ValueError, match="task 't' has neither question nor answer_prefix"):
        TextEncoder(letters)(example)


def test_chat_puts_the_question_into_the_template_and_leaves_the_context_out(letters):
    example = Example(context="abcdef", question="\n\nWho? ", answer_prefix="It is", answer="a", max_new_tokens=1)
    with pytest.raises(ValueError, match="this tokenizer has none"):
        TextEncoder(letters, chat=True)
    talking = byte_tokenizer()
    talking.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    context, prompt = TextEncoder(talking, chat=True, max_context_length=4)(example)
    assert talking.decode(context) == "abcd"
    assert talking.decode(prompt) == "<user>Who?</><assistant>It is"
    assert letters.decode(TextEncoder(letters)(example)[1]) == "\n\nWho? It is"


def test_answers_end_where_the_model_or_the_tokenizer_says(letters):
    model = base_model()
    assert find_stop_ids(model, letters) == {2, 256}
    model.generation_config.eos_token_id = [5, 6]
    assert find_stop_ids(model, letters) == {5, 6, 256}


def documents_file(folder, lengths=(120, 90)):
    return write_rows(
        folder / "documents.jsonl",
        [{"text": words(random_ids(1, length, seed=seed)[0])} for seed, length in enumerate(lengths)],
    )


def nll_by_hand(model, history, target):
    logits = model(torch.cat([history, target])[None], compress=False).logits[0, len(history) : -1]
    return -logits.log_softmax(-1).gather(-1, target[1:, None]).mean().item()


def test_perplexity_behind_histories_is_that_of_the_same_tokens(tmp_path):
    model, text = rcc_model(), tokenizer()
    settings = TaskSettings(data=documents_file(tmp_path), lengths=[48, 0, 16], num_tokens=10, num_examples=3)
    asked = continuations(text, settings)
    assert [len(item.history) for item in asked] == [48, 0, 16] * 3
    for place in range(0, 9, 3):
        long, none, short = asked[place : place + 3]
        assert torch.equal(long.target, none.target)
        assert torch.equal(long.history[-16:], short.history)
    metrics = {}
    for name in ("full", "rcc", "none"):
        with RunFolder(tmp_path / name, {}) as folder:
            metrics[name] = evaluate_perplexity(
                model, asked, make_method(name, model, 4), folder, batch_size=2, progress=False
            )
    for name, found in metrics.items():
        assert [(group["history"], group["num_examples"]) for group in found["groups"]] == [(0, 3), (16, 3), (48, 3)]
        for group in found["groups"]:
            assert group["perplexity"]["mean"] == pytest.approx(math.exp(group["nll"]["mean"]))
        assert found["groups"][0]["nll"] == pytest.approx(metrics["full"]["groups"][0]["nll"]), name
    expected = [nll_by_hand(model, item.history, item.target) for item in asked]
    for number, start in enumerate((1, 2, 0)):
        assert metrics["full"]["groups"][number]["nll"]["mean"] == pytest.approx(sum(expected[start::3]) / 3, rel=1e-5)
    nll = {name: found["groups"][2]["nll"]["mean"] for name, found in metrics.items()}
    assert len({round(value, 6) for value in nll.values()}) == 3
    assert metrics["rcc"]["groups"][2]["entries_per_example"] == 12
    with RunFolder(tmp_path / "full", {}) as folder:
        assert evaluate_perplexity(model, asked, None, folder, progress=False) == metrics["full"]


def test_perplexity_needs_documents_that_are_long_enough(tmp_path):
    with pytest.raises(ValueError, match="no document has 328 tokens, the longest has 120"):
        continuations(tokenizer(), TaskSettings(data=documents_file(tmp_path), lengths=[0, 72]))
    with pytest.raises(ValueError, match="num_tokens is 1; perplexity needs at least 2"):
        continuations(tokenizer(), TaskSettings(data=documents_file(tmp_path), num_tokens=1))


def test_cost_is_the_median_of_runs_after_a_warm_up(letters, tmp_path, monkeypatch):
    ticks = iter([9.0, 9.0, 9.0, 1.0, 0.5, 2.5, 3.0, 0.5, 4.5, 2.0, 0.5, 2.0] + [1.0] * 12)
    monkeypatch.setattr("rcc_hf.evaluation.cost.timed", lambda function, device: (function(), next(ticks)))
    method = Perfect(letters)
    method.answer = lambda context, prompt: "x" * 9
    method.model = base_model()
    with RunFolder(tmp_path, {}) as folder:
        examples = cost_examples(TaskSettings(lengths=[50, 20], num_tokens=9))
        metrics = evaluate_cost(method.model, letters, examples, method, folder, num_runs=3, progress=False)
    first, second = metrics["groups"]
    assert (first["length"], second["length"]) == (20, 50)
    assert first["read_seconds"] == 2.0
    assert first["time_to_first_token"] == 2.5
    assert first["decode_tokens_per_second"] == pytest.approx(8 / 2.0)
    assert (first["nbytes"], second["nbytes"]) == (80, 200)
    assert method.read_batches == [[20]] * 4 + [[50]] * 4
    assert first["peak_bytes"] > metrics["model_nbytes"] > 0
    assert metrics["environment"]["torch"] == torch.__version__
    assert {"commit", "device", "cpu_count", "transformers", "rcc_hf"} <= set(metrics["environment"])
    assert rows_of(tmp_path)[0]["runs"]["read_seconds"] == [1.0, 3.0, 2.0]
    with pytest.raises(ValueError, match=r"lengths are \[0\]"):
        cost_examples(TaskSettings(lengths=[0]))


def test_cost_times_a_real_model(tmp_path):
    model, text = rcc_model(), tokenizer()
    with RunFolder(tmp_path, {}) as folder:
        examples = cost_examples(TaskSettings(lengths=[64], num_tokens=4))
        method = make_method("rcc", model, 4)
        metrics = evaluate_cost(model, text, examples, method, folder, num_runs=2, batch_size=2, progress=False)
    (group,) = metrics["groups"]
    assert group["entries"] == 16
    assert group["time_to_first_token"] > group["read_seconds"] > 0
    assert group["decode_tokens_per_second"] > 0


def test_examples_of_several_metrics_are_averaged_by_name(letters, tmp_path):
    examples, encode = build("qa", letters, tmp_path)
    mixed = [replace(example, metric="exact_match", task="other") for example in examples[:1]] + examples[1:]
    metrics = run(Perfect(letters), mixed, encode, tmp_path / "run")
    assert metrics["overall"]["exact_match"]["mean"] == 1.0
    assert [group["task"] for group in metrics["groups"]] == ["other", "qa"]
