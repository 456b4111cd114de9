# SPDX-License-Identifier: Apache-2.0
"""Questions and instructions about compressed contexts: where the answer stands, and how it is asked for."""

import numpy as np
import pytest
import torch
from evaluating import byte_tokenizer
from objective_data import (
    EOS,
    chat_tokenizer,
    decode,
    labelled,
    local_parts,
    prose_shards,
    questions,
    same,
    shape,
)

from rcc_hf.evaluation.benchmark_qa import questions as evaluation_questions
from rcc_hf.evaluation.encoding import TextEncoder
from rcc_hf.evaluation.examples import Example
from rcc_hf.objectives import IGNORED, Instructions, QuestionAnswering, ShardText
from rcc_hf.objectives.gold import contains
from rcc_hf.objectives.instructions import FOLLOW_CUE, REPEAT_CUE
from rcc_hf.objectives.prompting import Prompter, encode_behind
from rcc_hf.texts import QARow

ROWS = questions()
LETTERS = chat_tokenizer()


def answering(rows=ROWS, tokenizer=LETTERS, **options):
    return QuestionAnswering(rows, tokenizer, progress=False, **options)


def draws(objective, count=40, of=None):
    return [objective.example(np.random.default_rng([3, i]), of or shape(4, 64)) for i in range(count)]


def asked(example, rows=ROWS):
    """The row that an example asks about."""
    prompt = decode(LETTERS, example["input_ids"])
    return next(row for row in rows if row.question in prompt)


def evaluation_prompt(row, chat=False):
    (made,) = evaluation_questions({"context": row.context, "question": row.question, "answers": list(row.answers)}, "")
    return TextEncoder(LETTERS, chat=chat)(made)[1]


def test_the_same_generator_gives_the_same_example():
    one, other = answering(), answering()
    for seed in range(5):
        example = one.example(np.random.default_rng(seed), shape(4, 64))
        assert same(example, other.example(np.random.default_rng(seed), shape(4, 64)))
    assert not same(example, one.example(np.random.default_rng(0), shape(4, 64)))


@pytest.mark.parametrize("haystack", [None, "text"])
@pytest.mark.parametrize("num_segments", [2, 5])
def test_contexts_are_whole_segments_with_one_passage_that_has_the_answer(haystack, num_segments):
    surrounding = ShardText(prose_shards(LETTERS)) if haystack else None
    places = []
    for example in draws(answering(haystack=surrounding), 60, shape(num_segments, 64)):
        text, row = decode(LETTERS, example["context_ids"]), asked(example)
        assert len(example["context_ids"]) == num_segments * 64
        assert text.count(row.context) == 1
        assert text.count(row.answers[0]) == 1
        assert EOS not in example["context_ids"]
        places.append(text.index(row.context) / (len(text) - len(row.context)))
    assert min(places) < 0.1
    assert max(places) > 0.9
    assert 0.3 < np.mean(places) < 0.7


def test_passages_are_set_apart_and_only_one_is_cut():
    for example in draws(answering(), 40, shape(6, 64)):
        passages = decode(LETTERS, example["context_ids"]).strip("\n").split("\n\n")
        whole = [passage for passage in passages if any(passage == row.context for row in ROWS)]
        cut = [passage for passage in passages if passage not in whole]
        assert len(cut) <= 1
        assert all(any(row.context.startswith(passage) for row in ROWS) for passage in cut)


@pytest.mark.parametrize("chat", [False, True])
def test_the_prompt_is_that_of_evaluation_and_the_answer_ends(chat):
    for example in draws(answering(chat_share=float(chat)), 10):
        row = asked(example)
        prompt = evaluation_prompt(row, chat)
        assert torch.equal(example["input_ids"][: len(prompt)], prompt)
        assert (example["labels"][: len(prompt)] == IGNORED).all()
        end = LETTERS.convert_tokens_to_ids("<|im_end|>") if chat else EOS
        # the second answer does not stand in the context, so it is not asked for
        assert labelled(example) == [*LETTERS(" " + row.answers[0])["input_ids"], end]
        assert len(labelled(example)) + len(prompt) == len(example["input_ids"])


