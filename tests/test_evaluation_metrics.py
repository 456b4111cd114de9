# SPDX-License-Identifier: Apache-2.0
"""Metrics against examples worked by hand, and against the libraries that have them."""

import importlib
import math
import random

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from rcc_hf.evaluation import metrics_infinitebench as infinitebench
from rcc_hf.evaluation import metrics_leval as leval
from rcc_hf.evaluation import metrics_longbench as longbench
from rcc_hf.evaluation.examples import Example
from rcc_hf.evaluation.metrics import exact_match, normalize_answer, passkey, squad, string_match_all, string_match_part
from rcc_hf.evaluation.metrics_text import bleu, edit_distance, levenshtein, reconstruction, rouge
from rcc_hf.evaluation.scores import Scores, bootstrap_interval
from rcc_hf.evaluation.scoring import METRICS, SCORERS, score_examples, summarize

UUID = "0a1b2c3d-0000-4000-8000-123456789abc"


def scores(metric, prediction, *references, **options):
    """Of one example the scores by name."""
    made = metric([prediction], [list(references)], **options)
    return {name: values[0] for name, values in made.per_example.items()}


def random_texts(count, seed=0):
    generator = random.Random(seed)
    words = ["the", "cat", "sat", "on", "a", "mat", ",", "and", "looked", "at", "another", "cat", "."]
    return [" ".join(generator.choices(words, k=generator.randrange(1, 30))) for _ in range(count)]


def test_exact_match_ignores_only_the_space_around():
    made = exact_match([" a b\n", "a  b", "A b"], ["a b", "a b", "a b"])
    assert made.per_example == {"exact_match": [1, 0, 0]}
    assert made.values["exact_match"] == pytest.approx(1 / 3)


def test_answers_are_normalised_as_in_squad():
    assert normalize_answer(" The  U.S. Army, an  army! ") == "us army army"


def test_squad_by_hand():
    # 2 of 3 predicted words are right, 2 of 2 are found: precision 2/3, recall 1
    assert scores(squad, "in New York", "Boston", "the new york") == {"exact_match": 0, "f1": pytest.approx(0.8)}
    assert scores(squad, "New York!", "the new york") == {"exact_match": 1, "f1": 1}
    # a word counts as often as it stands in both
    assert scores(squad, "b b b", "b c")["f1"] == pytest.approx(2 * 1 / 5)
    assert scores(squad, "the", "a") == {"exact_match": 1, "f1": 1}
    assert scores(squad, "", "b") == {"exact_match": 0, "f1": 0}


def test_string_matches_by_hand():
    assert scores(string_match_all, "It is 12 and ABC", "12", "abc", "13", "14")["string_match"] == 0.5
    assert scores(string_match_part, "It is 12", "13", "12")["string_match"] == 1
    assert scores(string_match_part, "It is 1 2", "13", "12")["string_match"] == 0
    assert string_match_all(["12", ""], [["12"], ["13", "14"]]).values["string_match"] == 0.5


@pytest.mark.parametrize(
    ("prediction", "key", "expected"),
    [
        (" 71432. Remember it.", "71432", 1),
        ("It is 71432, not 5.", "71432", 1),
        ("5, not 71432", "71432", 0),
        ("714321", "71432", 0),
        ("", "71432", 0),
        (f"12: {UUID.upper()}.", UUID, 1),
        (UUID[:-1], UUID, 0),
    ],
)
def test_passkeys_by_hand(prediction, key, expected):
    assert scores(passkey, prediction, key)["accuracy"] == expected


def test_a_passkey_must_be_a_key():
    with pytest.raises(ValueError, match="'blue' is neither digits nor a UUID"):
        passkey(["blue"], ["blue"])


def test_bleu_by_hand():
    # precisions 5/6, 3/5, 1/4, and 1/6 smoothed for 0 of 3; no brevity penalty
    made = bleu(["the cat sat on the mat"], ["the cat is on the mat"])
    precisions = (5 / 6, 3 / 5, 1 / 4, 1 / (2 * 3))
    assert made.values["bleu4"] == pytest.approx(math.prod(precisions) ** (1 / 4))
    # 5 words for 6
    short = bleu(["a b c d e"], ["a b c d e f"])
    assert short.values["bleu4"] == pytest.approx(math.exp(1 - 6 / 5))


@pytest.mark.parametrize("num_references", [1, 3])
def test_bleu_is_sacrebleus(num_references):
    made = random_texts(40)
    right = [random_texts(40, seed + 1) for seed in range(num_references)]
    ours = bleu(made, list(zip(*right, strict=True)))
    assert ours.values["bleu4"] == pytest.approx(sacrebleu.corpus_bleu(made, right).score / 100, abs=1e-12)
    sentence = sacrebleu.sentence_bleu(made[7], [texts[7] for texts in right]).score / 100
    assert ours.per_example["bleu4"][7] == pytest.approx(sentence)
    assert 0 < ours.stderr["bleu4"] < 0.1


