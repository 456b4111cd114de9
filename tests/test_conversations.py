# SPDX-License-Identifier: Apache-2.0
"""Conversations turn by turn: all that the turns add is what the chat template makes of the whole."""

import pytest
from tiny import chat_tokenizer, tokenizer
from transformers import AutoTokenizer

from rcc_hf.conversations import Conversation
from rcc_hf.smollm import smollm2_path

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{% set content = m.content %}{% if m.role == 'assistant' and loop.last %}"
    "{% set content = '<think>\n\n</think>\n\n' + content %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""What the last reply thought is rendered, what earlier ones thought is not."""
BRACKETS = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% if messages[0].role != 'user' %}{{ raise_exception('the first message must be the user\\'s') }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + '<|im_end|>' }}{% endif %}{% endfor %}"
)
"""As Llama 2 has it: the system prompt within the first message, a blank in front of replies."""
WANDERING = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system if loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)
"""As Mistral has it: the system prompt within the last message."""
COUNTING = "{{ messages | length }}{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}" + CHATML
DEAF = (
    "{% for m in messages if m.role != 'system' %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

SYSTEM = "You answer\n in one word."
TURNS = [("Hello, who are you?", "I am a model."), ("  And\n\nthen? ", "Ünïcode 🙂"), ("/bye <b>", "Bye!\n"), ("?", "")]


@pytest.fixture(scope="module")
def bundled():
    return AutoTokenizer.from_pretrained(smollm2_path())


def with_template(bundled, template):
    made = AutoTokenizer.from_pretrained(bundled.name_or_path)
    made.chat_template = template
    return made


def concatenated(tokenizer, turns, system, ends, cut=()):
    """All tokens of a conversation, of which some replies were cut off before their end token."""
    conversation, ids = Conversation(tokenizer, system), []
    for i, (user, reply) in enumerate(turns):
        ids += conversation.next_turn(user) if ids else conversation.first_turn(user)
        new = tokenizer(reply, add_special_tokens=False)["input_ids"] + ([] if i in cut else ends[:1])
        ids += new + conversation.close_turn(new, ends)
    return ids, conversation


def whole(tokenizer, turns, system):
    messages = [] if system is None else [{"role": "system", "content": system}]
    for user, reply in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize("system", [None, "w9 w10"])
@pytest.mark.parametrize("cut", [(), (1,), (0, 1, 2)])
def test_turns_of_the_tiny_tokenizer(system, cut):
    turns, tiny = [("w20 w21", "w30"), ("w22", "w31 w32"), ("w23 w24", "w33")], chat_tokenizer()
    ids, conversation = concatenated(tiny, turns, system, [2], cut)
    assert ids == whole(tiny, turns, system)
    assert conversation.end_ids == [2]
    assert conversation.head_length == (0 if system is None else 5)


@pytest.mark.real
@pytest.mark.parametrize("template", ["its own", CHATML], ids=["its own", "ChatML"])
@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize("cut", [(), (0, 2)])
def test_turns_of_a_real_tokenizer(bundled, template, system, cut):
    """Line breaks behind end tokens stand where the template has them, and whole tokens, not texts, are equal."""
    tokenizer = bundled if template == "its own" else with_template(bundled, template)
    ids, conversation = concatenated(tokenizer, TURNS, system, [bundled.eos_token_id], cut)
    assert ids == whole(tokenizer, TURNS, system)
    assert conversation.end_ids == [bundled.eos_token_id]
    head = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    assert tokenizer.decode(ids[: conversation.head_length]) == head


@pytest.mark.real
def test_a_template_that_drops_what_was_thought(bundled):
    """Replies stay as they were written, here without thoughts, with which the template has nothing to drop."""
    tokenizer = with_template(bundled, THINKING)
    ids, _ = concatenated(tokenizer, TURNS, SYSTEM, [bundled.eos_token_id])
    expected = whole(with_template(bundled, CHATML), TURNS, SYSTEM)
    assert ids == expected


@pytest.mark.real
def test_a_system_prompt_within_the_first_message(bundled):
    tokenizer = with_template(bundled, BRACKETS)
    turns = [("Hello", "Hi"), ("And?", "No.")]
    ids, conversation = concatenated(tokenizer, turns, SYSTEM, [bundled.eos_token_id])
    text = tokenizer.decode(whole(tokenizer, turns, SYSTEM))
    assert tokenizer.decode(ids) == text.replace("[/INST] ", "[/INST]")  # that blank is the model's to write
    assert tokenizer.decode(ids[: conversation.head_length]).startswith(f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>")
    assert Conversation(tokenizer).head_length == 0


@pytest.mark.real
@pytest.mark.parametrize(
    ("template", "system", "words"),
    [
        (None, None, "has no chat template.*rcc generate"),
        (WANDERING, SYSTEM, "cannot take back what it has seen .*leave the system prompt out"),
        (COUNTING, None, "cannot take back what it has seen"),
        (NO_SYSTEM, SYSTEM, "the chat template refuses messages of system, user, assistant: no system prompts"),
        (DEAF, SYSTEM, "does not put the system prompt in front of the first message"),
    ],
    ids=["none", "wandering", "counting", "no system", "deaf"],
)
def test_templates_that_cannot_be_streamed(bundled, template, system, words):
    with pytest.raises(ValueError, match=words):
        Conversation(with_template(bundled, template), system)


@pytest.mark.real
@pytest.mark.parametrize("template", [WANDERING, NO_SYSTEM], ids=["wandering", "no system"])
def test_they_can_without_a_system_prompt(bundled, template):
    tokenizer = with_template(bundled, template)
    assert concatenated(tokenizer, TURNS, None, [bundled.eos_token_id])[0] == whole(tokenizer, TURNS, None)


def test_no_chat_template():
    with pytest.raises(ValueError, match="has no chat template"):
        Conversation(tokenizer())
