# SPDX-License-Identifier: Apache-2.0
"""Questions made of sentences: what is asked stands in the text, and what is answered is what the gap held."""

import random

import numpy as np
import pytest
from objective_data import EOS, chat_tokenizer, decode, labelled, prose_shards, same, shape

from rcc_hf.evaluation.benchmark_qa import SHORT_ANSWER
from rcc_hf.objectives import IGNORED, Cloze
from rcc_hf.objectives.cloze import _BLANKS, _draw_gap
from rcc_hf.texts import TokenShards

LETTERS = chat_tokenizer()
STORY = (
    "The keeper, whose name was John Smeaton, came in 1756 and built a tower of oak and granite. Nobody had asked him "
    'why he did it. "They will see," he said, and went on with the work until Mary Ann Jones called him home. '
)
SENTENCE = "On that day Napoleon Bonaparte lost 25000 men near Waterloo."


def story(length=20):
    return TokenShards.of_documents([LETTERS(STORY * length)["input_ids"]])


def draws(objective, count=40, of=None):
    return [objective.example(np.random.default_rng([5, i]), of or shape(8, 64)) for i in range(count)]


def rounds(example):
    """Questions and answers of an example, as texts."""
    found, begin = [], 0
    asked = (example["labels"] != IGNORED).tolist()
    ids = example["input_ids"].tolist()
    while begin < len(ids):
        middle = asked.index(True, begin)
        end = next((i for i in range(middle, len(ids)) if not asked[i]), len(ids))
        found.append((decode(LETTERS, ids[begin:middle]), decode(LETTERS, ids[middle:end])))
        begin = end
    return found


def test_a_gap_filled_again_is_a_piece_of_the_text():
    filled = 0
    for example in draws(Cloze(story(), LETTERS, dropped=0.0, max_local=5000), 60):
        text = " ".join(decode(LETTERS, example["context_ids"]).split())
        for question, answer in rounds(example):
            assert answer.endswith("</s>")
            value = answer.removesuffix("</s>").strip()
            assert value in text
            asked = question.strip().removesuffix("Answer:").strip().splitlines()[-1]
            asked = asked.removeprefix("Question: ").removeprefix("What does the text say here? ")
            blanks = [blank for blank in sorted(_BLANKS, key=len, reverse=True) if f" {blank} " in asked]
            if blanks:
                before, _, after = asked.partition(f" {blanks[0]} ")
                assert any(f"{before} {value}{space}{after}" in text for space in ("", " "))
                filled += 1
    assert filled > 50


def test_several_questions_stand_behind_one_context_up_to_a_length():
    objective = Cloze(story(), LETTERS, num_questions=3, max_local=400)
    counts = set()
    for example in draws(objective):
        counts.add(len(rounds(example)))
        assert len(example["context_ids"]) == 8 * 64
        assert len(example["input_ids"]) <= 400 or len(rounds(example)) == 1
    assert counts == {2, 3}
    assert {len(rounds(one)) for one in draws(Cloze(story(), LETTERS, max_local=1))} == {1}


def test_words_are_left_out_and_kept_in_order():
    lost = 0
    for example in draws(Cloze(story(), LETTERS, dropped=1.0, num_questions=1, max_local=5000)):
        ((question, _),) = rounds(example)
        lost += all(word not in question for word in ("keeper", "tower", "asked", "work"))
    assert lost > 5


def test_some_are_asked_as_evaluation_asks():
    questions = [question for example in draws(Cloze(story(), LETTERS)) for question, _ in rounds(example)]
    wording = SHORT_ANSWER.template.removeprefix("{context}").partition("{question}")[0]
    as_evaluated = [one for one in questions if one.startswith(wording)]
    assert 0.5 < len(as_evaluated) / len(questions) < 0.9
    assert all(one.endswith("\nAnswer:") for one in as_evaluated)


def test_a_chat_is_a_chat_in_every_round():
    example = draws(Cloze(story(), LETTERS, chat_share=1.0, max_local=5000), 1)[0]
    for question, answer in rounds(example):
        assert question.startswith("<|im_start|>user\n")
        assert "<|im_start|>assistant\n" in question
        assert answer.endswith("<|im_end|>")


def test_a_short_text_is_filled_up_but_not_for_a_teacher():
    objective = Cloze(story(), LETTERS, pad_share=1.0, distill=True)
    for example in draws(objective, 10):
        context = example["context_ids"].tolist()
        text = context[: context.index(EOS)]
        assert len(context) == 8 * 64
        assert 7 * 64 < len(text) < 8 * 64
        assert set(context[len(text) :]) == {EOS}
        assert example["teacher_ids"].tolist() == text + example["input_ids"].tolist()
        assert labelled(example) == labelled(example, "teacher_")


def test_the_same_generator_gives_the_same_example():
    one, other = Cloze(story(), LETTERS), Cloze(story(), LETTERS)
    for seed in range(5):
        assert same(*(made.example(np.random.default_rng(seed), shape(8, 64)) for made in (one, other)))


def test_names_and_numbers_are_preferred_and_names_are_whole():
    gaps = [_draw_gap(random.Random(seed), SENTENCE) for seed in range(200)]
    found = {kind: {gap.answer for gap in gaps if gap.kind == kind} for kind in ("name", "number", "other")}
    assert found["name"] == {"Napoleon Bonaparte", "Waterloo"}
    assert found["number"] == {"25000"}
    assert {"that", "lost", "near"} & found["other"]
    assert 0.6 < sum(gap.kind != "other" for gap in gaps) / len(gaps) < 0.8
    assert all(gap.before + gap.answer + gap.after == SENTENCE for gap in gaps)


def test_a_text_without_sentences_is_an_error():
    shards = TokenShards.of_documents([LETTERS("nothing but words " * 100)["input_ids"]])
    with pytest.raises(ValueError, match="no sentence of 6 words"):
        draws(Cloze(shards, LETTERS), 1)


@pytest.mark.parametrize("wrong", [{"num_questions": 0}, {"max_local": 0}, {"dropped": 1.5}, {"pad_share": -0.1}])
def test_numbers_out_of_range_are_errors(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Cloze(prose_shards(LETTERS), LETTERS, **wrong)