def test_edit_distance_by_hand():
    assert scores(edit_distance, "kitten", "sitting") == {
        "edit_distance": pytest.approx(3 / 7),
        "edit_similarity": pytest.approx(4 / 7),
    }
    assert scores(edit_distance, "a big cat", "a cat", unit="word")["edit_distance"] == pytest.approx(1 / 3)
    assert scores(edit_distance, "abc", "xyz", "abd")["edit_distance"] == pytest.approx(1 / 3)
    assert levenshtein([1, 2, 3, 4], [1, 3, 4]) == 0.25
    assert levenshtein("", "") == 0
    with pytest.raises(ValueError, match="unit is 'line'"):
        edit_distance(["a"], ["b"], unit="line")


def test_edit_distance_is_the_recurrence():
    generator = random.Random(0)
    for _ in range(20):
        first, second = ("".join(generator.choices("abc", k=generator.randrange(1, 12))) for _ in range(2))
        row = list(range(len(second) + 1))
        for i, a in enumerate(first, 1):
            diagonal, row[0] = row[0], i
            for j, b in enumerate(second, 1):
                diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
        assert levenshtein(first, second) == pytest.approx(row[-1] / max(len(first), len(second)))


def test_rouge_by_hand():
    # rouge1: 3 of 4 and 3 of 3 words; rouge2: 1 of 3 and 1 of 2 pairs; rougeL: "the cat" + "down" = 3
    assert scores(rouge, "The cat sat down.", "the cat down") == {
        "rouge1": pytest.approx(2 * 3 / 7),
        "rouge2": pytest.approx(2 * 1 / 5),
        "rougeL": pytest.approx(2 * 3 / 7),
    }


@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_is_rouge_scores(stemmer):
    made, right, other = (random_texts(20, seed) for seed in range(3))
    ours = rouge(made, list(zip(right, other, strict=True)), stemmer=stemmer)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stemmer)
    for name, values in ours.per_example.items():
        expected = [
            max(scorer.score(r, m)[name].fmeasure, scorer.score(o, m)[name].fmeasure)
            for m, r, o in zip(made, right, other, strict=True)
        ]
        assert values == pytest.approx(expected)


def test_a_reconstruction_has_all_three():
    text = "The quick brown fox jumps over the lazy dog."
    perfect = {"bleu4": 1, "exact_match": 1, "edit_distance": 0, "edit_similarity": 1}
    assert reconstruction([text] * 3, [text] * 3).values == perfect


def test_spread():
    made = Scores({"f1": [0.0, 1.0, 1.0, 0.0]})
    assert made.summary() == {"f1": 0.5, "f1_stderr": pytest.approx(math.sqrt(1 / 3) / 2), "num_examples": 4}
    assert Scores({"f1": [1.0]}).summary() == {"f1": 1, "num_examples": 1}
    # 95 % of a normal distribution are within 1.96 standard errors
    values = random.Random(0).choices([0.0, 1.0], k=400)
    low, high = bootstrap_interval(values)
    assert (high - low) / 2 == pytest.approx(1.96 * Scores({"x": values}).stderr["x"], rel=0.1)
    assert bootstrap_interval(values) == (low, high)
    with pytest.raises(ValueError, match=r"confidence is 95"):
        bootstrap_interval(values, 95)


@pytest.mark.parametrize("metric", [squad, bleu, rouge, string_match_all, edit_distance])
def test_what_cannot_be_scored_is_refused(metric):
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        metric(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="no predictions"):
        metric([], [])
    with pytest.raises(ValueError, match="example 1 has no reference"):
        metric(["a", "b"], ["a", []])
    with pytest.raises(TypeError, match="one string"):
        metric("a", ["a"])


def test_a_missing_package_names_the_extra(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ModuleNotFoundError, match=r"rouge_score, which is not installed.*pip install 'rcc_hf\[eval\]'"):
        rouge(["a"], ["a"])


def test_longbench_by_hand():
    assert scores(longbench.named_number, "Paragraph 3, or 7 or 3", "Paragraph 3")["accuracy"] == pytest.approx(2 / 3)
    assert scores(longbench.named_number, "none", "3")["accuracy"] == 0
    classes = [["Food", "Food other", "Sport"]]
    named = {text: longbench.classification([text], [["Food other"]], classes).values["accuracy"] for text in (
        "Food other", "Food other or Sport", "Food", "x",
    )}  # fmt: skip
    assert named == {"Food other": 1, "Food other or Sport": 0.5, "Food": 0, "x": 0}
    with pytest.raises(ValueError, match="example 0 has no classes"):
        longbench.classification(["x"], ["x"], [[]])
    # 2 insertions on 3 + 5 characters
    assert scores(longbench.code_similarity, "\n# no\nabc\nz", "abcde")["similarity"] == 0.75
    assert longbench.first_lines(["\n\na\nb"]) == ["a"]
    assert scores(longbench.f1_characters, "北京，", "北京市")["f1"] == pytest.approx(0.8)  # noqa: RUF001
    assert scores(longbench.rouge_characters, "北京", "北京市")["rougeL"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("metric", "prediction", "reference", "expected"),
    [
        (leval.choice, "(B) since", "B", 1),
        (leval.choice, "the answer is C or B", "(B) text", 0),
        (leval.choices, "BD", "BD", 1),
        (leval.choices, "B. and D.", "BD", 1),
        (leval.choices, "B", "BD", 0.25),
        (leval.choices, "BC", "BD", 0),
        (leval.choices, "none", "BD", 0),
        (leval.last_number, "So 3 + 4. The answer is $7.00 .", "7", 1),
        (leval.last_number, "3 plus 4 is 7\n\n8", "7", 1),
        (leval.last_number, "none", "7", 0),
        (leval.contains, "It was The Role Of art.", "the role of art", 1),
        (leval.code_output, "Hence the final output is [1, 2] ok", "[1, 2]", 1),
        (leval.code_output, "It is 3", "4", 0),
    ],
)
def test_leval_by_hand(metric, prediction, reference, expected):
    assert scores(metric, prediction, reference)["exact_match"] == expected


