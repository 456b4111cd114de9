# SPDX-License-Identifier: Apache-2.0
"""Needles in text: what is hidden where, in which words, and what has to be written down."""

import random
import re

import numpy as np
import pytest
import torch
from evaluating import byte_tokenizer
from objective_data import EOS, chat_tokenizer, counting, decode, labelled, local_parts, prose_shards, same, shape

from rcc_hf.evaluation.encoding import TextEncoder
from rcc_hf.evaluation.fillers import RepetitiveFiller, WordFiller
from rcc_hf.evaluation.needles import NeedleTask, needle_grid
from rcc_hf.evaluation.ruler import ruler_examples
from rcc_hf.objectives import PHRASINGS, FillerText, Needles, ShardText
from rcc_hf.objectives.needles import _find_ends

LETTERS = chat_tokenizer()
PROSE = ShardText(prose_shards(LETTERS, 30000))


def needles(*names, haystacks=(PROSE,), **options):
    return Needles(haystacks, LETTERS, phrasings={name: PHRASINGS[name] for name in names or PHRASINGS}, **options)


def draws(objective, count=40, of=None):
    return [objective.example(np.random.default_rng([3, i]), of or shape(24, 64)) for i in range(count)]


@pytest.mark.parametrize("name", PHRASINGS)
def test_values_stand_in_the_context_and_not_in_the_prompt(name):
    counts = set()
    for example in draws(needles(name), 60):
        text = decode(LETTERS, example["context_ids"])
        prompt, target = local_parts(LETTERS, example)
        assert len(example["context_ids"]) == 24 * 64
        assert target.endswith("</s>")
        values = target.removesuffix("</s>").strip().split(", ")
        assert len(set(values)) == len(values)
        for value in values:
            assert value in text
            assert value not in prompt
        counts.add(len(values))
    assert counts == ({1} if name == "passkey" else counts | {1, 2, 3})


def test_the_same_generator_gives_the_same_example():
    one, other = (needles(haystacks=(PROSE, FillerText(WordFiller(), LETTERS))) for _ in range(2))
    for seed in range(6):
        example = one.example(np.random.default_rng(seed), shape(24, 64))
        assert same(example, other.example(np.random.default_rng(seed), shape(24, 64)))
    assert not same(example, one.example(np.random.default_rng(0), shape(24, 64)))


@pytest.mark.parametrize("chat", [False, True])
def test_the_pass_key_of_evaluation(chat):
    task = NeedleTask(filler=RepetitiveFiller())
    (made,) = needle_grid(task, LETTERS, lengths=[600], depths=[0.5])
    expected = TextEncoder(LETTERS, chat=chat)(made)[1]
    hidden = re.sub(r"\d+", "#", re.search(r" The pass key is .* is the pass key\.", made.context)[0])
    for example in draws(needles("passkey", chat_share=float(chat))):
        assert torch.equal(example["input_ids"][: -len(labelled(example))], expected)
        text = decode(LETTERS, example["context_ids"])
        value = decode(LETTERS, labelled(example)[:-1]).strip()
        assert text.startswith(made.context[:60])
        assert hidden.replace("#", value) in text
    values = {decode(LETTERS, labelled(e)[:-1]).strip() for e in draws(needles("passkey"))}
    assert {len(value) for value in values} == {5, 6, 7, 36}


def test_the_needles_of_evaluation():
    task = NeedleTask(filler=RepetitiveFiller(), num_needles=3, num_queries=3)
    (made,) = needle_grid(task, LETTERS, lengths=[900], depths=[0.5])
    shape_of = re.compile(r"[a-z]+-[a-z]+")
    hidden = shape_of.sub("KEY", re.sub(r"\d+", "#", re.search(r" The magic number of [^.]+\.", made.context)[0]))
    prompt = shape_of.sub("KEY", decode(LETTERS, TextEncoder(LETTERS)(made)[1]))
    prompts = set()
    for example in draws(needles("needles", max_needles=3), 100):
        text = decode(LETTERS, example["context_ids"])
        found = shape_of.sub("KEY", local_parts(LETTERS, example)[0])
        if "UUID" not in found:
            assert hidden in shape_of.sub("KEY", re.sub(r"\d+", "#", text))
        prompts.add(found)
        for key in shape_of.findall(local_parts(LETTERS, example)[0]):
            assert f" of {key} is " in text
    assert prompt in prompts


