# SPDX-License-Identifier: Apache-2.0
"""What the tasks of an evaluation ask: the same for the same settings, refused where it cannot be asked."""

import json
from pathlib import Path

import pytest
from evaluating import TASKS, TEXT, Perfect, build, byte_tokenizer, run, texts_file, write_rows

from rcc_hf.evaluation.encoding import TextEncoder
from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.tasks import GROUP_BY, TaskSettings, build_examples
from rcc_hf.objectives import RECONSTRUCTION_PROMPT


@pytest.fixture(scope="module")
def letters():
    return byte_tokenizer()


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


@pytest.mark.parametrize(("tail", "read", "scored"), [("cut", 128, 128), ("raw", 150, 150), ("pad", 150, 150)])
def test_what_is_behind_the_last_segment(tail, read, scored, letters, tmp_path):
    data = write_rows(tmp_path / "x.jsonl", [{"text": ("é" + TEXT * 2)[:149]}])
    examples, encode = build("reconstruction", letters, tmp_path, data=data, tail=tail)
    ids, prompt = encode(examples[0])
    assert letters.decode(prompt) == RECONSTRUCTION_PROMPT
    assert len(ids) == examples[0].metadata["length"] == read
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