def test_leval_asks_for_story_and_world():
    made = scores(leval.true_false, "True. [fact: True]", "True [fact: False]")
    assert made == {"exact_match": 0.5, "loyalty": 1, "fact": 0}
    assert scores(leval.true_false, "no idea", "True [fact: False]")["exact_match"] == 0


@pytest.mark.parametrize(
    ("metric", "prediction", "references", "expected"),
    [
        (infinitebench.first_integer, "x 12 13", ["12"], 1),
        (infinitebench.first_integer, "123", ["12"], 0),
        (infinitebench.first_number, "about 2.50", ["2.5"], 1),
        (infinitebench.first_number, "none", ["2"], 0),
        (infinitebench.word, '"abc-1".', ["abc-1"], 1),
        (infinitebench.word, "abc-12", ["abc-1"], 0),
        (infinitebench.contains, "Ace Rothstein", ["BOB", "ACE"], 1),
        (infinitebench.last_integer, "it is -5.", ["-5"], 1),
        (infinitebench.last_integer, "-5 it is", ["-5"], 0),
        (infinitebench.choice, "B. text", ["text", "B"], 1),
        (infinitebench.choice, "A", ["text", "B"], 0),
        (infinitebench.choice, "The answer is: B", ["text", "B"], 1),
        (infinitebench.choice, "I think C, no: B!", ["text", "B"], 1),
        (infinitebench.choice, "text it is", ["text", "B"], 1),
        (infinitebench.choice, "textual", ["text", "B"], 0),
        (infinitebench.leading_numbers, "[1, 2, 4]", ["1, 2, 3, 4"], 0.5),
    ],
)
def test_infinitebench_by_hand(metric, prediction, references, expected):
    assert scores(metric, prediction, *references)["accuracy"] == expected


REFERENCE = {
    "passkey": "71432",
    "longbench_number": "Paragraph 7",
    "longbench_class": "Sport",
    "longbench_f1_zh": "北京",
    "longbench_rouge_zh": "北京",
    "leval_choice": "B",
    "leval_choices": "BD",
    "leval_number": "42",
    "leval_true_false": "True [fact: False]",
    "infinitebench_integer": "42",
    "infinitebench_number": "42",
    "infinitebench_word": UUID,
    "infinitebench_code_run": "-42",
    "infinitebench_choice": "B",
    "infinitebench_calculation": "4, 2",
}


@pytest.mark.parametrize("name", SCORERS)
def test_a_perfect_model_gets_one_and_a_broken_one_nothing(name):
    right = REFERENCE.get(name, "the quick brown fox jumps")
    asked = [
        Example(
            context="c", question="q", answer=right, max_new_tokens=1, task="t", metric=name,
            metadata={"all_classes": ["Sport", "Food"]},
        )
    ] * 3  # fmt: skip
    perfect = score_examples(asked, [right] * 3)["t"].values
    assert perfect == {value: pytest.approx(float(value != "edit_distance")) for value in perfect}
    for broken in ("", "Zzz!"):
        values = score_examples(asked, [broken] * 3)["t"].values
        assert values == {value: pytest.approx(float(value == "edit_distance"), abs=0.1) for value in values}


def test_every_metric_has_a_scorer():
    assert set(METRICS) < set(SCORERS)


def test_scores_are_by_task():
    def asked(task, metric):
        return Example(context="c", question="q", answer=("12", "13"), max_new_tokens=1, task=task, metric=metric)

    examples = [asked("b", "string_match_all"), asked("a", "squad"), asked("b", "string_match_all")]
    made = summarize(score_examples(examples, ["12", "13", "x"]))
    assert list(made) == ["b", "a"]
    assert made["b"]["string_match"] == 0.25
    assert made["b"]["num_examples"] == 2
    assert made["a"] == {"exact_match": 1, "f1": 1, "num_examples": 1}
    with pytest.raises(ValueError, match="task 'a' has the metrics passkey, squad"):
        score_examples([asked("a", "squad"), asked("a", "passkey")], ["1", "2"])
    with pytest.raises(ValueError, match="task 'a' has the metric 'luck'; it must be one of exact_match"):
        score_examples([asked("a", "luck")], ["1"])
