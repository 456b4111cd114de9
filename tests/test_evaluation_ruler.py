# SPDX-License-Identifier: Apache-2.0
"""RULER's tasks: solved from the context by other means, lengths, and their published parameters."""

import re
from collections import Counter

import pytest
import tiny
from test_evaluation_needles import PARAGRAPHS, count, trained
from tokenizers.pre_tokenizers import ByteLevel

from rcc_hf.evaluation.ruler import ESSAY_TASKS, QA_TASKS, RULER_TASKS, ruler_examples
from rcc_hf.evaluation.ruler_qa import QARecord
from rcc_hf.evaluation.scoring import score_examples

RECORDS = [
    QARecord(f"Where does number {i} live?", (f"In town {i}x", f"town {i}x"), (f"Number {i}. He lives in town {i}x.",))
    for i in range(30)
]
NEEDLE = re.compile(r"One of the special magic \w+ for (\S+) is: (\S+)\.")


@pytest.fixture(scope="module")
def tokenizer():
    return trained(ByteLevel(add_prefix_space=False))


def made(task, tokenizer, length=4000, num_examples=3, **options):
    given = {"paragraphs": PARAGRAPHS, "records": RECORDS}
    return list(ruler_examples(task, tokenizer, length=length, num_examples=num_examples, **given | options))


def solve_needles(example):
    hidden = NEEDLE.findall(example.context)
    queries = re.search(r"for (.+) mentioned", example.question)[1].replace(",", "").replace(" and ", " ").split()
    return [value for query in queries for key, value in hidden if key == query]


def solve_tracking(example):
    wanted = re.search(r"value (\d+)", example.question)[1]
    values, found = {}, []
    for name, link, value in re.findall(r"VAR ([A-Z]+) = (VAR )?(\w+)", example.context):
        values[name] = values[value] if link else value
        found += [name] if values[name] == wanted else []
    return found


def solve_common(example):
    last = example.context.rpartition("Below is a numbered list")[2]
    words = Counter(re.findall(r"\d+\. (\w+)", last))
    return [word for word, _ in words.most_common(10)]


def solve_frequent(example):
    words = Counter(example.context.rpartition("coded words. ")[2].split())
    del words["..."]
    return [word for word, _ in words.most_common(3)]


def solve_questions(example):
    number = re.search(r"number (\d+)", example.question)[1]
    return [re.search(rf"Number {number}\. He lives in (town \w+)", example.context)[1]]


SOLVERS = {"vt": solve_tracking, "cwe": solve_common, "fwe": solve_frequent} | dict.fromkeys(QA_TASKS, solve_questions)


def test_there_are_thirteen():
    assert len(RULER_TASKS) == 13
    assert len(ESSAY_TASKS) == 5


@pytest.mark.parametrize("task", RULER_TASKS)
def test_the_context_has_the_answer_and_the_prompt_has_not(task, tokenizer):
    examples = made(task, tokenizer)
    for example in examples:
        solution = SOLVERS.get(task, solve_needles)(example)
        assert set(solution) <= set(example.answers)
        prompt = example.question + example.answer_prefix
        assert not any(answer in prompt for answer in example.answers)
    right = [", ".join(SOLVERS.get(task, solve_needles)(example)) for example in examples]
    assert score_examples(examples, right)[task].values == {"string_match": 1}
    assert score_examples(examples, right[1:] + right[:1])[task].values["string_match"] < 0.35
    assert score_examples(examples, ["no idea"] * 3)[task].values == {"string_match": 0}


@pytest.mark.parametrize("task", RULER_TASKS)
@pytest.mark.parametrize("length", [4000, 6001])
def test_lengths_include_the_answer_and_are_not_exceeded(task, length, tokenizer):
    # of a unit: a line, a sentence, a needle, three or six times a word with its number, a document
    slack = 130 if task == "niah_multikey_3" else 100
    for example in made(task, tokenizer, length, num_examples=2):
        tokens = count(tokenizer, example.context + example.question + example.answer_prefix) + example.max_new_tokens
        assert tokens == example.metadata["tokens"]
        assert length - slack < tokens <= length


def test_parameters_are_the_published_ones(tokenizer):
    needles = {task: made(task, tokenizer, num_examples=1)[0] for task in RULER_TASKS}
    assert {task: example.max_new_tokens for task, example in needles.items()} == {
        **{task: 128 for task in RULER_TASKS if task.startswith("niah")},
        "vt": 30,
        "cwe": 120,
        "fwe": 50,
        "qa_1": 32,
        "qa_2": 32,
    }
    hidden = {task: len(NEEDLE.findall(example.context)) for task, example in needles.items()}
    assert [hidden[f"niah_{task}"] for task in ("single_1", "single_3", "multikey_1", "multivalue", "multiquery")] == [
        1, 1, 4, 4, 4,
    ]  # fmt: skip
    assert min(hidden["niah_multikey_2"], hidden["niah_multikey_3"]) > 15
    forms = {task: [re.sub(r"\w", "x", answer) for answer in needles[f"niah_{task}"].answers] for task in (
        "single_1", "single_3", "multivalue", "multiquery",
    )}  # fmt: skip
    uuid = "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx"
    number = "x" * 7
    assert forms == {"single_1": [number], "single_3": [uuid], "multivalue": [number] * 4, "multiquery": [number] * 4}
    assert [len(needles[task].answers) for task in ("vt", "cwe", "fwe")] == [5, 10, 3]