def test_the_words_of_ruler():
    (made,) = ruler_examples("niah_multikey_1", LETTERS, length=1400, num_examples=1, seed=0, paragraphs=["A b c."])
    key = re.search(r"for (\S+) mentioned", made.question)[1]
    hidden = re.search(rf"One of the special magic numbers for {key} is: (\d+)\.", made.context)
    prompts = [local_parts(LETTERS, example)[0] for example in draws(needles("ruler"), 100)]
    pattern = re.escape("\n" + made.question + made.answer_prefix).replace(re.escape(key), "[a-z]+-[a-z]+")
    assert any(re.fullmatch(pattern, prompt) for prompt in prompts)
    texts = [decode(LETTERS, example["context_ids"]) for example in draws(needles("ruler"), 100)]
    assert any(re.search(hidden[0].replace(key, "[a-z]+-[a-z]+").replace(hidden[1], r"\d{7}"), text) for text in texts)


def test_values_of_one_key_come_in_the_order_of_the_text():
    several = 0
    for example in draws(needles("ruler"), 200):
        text, (prompt, target) = decode(LETTERS, example["context_ids"]), local_parts(LETTERS, example)
        key = re.search(r"for (\S+) mentioned", prompt)
        if not key or ", " not in target:
            continue
        values = re.findall(rf"for {re.escape(key[1])} is: (\S+)\.", text)
        assert target.removesuffix("</s>").strip() == ", ".join(values)
        several += 1
    assert several > 10


def test_needles_stand_anywhere_behind_sentences():
    places = []
    for example in draws(needles("passkey"), 200):
        text = decode(LETTERS, example["context_ids"])
        intro = text.index("there.") + 6
        place = text.index(" The pass key is ")
        before = text[intro:place]
        assert before == "" or before.endswith(".")
        places.append(len(before) / (len(text) - intro - 70))
    assert 0.4 < np.mean(places) < 0.6
    assert min(places) < 0.08
    assert max(places) > 0.9


@pytest.mark.parametrize("name", ["needles", "varied", "ruler"])
def test_one_of_several_that_is_asked_for_stands_anywhere(name):
    shares = []
    for example in draws(needles(name), 300):
        text, (_, target) = decode(LETTERS, example["context_ids"]), local_parts(LETTERS, example)
        if ", " not in target:
            shares.append(text.index(target.removesuffix("</s>").strip()) / len(text))
    assert len(shares) > 60
    assert 0.4 < np.mean(shares) < 0.62


def test_text_without_sentences_has_needles_too():
    made = Needles([ShardText(counting(40))], byte_tokenizer(), phrasings={"passkey": PHRASINGS["passkey"]})
    example = made.example(np.random.default_rng(0), shape(10, 64))
    assert len(example["context_ids"]) == 640


def test_a_short_context_has_fewer_needles_and_a_very_short_one_is_an_error():
    for example in draws(needles("varied", max_needles=64), 30, shape(4, 64)):
        assert len(example["context_ids"]) == 256
    with pytest.raises(ValueError, match="a context of 64 tokens has no room for needles"):
        draws(needles("passkey"), 1, shape(1, 64))


def test_teachers_have_as_many_labels():
    for example in draws(needles(distill=True), 20):
        assert labelled(example) == labelled(example, "teacher_")
        assert torch.equal(example["teacher_ids"], torch.cat([example["context_ids"], example["input_ids"]]))
        assert labelled(example)[-1] == EOS


def test_no_haystack_is_an_error():
    with pytest.raises(ValueError, match="no haystack"):
        needles(haystacks=())


def test_ends_of_sentences():
    ends = {LETTERS.decode([token]) for token in _find_ends(LETTERS)}
    assert ends == {".", "!", "?", "\n"}


def test_text_of_shards_is_of_any_length_and_joined_where_documents_are_short():
    rng, text = np.random.default_rng(0), ShardText(counting(40, 10))
    for length in (0, 1, 7, 33, 40, 41, 100):
        ids = text.draw(rng, length)
        assert len(ids) == length
        assert (np.diff(ids) != 1).sum() <= max(0, length // 8)
    long = ShardText(counting(200)).draw(rng, 100)
    assert (np.diff(long) == 1).all()


@pytest.mark.parametrize("filler", [RepetitiveFiller(), WordFiller()], ids=lambda filler: filler.name)
def test_text_of_a_filler(filler):
    text = FillerText(filler, LETTERS)
    ids = text.draw(np.random.default_rng(1), 500)
    assert len(ids) == 500
    assert (ids == text.draw(np.random.default_rng(1), 500)).all()
    words = set(re.findall(r"[A-Za-z]+", decode(LETTERS, ids))[:-1])
    units = filler.units(random.Random(0))
    known = set(re.findall(r"[A-Za-z]+", "".join(next(units) for _ in range(90000))))
    assert words <= known
