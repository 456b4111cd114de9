# SPDX-License-Identifier: Apache-2.0
"""Conversations: which tokens the assistant wrote, whatever the template, and where the compressed part ends."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from objective_data import CHATML, EOS, chat_tokenizer, decode, labelled, same, shape
from test_conversations import BRACKETS, COUNTING, THINKING
from transformers import AutoTokenizer

from rcc_hf.objectives import IGNORED, Conversations
from rcc_hf.objectives.turns import _mark, closing_id, encode_conversation
from rcc_hf.smollm import smollm2_path
from rcc_hf.texts import ChatRow

TURNS = [("Hello, who are you?", "I am a model."), ("  And\n\nthen? ", "Ünïcode 🙂"), ("Bye <b>", " Bye!\n"), ("?", "")]
MARKED = CHATML.replace(
    "m.content + '<|im_end|>\n' }}",
    "'' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
CHANGED = "{% for m in messages %}{{ m.role + ': ' + m.content.upper() + '<|im_end|>' }}{% endfor %}"


def messages(turns=TURNS, system=None):
    made = [] if system is None else [{"role": "system", "content": system}]
    for user, reply in turns:
        made += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    return made


def replies_of(tokenizer, ids, is_reply):
    """Texts of the runs of reply tokens."""
    edges = np.flatnonzero(np.diff(is_reply.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [tokenizer.decode(ids[first:last].tolist()) for first, last in edges]


@pytest.mark.parametrize("template", [CHATML, MARKED, THINKING], ids=["chatml", "marked", "thinking"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_replies_and_their_ends_are_marked(template, system):
    tokenizer = chat_tokenizer(template)
    ids, is_reply = encode_conversation(tokenizer, messages(system=system))
    whole = tokenizer.apply_chat_template(messages(system=system), tokenize=True, return_dict=True)["input_ids"]
    assert ids.tolist() == whole
    assert replies_of(tokenizer, ids, is_reply) == [f"{reply}<|im_end|>" for _, reply in TURNS]


def test_a_template_that_strips_replies():
    tokenizer = chat_tokenizer(BRACKETS)
    ids, is_reply = encode_conversation(tokenizer, messages())
    found = replies_of(tokenizer, ids, is_reply)
    assert found == [f"{reply.strip()}<|im_end|>" for _, reply in TURNS]


def test_a_template_without_end_tokens():
    tokenizer = chat_tokenizer(PLAIN)
    ids, is_reply = encode_conversation(tokenizer, messages(TURNS[:2]))
    assert replies_of(tokenizer, ids, is_reply) == [reply for _, reply in TURNS[:2]]
    assert closing_id(tokenizer, EOS) == EOS


def test_a_token_that_reaches_beyond_a_reply_is_not_of_it_and_one_with_the_blank_in_front_is():
    offsets = np.array([[0, 3], [3, 6], [6, 9]])
    marked = partial(_mark, chat_tokenizer(), np.array([97, 98, 99]), offsets)
    assert marked([(3, 8)]).tolist() == [False, True, False]
    assert marked([(4, 9)]).tolist() == [False, True, True]


@pytest.mark.real
def test_replies_of_a_real_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    ids, is_reply = encode_conversation(tokenizer, messages(system="Be brief."))
    assert replies_of(tokenizer, ids, is_reply) == [f"{reply}<|im_end|>" for _, reply in TURNS]
    assert closing_id(tokenizer, -1) == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_template_that_changes_replies_or_refuses_messages():
    with pytest.raises(ValueError, match="changes what the assistant wrote"):
        encode_conversation(chat_tokenizer(CHANGED), messages())
    with pytest.raises(ValueError, match="refuses messages of assistant, user"):
        encode_conversation(chat_tokenizer(BRACKETS), messages()[::-1][:2])
    assert encode_conversation(chat_tokenizer(COUNTING), messages())[1].any()


LONG = ChatRow(messages=tuple(messages([(f"Question {i}?", f"Answer {i}.") for i in range(12)])))
SHORT = ChatRow(messages=tuple(messages(TURNS[:1])))


def talking(rows=(LONG, SHORT), **options):
    return Conversations(rows, chat_tokenizer(), progress=False, **options)


def draws(objective, count=40, of=None):
    return [objective.example(np.random.default_rng([3, i]), of or shape(3, 64)) for i in range(count)]


def test_early_turns_are_compressed_and_later_replies_predicted():
    tokenizer, whole = chat_tokenizer(), None
    whole = decode(tokenizer, tokenizer.apply_chat_template(list(LONG.messages), return_dict=True)["input_ids"])
    starts = set()
    for example in draws(talking(max_local=150), 100):
        context, local = decode(tokenizer, example["context_ids"]), decode(tokenizer, example["input_ids"])
        assert len(example["context_ids"]) == 3 * 64
        assert len(example["input_ids"]) <= 150
        assert context + local in whole
        assert len(labelled(example)) >= 1
        starts.add(whole.index(context))
        written = decode(tokenizer, labelled(example))
        assert re.fullmatch(r"[^<]*(<\|im_end\|>(Answer \d+\.<\|im_end\|>)*(A[^<]*)?)?", written), written
        assert "Question" not in written
        replies = re.findall(r"assistant\n(Answer \d+\.<\|im_end\|>)", local)
        assert all(reply in written for reply in replies)
    assert 0 in starts
    assert len(starts) > 3
    ends = re.finditer(r"<\|im_end\|>\n<\|im_start\|>user", whole)
    assert starts <= {0, *(end.start() + len("<|im_end|>") for end in ends)}


def test_the_first_local_token_is_given_also_where_a_reply_is_cut():
    assert all(example["labels"][0] == IGNORED for example in draws(talking(), 60))


def test_the_same_generator_gives_the_same_example_and_other_ones_others():
    one, other = talking(), talking()
    made = [one.example(np.random.default_rng(i), shape(3, 64)) for i in range(8)]
    assert all(same(e, other.example(np.random.default_rng(i), shape(3, 64))) for i, e in enumerate(made))
    assert len({tuple(e["context_ids"].tolist()) for e in made}) > 1


def test_a_teacher_reads_the_whole_conversation():
    for example in draws(talking(distill=True), 10):
        assert torch.equal(example["teacher_ids"], torch.cat([example["context_ids"], example["input_ids"]]))
        assert labelled(example) == labelled(example, "teacher_")


def test_what_a_conversation_is_about_is_compressed_alone():
    tokenizer = chat_tokenizer()
    about = ChatRow(context="The key is under the mat. " * 4, messages=tuple(messages(TURNS[:2])))
    whole = tokenizer.apply_chat_template(list(about.messages), return_dict=True)["input_ids"]
    for example in draws(talking([about], distill=True), 3, shape(2, 64)):
        text = tokenizer(about.context)["input_ids"]
        assert example["context_ids"].tolist() == text + [EOS] * (128 - len(text))
        assert example["input_ids"].tolist() == whole
        assert decode(tokenizer, labelled(example)) == "".join(f"{reply}<|im_end|>" for _, reply in TURNS[:2])
        assert example["teacher_ids"].tolist() == text + whole
    with pytest.raises(ValueError, match="no conversation has a reply within 512 tokens behind a context of 192"):
        draws(talking([about]), 1, shape(3, 64))


def test_an_end_alone_is_not_enough_since_the_first_local_token_is_given():
    ids, is_reply = encode_conversation(chat_tokenizer(), SHORT.messages)
    last = int(is_reply.nonzero()[0][-1])
    with pytest.raises(ValueError, match="no conversation has a reply"):
        draws(talking([SHORT]), 1, shape(1, last, 1))
    assert labelled(draws(talking([SHORT]), 1, shape(1, last - 1, 1))[0]) == [ids[last]]


def test_conversations_that_are_too_short_are_named():
    with pytest.raises(ValueError, match=r"behind a context of 1600.*the longest has \d+ tokens"):
        draws(talking(), 1, shape(25, 64))
    with pytest.raises(ValueError, match="no conversations"):
        talking([])
    with pytest.raises(ValueError, match="conversation 2: the chat template refuses"):
        Conversations(
            [SHORT, ChatRow(messages=({"role": "assistant", "content": "x"},))],
            chat_tokenizer(BRACKETS),
            progress=False,
        )