def test_chat_and_plain_are_mixed_by_their_share():
    starts = [decode(LETTERS, e["input_ids"]).startswith("<|im_start|>") for e in draws(answering(chat_share=0.3), 200)]
    assert 0.2 < np.mean(starts) < 0.4


def test_a_row_with_a_prefix_is_phrased_already():
    row = QARow(context=ROWS[0].context, question="\n\nWhich number? ", answer_prefix="It is", answers=("700",))
    example = draws(answering([row, *ROWS[1:3]]), 30)
    prompts = {local_parts(LETTERS, e) for e in example}
    made = Example(context="c", question=row.question, answer_prefix="It is", answer="700", max_new_tokens=3)
    assert (decode(LETTERS, TextEncoder(LETTERS)(made)[1]), " 700</s>") in prompts
    bare = draws(answering(template=None), 1)[0]
    assert local_parts(LETTERS, bare)[0] == asked(bare).question


def test_one_of_the_answers_is_drawn():
    row = QARow(context="A1 and A2 are here.", question="Which?", answers=("A1", "A2", "A3"))
    objective = answering([row, *ROWS])
    found = {local_parts(LETTERS, e)[1] for e in draws(objective, 200) if "Which?" in decode(LETTERS, e["input_ids"])}
    assert found == {" A1</s>", " A2</s>"}


@pytest.mark.parametrize("num_segments", [1, 2])
def test_a_passage_alone_is_padded_and_its_teacher_is_not(num_segments):
    objective, size = answering(alone_share=1.0, distill=True), 96 // num_segments
    for example in draws(objective, 20, shape(num_segments, size)):
        row = asked(example)
        text = LETTERS(row.context)["input_ids"]
        assert example["context_ids"].tolist() == text + [EOS] * (num_segments * size - len(text))
        assert example["teacher_ids"].tolist() == text + example["input_ids"].tolist()
        assert labelled(example) == labelled(example, "teacher_")


def test_where_no_passage_is_of_the_length_others_stand_around():
    for example in draws(answering(alone_share=1.0), 5, shape(6, 64)):
        assert EOS not in example["context_ids"]


def test_the_share_of_passages_alone():
    padded = [EOS in e["context_ids"] for e in draws(answering(alone_share=0.5), 200, shape(1, 128))]
    assert 0.4 < np.mean(padded) < 0.6


def test_a_teacher_has_as_many_labels():
    for chat in (0.0, 1.0):
        for example in draws(answering(distill=True, chat_share=chat), 5):
            assert labelled(example) == labelled(example, "teacher_")
            context = len(example["context_ids"])
            assert torch.equal(example["teacher_ids"][:context], example["context_ids"])
            assert torch.equal(example["teacher_ids"][context:], example["input_ids"])


def test_a_long_answer_is_cut_and_does_not_end():
    example = draws(answering(max_answer=2), 1)[0]
    assert labelled(example) == LETTERS(" 7")["input_ids"]


def test_the_own_passage_is_no_distractor_also_where_its_answer_is_in_other_words():
    rows = [
        QARow(context=f"Text {i} is about {what}.", question=f"{i}?", answers=("Something.",))
        for i, what in enumerate(("a cat", "two dogs", "nothing"))
    ]
    for example in draws(answering(rows), 20):
        row = asked(example, rows)
        assert decode(LETTERS, example["context_ids"]).count(row.context) == 1


def test_passages_that_all_have_the_answer_and_passages_that_are_too_long():
    rows = [QARow(context=f"Text {i} says yes.", question="Really?", answers=("yes",)) for i in range(3)]
    with pytest.raises(ValueError, match="passages without their answers"):
        draws(answering(rows), 1)
    with pytest.raises(ValueError, match="no passage fits a context of 16 tokens, the shortest has"):
        draws(answering(), 1, shape(1, 16))
    with pytest.raises(ValueError, match="no questions"):
        answering([])


def test_an_answer_is_found_as_whole_words():
    assert contains("In (1984), he", ["1984"])
    assert contains("the NILE flows", ["Danube", "Nile"])
    assert not contains("In 19841, he", ["1984"])
    assert not contains("anything", [])