def test_singular_and_plural(tokenizer):
    (one,) = made("niah_single_1", tokenizer, num_examples=1)
    assert one.context.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it."
    )
    key = re.search(r"magic number for (\S+) mentioned in the provided text\? $", one.question)[1]
    assert one.question.startswith("What is the special")
    assert one.answer_prefix == f"The special magic number for {key} mentioned in the provided text is"
    (four,) = made("niah_multiquery", tokenizer, num_examples=1)
    assert four.context.startswith("Some special magic numbers are hidden")
    assert re.match(r"What are all the special magic numbers for \S+, \S+, \S+, and \S+ mentioned", four.question)


@pytest.mark.parametrize(("length", "often", "seldom"), [(4000, 6, 1), (9000, 30, 3)])
def test_common_words_are_as_often_as_published(length, often, seldom, tokenizer):
    (example,) = made("cwe", tokenizer, length=length, num_examples=1)
    counts = Counter(re.findall(r"\d+\. (\w+)", example.context.rpartition("Below is")[2]))
    assert Counter(counts.values()) == {often: 10, seldom: len(counts) - 10}
    # none of the ten is found inside another word
    text = "\n".join(counts)
    assert [text.count(word) for word in example.answers] == [1] * 10


def test_frequent_words_follow_a_zeta_distribution(tokenizer):
    (example,) = made("fwe", tokenizer, num_examples=1)
    words = Counter(example.context.rpartition("coded words. ")[2].split())
    top = [number for _, number in words.most_common(5)]
    assert words.most_common(1)[0][0] == "..."
    assert top == [pytest.approx(top[0] / k**2, abs=1) for k in range(1, 6)]


def test_an_assignment_stands_behind_what_it_refers_to(tokenizer):
    (example,) = made("vt", tokenizer, num_examples=1)
    # the solved example in front has short names
    shot = re.search(r"they are: ([A-Z ]+)\n", example.context)[1].split()
    assert [len(name) for name in shot] == [3] * 5
    assert solve_tracking(example) == list(example.answers)


def test_related_documents_come_first_and_a_small_pool_repeats():
    records = [QARecord("Who?", ("me",), ("It is me.",), ("near one", "near two")), QARecord("x", ("y",), ("far",))]
    frame = count(tiny.tokenizer(), "The following are given documents. Question: Who? Answer:")
    instruction, documents = (
        20,
        count(tiny.tokenizer(), "Document 1: It is me. Document 2: near one Document 3: near two"),
    )
    found = []
    for more in (-1, 0, 3, 7):  # words for one document less, and for two more
        length = 2 * instruction + frame + documents + more + 32
        (example,) = ruler_examples("qa_1", tiny.tokenizer(), length=length, num_examples=1, records=records)
        found.append(re.findall(r"Document \d+:\n(.+)", example.context))
    assert [len(documents) for documents in found] == [2, 3, 4, 5]
    assert set(found[0]) < set(found[1]) == {"It is me.", "near one", "near two"}
    assert set(found[2]) == set(found[3]) == {"It is me.", "near one", "near two", "far"}
    assert all(documents.count("It is me.") == 1 for documents in found)


def test_an_example_depends_on_its_index_alone(tokenizer):
    whole = made("niah_multikey_2", tokenizer, num_examples=4)
    assert made("niah_multikey_2", tokenizer, num_examples=2, first=2) == whole[2:]
    assert len({example.context for example in whole}) == 4
    assert made("niah_multikey_2", tokenizer, num_examples=1, seed=1)[0].answers != whole[0].answers


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("niah", {}, "task is 'niah'; it must be one of niah_single_1"),
        ("niah_single_2", {"paragraphs": None}, "niah_single_2 hides needles in real text; give paragraphs"),
        ("qa_1", {"records": []}, "qa_1 asks questions about documents; give records"),
        ("niah_single_1", {"length": 150}, "niah_single_1 at length 150: 22 tokens are too few"),
        ("fwe", {"length": 420}, "fwe at length 420: the words are too few.*Give a greater length"),
    ],
)
def test_what_cannot_be_made_is_refused(task, options, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        made(task, tokenizer, **options)
