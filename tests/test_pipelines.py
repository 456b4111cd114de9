# SPDX-License-Identifier: Apache-2.0
"""`pipeline("text-generation")` with chats that are far longer than the window and than the base's range."""

import logging

import pytest
import torch
from generating import never_ending
from tiny import WINDOW, chat_tokenizer, rcc_model, tokens, words
from transformers import AutoTokenizer, LlamaForCausalLM, TextIteratorStreamer, TextStreamer, pipeline
from transformers.utils import logging as transformers_logging

from rcc_hf.checkpoints import load_tokenizer
from rcc_hf.cli import main

NEW = 6
HEAD = 5  # tokens of the system prompt: a role, two words, an end token, and one behind it
SETTINGS = {"max_new_tokens": NEW, "do_sample": False}
# what pipelines of the lowest transformers that we support say of their own arguments, whatever the model
EVERY_PIPELINE = ("Both `max_new_tokens`", "Passing `generation_config` together with")


def messages(length, seed=0):
    """A chat of about `length` tokens that asks something at its end."""
    ids = tokens(1, length, seed=seed)[0]
    chat = [{"role": "system", "content": "w100 w101"}]
    for start in range(0, length, 50):
        chat.append({"role": "user", "content": words(ids[start : start + 25])})
        chat.append({"role": "assistant", "content": words(ids[start + 25 : start + 50])})
    return [*chat, {"role": "user", "content": "w9"}]


LONG, SHORT, MIDDLE = messages(800), messages(50, 1), messages(300, 2)


@pytest.fixture(scope="module")
def model():
    return never_ending(rcc_model())


@pytest.fixture
def generator(model):
    return pipeline("text-generation", model=model, tokenizer=chat_tokenizer())


@pytest.fixture(autouse=True)
def warnings_of_transformers():
    """Whatever transformers logs at the level that users see; nothing may be."""
    seen = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: record.getMessage().startswith(EVERY_PIPELINE) or seen.append(record.getMessage())
    logger, level = logging.getLogger("transformers"), transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)
    transformers_logging.set_verbosity(level)
    assert seen == []


def prompt_of(chat):
    encoded = chat_tokenizer().apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    return encoded["input_ids"]


def expected(model, chat, head_length=0):
    """What the model says behind the compressed beginning of a chat."""
    ids = prompt_of(chat)
    cut = head_length + max(0, -(-(ids.shape[1] - head_length - WINDOW) // 16) * 16)
    memory = None if cut == head_length else model.compress(ids[:, :cut], head_length=head_length)
    prompt = ids if memory is None else ids[:, cut:]
    return words(model.generate(prompt, memory=memory, **SETTINGS)[0, prompt.shape[1] :])


def test_a_list_of_messages(model, generator):
    assert prompt_of(LONG).shape[1] > model.config.max_positions > 10 * WINDOW
    chat = generator(LONG, **SETTINGS)[0]["generated_text"]
    reply = expected(model, LONG)
    assert chat == [*LONG, {"role": "assistant", "content": reply}]
    assert generator(LONG, return_full_text=False, **SETTINGS) == [{"generated_text": reply}]


@pytest.mark.parametrize("way", ["call", "configuration"])
def test_the_system_prompt_as_head(model, generator, way):
    settings = {"return_full_text": False, **SETTINGS}
    if way == "call":
        reply = generator(LONG, head_length=HEAD, **settings)[0]["generated_text"]
    else:
        model.config.head_length = HEAD
        try:
            reply = generator(LONG, **settings)[0]["generated_text"]
        finally:
            model.config.head_length = 0
    assert reply == expected(model, LONG, HEAD) != expected(model, LONG)


@pytest.mark.parametrize("head_length", [0, HEAD])
def test_a_batch_of_chats_is_each_alone(model, generator, head_length):
    chats = [SHORT, LONG, MIDDLE, messages(640, 3)]
    settings = {"return_full_text": False, "head_length": head_length, "batch_size": 3, **SETTINGS}
    replies = [one["generated_text"] for (one,) in generator(chats, **settings)]
    assert replies == [expected(model, chat, head_length) for chat in chats]


@pytest.mark.parametrize("kind", [TextStreamer, TextIteratorStreamer])
def test_streaming(model, generator, kind, capsys):
    streamer = kind(generator.tokenizer, skip_prompt=True)
    generator(LONG, streamer=streamer, **SETTINGS)
    printed = capsys.readouterr().out if kind is TextStreamer else "".join(streamer)
    assert printed.strip() == expected(model, LONG)


def test_generating_past_the_window(model, generator):
    settings = {"max_new_tokens": 3 * WINDOW, "do_sample": False, "rolling": True, "head_length": HEAD}
    bounded = {"max_slots": 40, "when_full": "recompress", **settings}
    for arguments in (settings, bounded):
        reply = generator(LONG, return_full_text=False, **arguments)[0]["generated_text"]
        ids = prompt_of(LONG)
        assert reply == words(model.generate(ids, **arguments)[0, ids.shape[1] :])


def test_a_message_that_is_begun_is_gone_on_with(model, generator):
    chat = [*LONG, {"role": "assistant", "content": "w77 w78"}]
    ids = torch.cat([prompt_of(LONG), torch.tensor([[77, 78]])], 1)
    whole = generator(chat, **SETTINGS)[0]["generated_text"]
    new = words(model.generate(ids, **SETTINGS)[0, ids.shape[1] :])
    assert whole[-1]["content"] == "w77 w78" + new


def test_a_tokenizer_with_the_limit_of_its_base_warns(generator, warnings_of_transformers):
    """Why checkpoints are written with a tokenizer without limit."""
    generator.tokenizer.model_max_length = 512
    generator(LONG, **SETTINGS)
    assert len(warnings_of_transformers) == 1
    assert "longer than the specified maximum sequence length" in warnings_of_transformers.pop()


def test_a_checkpoint_of_the_command_line_has_no_limit(tmp_path, model):
    base = model.model.language_model
    (tmp_path / "base").mkdir()
    tokenizer = chat_tokenizer()
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(tmp_path / "base")
    LlamaForCausalLM(base.config).save_pretrained(tmp_path / "base")
    settings = ["--segment-length", "16", "--ratio", "4", "--window", "32"]
    assert main(["convert", str(tmp_path / "base"), str(tmp_path / "model"), *settings]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "base").model_max_length == 512
    generator = pipeline("text-generation", model=str(tmp_path / "model"), trust_remote_code=True)
    assert len(generator(LONG, return_full_text=False, **SETTINGS)[0]["generated_text"].split()) == NEW
    assert load_tokenizer(generator.model, str(tmp_path / "base")).model_max_length == 10**30