def test_what_a_prompt_needs():
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        Prompter(endless)
    with pytest.raises(ValueError, match="chat needs a chat template"):
        Prompter(byte_tokenizer(), chat_share=0.5)
    with pytest.raises(ValueError, match="chat_share is 2"):
        Prompter(LETTERS, chat_share=2)


class Greedy:
    """Its tokens are pairs of letters, from the left."""

    def __call__(self, text, **kwargs):
        return {"input_ids": [hash(text[i : i + 2]) % 1000 for i in range(0, len(text), 2)]}


def test_tokens_that_would_reach_across_do_not():
    greedy = Greedy()
    first, second = encode_behind(greedy, "abcd", "ef")
    assert [*first, *second] == greedy("abcdef")["input_ids"]
    first, second = encode_behind(greedy, "abc", "def")
    assert first.tolist() == greedy("abc")["input_ids"]
    assert second.tolist() == greedy("def")["input_ids"]


# instructions


def instructing(mode, **options):
    return Instructions(ROWS, LETTERS, mode=mode, progress=False, **options)


def compressed_instruction(row):
    (made,) = evaluation_questions({"context": row.context, "question": row.question, "answers": list(row.answers)}, "")
    return made.question.strip()


def row_of_answer(example):
    answer = decode(LETTERS, labelled(example))
    return next(row for row in ROWS if row.answers[0] in answer)


@pytest.mark.parametrize("mode", ["reconstructed", "compressed"])
def test_an_instruction_is_compressed_in_front_or_behind(mode):
    first = []
    for example in draws(instructing(mode), 40, shape(6, 64)):
        text, row = decode(LETTERS, example["context_ids"]), row_of_answer(example)
        instruction = compressed_instruction(row)
        assert len(text) == 6 * 64
        assert text.count(row.context) == 1
        assert text.startswith(instruction + "\n\n") or text.endswith("\n\n" + instruction)
        first.append(text.startswith(instruction))
    assert 8 < sum(first) < 32


def test_the_decoder_writes_the_instruction_and_then_the_answer():
    for example in draws(instructing("reconstructed"), 5, shape(6, 64)):
        row = row_of_answer(example)
        given, written = local_parts(LETTERS, example)
        assert given == REPEAT_CUE
        assert written == f"{compressed_instruction(row)}\nAnswer: {row.answers[0]}</s>"


def test_in_a_chat_it_writes_the_message_that_evaluation_would_type():
    for example in draws(instructing("reconstructed", chat_share=1.0), 5, shape(6, 64)):
        row = row_of_answer(example)
        given, written = local_parts(LETTERS, example)
        assert given == "<|im_start|>user\n"
        prompt = decode(LETTERS, evaluation_prompt(row, chat=True))
        assert given + written == f"{prompt} {row.answers[0]}<|im_end|>"


def test_a_typed_instruction_is_a_question():
    for example in draws(instructing("typed"), 5):
        row = row_of_answer(example)
        assert compressed_instruction(row) not in decode(LETTERS, example["context_ids"])
        assert torch.equal(example["input_ids"][: -len(labelled(example))], evaluation_prompt(row))


def test_a_compressed_instruction_is_not_typed():
    for example in draws(instructing("compressed"), 5, shape(6, 64)):
        row = row_of_answer(example)
        assert local_parts(LETTERS, example) == (f"{FOLLOW_CUE}Answer:", f" {row.answers[0]}</s>")


@pytest.mark.parametrize("mode", ["reconstructed", "typed", "compressed"])
@pytest.mark.parametrize("alone", [0.0, 1.0])
def test_teachers_of_instructions(mode, alone):
    size = 256 if mode != "typed" else 128
    for example in draws(instructing(mode, distill=True, alone_share=alone), 8, shape(1, size)):
        context, teacher = example["context_ids"], example["teacher_ids"]
        text = context[context != EOS] if alone else context
        assert len(context) == size
        assert (len(text) < size) == bool(alone)
        assert torch.equal(teacher, torch.cat([text, example["input_ids"]]))
        assert labelled(example) == labelled(example, "teacher_")


def test_an_unknown_mode():
    with pytest.raises(ValueError, match="mode is 'sung'; it must be one of reconstructed, typed, compressed"):
        instructing("sung")
