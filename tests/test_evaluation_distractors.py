# SPDX-License-Identifier: Apache-2.0
"""Contexts that are filled up with those of other questions: exact lengths, no answers in them, one reading for all."""

import random
from collections import Counter

import pytest
from evaluating import byte_tokenizer, write_rows
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rcc_hf.evaluation.encoding import TextEncoder
from rcc_hf.evaluation.tasks import TaskSettings, build_examples

COLOURS = ("red", "blue", "green", "grey")


def documents(count):
    """Two questions on each document, whose number and colour are the answers."""
    generator = random.Random(0)
    rows = []
    for index in range(count):
        words = " ".join(generator.choice(["wind", "rain", "éclair", "a cloud,", "it"]) for _ in range(20))
        context = f"Box {index} weighs {900 + index} pounds. It is {COLOURS[index % 4]}! {words} {index}."
        for question, answer in (("weighs", str(900 + index)), ("has which colour", COLOURS[index % 4].title())):
            rows.append({"context": context, "question": f"\nBox {index} {question}?", "answer": [answer, "?!"]})
    return [{**row, "max_new_tokens": 4} for row in rows]


def merging_tokenizer():
    """Bytes, but for pairs of letters that are one token: a cut in the middle of one changes the number of tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    pairs = [("a", "i"), ("i", "n"), ("l", "o"), ("Ċ", "Ċ"), (".", "Ċ"), ("Ġ", "i"), ("Ġi", "t")]
    names = [*alphabet, *("".join(pair) for pair in pairs)]
    tokenizer = Tokenizer(BPE({name: index for index, name in enumerate(names)}, pairs))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make(tmp_path, tokenizer, length, rows=None, **settings):
    """Examples without and with other documents, of the same questions."""
    data = write_rows(tmp_path / "qa.jsonl", rows or documents(40))
    given = {"data": data, **settings}
    plain, filled = (
        build_examples("qa", tokenizer, TaskSettings(**given, context_tokens=tokens)) for tokens in (None, length)
    )
    assert [example.question for example in plain] == [example.question for example in filled]
    return plain, filled


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), merging_tokenizer()], ids=["bytes", "pairs"])
@pytest.mark.parametrize("length", [300, 512, 1024])
def test_contexts_have_exactly_the_tokens_and_only_their_own_document_answers(tokenizer, length, tmp_path):
    plain, filled = make(tmp_path, tokenizer, length)
    encode = TextEncoder(tokenizer)
    assert {len(encode(example)[0]) for example in filled} == {length}
    for before, after in zip(plain, filled, strict=True):
        assert (after.metadata["length"], after.metadata["context_tokens"]) == (length, length)
        around = after.context.split(before.context)
        assert len(around) == 2
        others = "".join(around)
        number, colour = (line.answers[0] for line in plain if line.context == before.context)
        assert number not in others
        assert colour.lower() not in others
        parts = after.context.split("\n\n")
        assert len(parts) == after.metadata["documents"] > 1
        assert parts.index(before.context) == after.metadata["own_document"]
        # whole documents of the others, but for the last, which has lost its end
        known = {example.context for example in plain}
        assert len([part for part in parts if part not in known]) <= 1
    places = Counter(example.metadata["own_document"] for example in filled)
    assert set(places) >= set(range(filled[0].metadata["documents"]))


def test_distractors_are_those_of_the_context_and_the_seed(tmp_path):
    tokenizer = byte_tokenizer()
    _, first = make(tmp_path, tokenizer, 600)
    _, again = make(tmp_path, tokenizer, 600)
    assert first == again
    assert first[0].context == first[1].context  # two questions, one reading
    assert len({example.context for example in first}) == 40
    _, some = make(tmp_path, tokenizer, 600, num_examples=5)
    assert all(example in first for example in some)
    _, other = make(tmp_path, tokenizer, 600, seed=7)
    assert not {example.context for example in first} & {example.context for example in other}


def test_closed_answers_are_no_text_to_look_for(tmp_path):
    rows = [{"context": f"No, {i}, maybe.", "question": f"{i}?", "answer": "No", "max_new_tokens": 1} for i in range(9)]
    _, filled = make(tmp_path, byte_tokenizer(), 60, rows)
    assert all(example.metadata["documents"] > 2 for example in filled)


def test_a_context_that_is_full_stays_as_it_is(tmp_path):
    rows = documents(4)
    plain, _ = make(tmp_path, byte_tokenizer(), 200, rows)
    length = len(TextEncoder(byte_tokenizer())(plain[0])[0])
    _, filled = make(tmp_path, byte_tokenizer(), length, rows[:2])
    assert filled[0].context == plain[0].context
    assert filled[0].metadata["documents"] == 1


@pytest.mark.parametrize(
    ("task", "length", "message"),
    [
        ("qa", 9999, r"context_tokens is 9999, and a context with the 9 others that do not hold its answers has \d+"),
        ("qa", 30, r"context_tokens is 30, and the context of 'Box 0 weighs\?' alone has \d+; give at least so many"),
        ("qa", 0, "context_tokens is 0; it must be at least 1"),
        ("passkey", 300, r"context_tokens fills up contexts of qa, not of passkey; .*\(lengths may be meant\)"),
    ],
)
def test_what_cannot_be_filled_is_refused(task, length, message, tmp_path):
    # of thirteen documents, the first and three others are red
    data = write_rows(tmp_path / "qa.jsonl", documents(13))
    with pytest.raises(ValueError, match=message):
        build_examples(task, byte_tokenizer(), TaskSettings(data=data, context_tokens=length))


@pytest.mark.real
def test_real_tokens_make_whole_segments(tmp_path):
    from rcc_hf.smollm import smollm2_path

    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    _, filled = make(tmp_path, tokenizer, 1024)
    assert {len(TextEncoder(tokenizer)(example)[0]) for example in filled} == {1024}
