# SPDX-License-Identifier: Apache-2.0
"""`rcc chat`: conversations from standard input, longer than any window, kept and gone on with."""

import io
import re
import sys

import pytest
import torch
from tiny import SEGMENT, chat_tokenizer, rcc_model, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from rcc_hf import RCCMemory, RCCStream
from rcc_hf.cli import main
from rcc_hf.smollm import smollm2_path

TURNS = [f"w{20 + i} w{40 + i} w{60 + i}" for i in range(12)]
STATUS = re.compile(
    r"^\[([\d,]+) tokens seen: (\d+) slots and (\d+) raw tokens, ([\d,]+) bytes; "
    r"KV cache ([\d,]+) bytes, plain ([\d,]+)\]$"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint whose replies end with an end token (at their last place), as those of a trained model do."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    model = rcc_model(dtype=torch.float32)
    model.generation_config.forced_eos_token_id = 2
    model.generation_config.suppress_tokens = [0, 1]
    model.save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def chat(checkpoint, monkeypatch, capsys):
    """Runs a conversation; returns status, output and errors, and takes down what the model wrote."""
    written = []
    generate = RCCStream.generate

    def watch(self, *args, **kwargs):
        written.append(generate(self, *args, **kwargs))
        return written[-1]

    monkeypatch.setattr(RCCStream, "generate", watch)

    def run(lines, *arguments, model=checkpoint):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status = main(["chat", model, *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    run.written = written
    return run


def statuses(out):
    """Tokens seen, slots, raw tokens, bytes, bytes of the KV cache, and of a plain one, of every status line."""
    found = [STATUS.match(line) for line in out.splitlines()]
    return [[int(number.replace(",", "")) for number in match.groups()] for match in found if match]


def conversation(turns, written, system=None):
    """Ids of the whole, as the template has it."""
    words, messages = chat_tokenizer(), []
    if system is not None:
        messages.append({"role": "system", "content": system})
    for user, new in zip(turns, written, strict=True):
        reply = new[0].tolist()
        reply = reply[:-1] if reply[-1] == 2 else reply
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": words.decode(reply)}]
    return words.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")["input_ids"]


@pytest.mark.parametrize("system", [None, "w100 w101 w102"])
def test_the_memory_is_that_of_the_whole_conversation(chat, checkpoint, system, tmp_path):
    arguments = [] if system is None else ["--system", system]
    status, out, err = chat(TURNS, *arguments, "--save", tmp_path / "kept", "--max-new-tokens", 7)
    assert (status, "rcc chat" in err) == (0, False)
    ids = conversation(TURNS, chat.written, system)
    memory = RCCMemory.from_pretrained(tmp_path / "kept")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    head = 0 if system is None else 6  # role, three words, end token, and the one behind it
    expected = model.compress(ids, window=model.config.window, head_length=head)
    assert memory.row_tokens == expected.row_tokens == (ids.shape[1],)
    assert torch.equal(memory.head_ids, ids[:, :head])
    assert torch.equal(memory.local_ids, expected.local_ids)
    assert torch.allclose(memory.layers[-1][0], expected.layers[-1][0], atol=1e-5)
    assert statuses(out)[-1][:3] == [ids.shape[1], memory.num_slots, memory.num_local + head]


@pytest.mark.parametrize("most", [3, 7])
def test_replies_are_printed_and_cut_ones_closed(chat, checkpoint, most, tmp_path):
    """A reply of `most` tokens is cut off before it would have ended."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.generation_config.forced_eos_token_id = None
    model.generation_config.suppress_tokens = [0, 1, 2]
    model.save_pretrained(tmp_path / "endless")
    chat_tokenizer().save_pretrained(tmp_path / "endless")
    arguments = ["--save", tmp_path / "kept", "--max-new-tokens", most]
    status, out, _ = chat(TURNS[:3], *arguments, model=str(tmp_path / "endless"))
    assert (status, [len(new[0]) for new in chat.written]) == (0, [most] * 3)
    replies = [line for line in out.splitlines() if not line.startswith(("[", "wrote"))]
    assert replies == [chat_tokenizer().decode(new[0]) for new in chat.written]
    ids = conversation(TURNS[:3], chat.written)
    memory = RCCMemory.from_pretrained(tmp_path / "kept")
    assert torch.equal(memory.local_ids, ids[:, -memory.num_local :])


def test_the_status_line(chat):
    _, out, _ = chat(["w9", "/status"], "--max-new-tokens", 5)
    seen = 4 + 1 + 5 + 1  # role, message, end and what is behind; role; reply with its end; what is behind
    first, second = statuses(out)
    assert first == second
    assert first == [seen, 0, seen, 8 * seen, *[2 * 3 * 2 * 8 * seen * 4] * 2]


@pytest.mark.parametrize("when_full", ["drop", "recompress"])
def test_slots_are_bounded(chat, when_full):
    status, out, _ = chat(TURNS * 3, "--max-slots", 8, "--when-full", when_full, "--max-new-tokens", 9)
    found = statuses(out)
    assert (status, len(found)) == (0, 36)
    assert max(slots for _, slots, *_ in found) <= 8
    assert max(raw for _, _, raw, *_ in found) <= 32
    tokens, _, _, _, kept, plain = found[-1]
    assert tokens == conversation(TURNS * 3, chat.written).shape[1]
    assert plain > 10 * kept


def test_going_on_another_day(chat, tmp_path):
    settings = ["--max-new-tokens", 7, "--max-slots", 12, "--when-full", "recompress"]
    begin = ["--system", "w100 w101"]
    _, whole, _ = chat(TURNS, *begin, *settings, "--save", tmp_path / "whole")
    _, first, _ = chat([*TURNS[:5], f"/save {tmp_path / 'kept'}", "/quit", "w9"], *begin, *settings)
    _, second, _ = chat(TURNS[5:], *settings, "--memory", tmp_path / "kept", "--save", tmp_path / "again")
    replies = [
        [line for line in out.splitlines() if line[0] == "w" and line[1] != "r"] for out in (whole, first, second)
    ]
    assert replies[0] == replies[1] + replies[2]
    memories = [RCCMemory.from_pretrained(tmp_path / name) for name in ("whole", "again")]
    assert torch.equal(memories[0].head_ids, memories[1].head_ids)
    assert torch.equal(memories[0].local_ids, memories[1].local_ids)
    assert torch.allclose(memories[0].layers[-1][0], memories[1].layers[-1][0], atol=1e-5)


def test_a_chat_about_a_compressed_text(chat, checkpoint, tmp_path):
    (tmp_path / "text").write_text(" ".join(f"w{10 + i % 90}" for i in range(3 * SEGMENT)))
    assert main(["compress", checkpoint, str(tmp_path / "text"), str(tmp_path / "memory")]) == 0
    status, out, _ = chat(["w9"], "--memory", tmp_path / "memory", "--max-new-tokens", 5)
    assert status == 0
    assert statuses(out)[-1][:3] == [3 * SEGMENT + 11 + 0, 12, 11]


def test_sampling_is_seeded(chat):
    settings = ["--max-new-tokens", 9, "--temperature", 2.0]
    outs = [chat(TURNS[:4], *settings, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert outs[0] == outs[1] != outs[2]


def test_lines_that_are_no_turns(chat, tmp_path):
    lines = ["", "  ", f"/save {tmp_path / 'early'}", "/later", "/save", "w9", "/quit", "w10"]
    status, out, err = chat(lines, "--max-new-tokens", 5)
    assert status == 2
    assert err.count("rcc chat: ") == 3
    assert "nothing has been said yet" in err
    assert "'/later' is no command: /save DIR keeps the conversation, /status" in err
    assert len(statuses(out)) == len(chat.written) == 1
    assert not (tmp_path / "early").exists()


def test_an_error_costs_one_turn(chat, tmp_path):
    """The second message alone needs more slots than are allowed; it leaves no trace."""
    lines = ["w9", " ".join(["w7"] * 200), "w10"]
    status, out, err = chat(lines, "--max-slots", 8, "--max-new-tokens", 5, "--save", tmp_path / "kept")
    assert status == 2
    assert "max_slots is 8" in err
    ids = conversation(["w9", "w10"], chat.written)
    assert torch.equal(RCCMemory.from_pretrained(tmp_path / "kept").local_ids, ids)
    assert [tokens for tokens, *_ in statuses(out)] == [11, 22]


def test_an_interrupted_reply_costs_one_turn(chat, monkeypatch):
    watched, calls = RCCStream.generate, []

    def interrupt(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return watched(self, *args, **kwargs)

    monkeypatch.setattr(RCCStream, "generate", interrupt)
    status, out, _ = chat(["w9", "w10", "w11"], "--max-new-tokens", 5)
    assert (status, out.count("interrupted"), [tokens for tokens, *_ in statuses(out)]) == (0, 1, [11, 22])


def test_what_is_saved_when_something_breaks(chat, monkeypatch, tmp_path):
    def fail(self):
        raise MemoryError

    monkeypatch.setattr("rcc_hf.cli.chat.Chat.status", fail)
    with pytest.raises(MemoryError):
        chat(["w9"], "--max-new-tokens", 5, "--save", tmp_path / "kept")
    assert RCCMemory.from_pretrained(tmp_path / "kept").num_tokens == 11


def test_a_terminal_is_asked(chat, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(io, "StringIO", Terminal)
    asked = []
    answers = iter(["w9", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or next(answers))
    assert chat([], "--max-new-tokens", 5)[0] == 0
    assert asked == ["> ", "> "]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--system", "w9", "--memory", "m"], "--system begins a conversation and --memory goes on with one"),
        (["--when-full", "drop"], "when_full='drop' has no effect without max_slots"),
        (["--when-full", "forget"], "choose one of error, drop, recompress"),
        (["--ratio", "3"], "ratio=3 does not divide"),
        (["--memory", "absent"], "absent"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(chat, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = chat(["w9"], *arguments)
    assert (status, out, chat.written) == (2, "", [])
    assert message in err


def test_a_tokenizer_without_chat_template(chat, tmp_path):
    rcc_model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    status, _, err = chat(["w9"], model=str(tmp_path / "model"))
    assert status == 2
    assert "rcc chat: the tokenizer has no chat template" in err


@pytest.mark.real
def test_the_bundled_model(chat, tmp_path):
    """Within the window replies are the base's own, whose chat template saw the whole conversation each time."""
    lines = ["What is the capital of France?", "And of Italy?"]
    arguments = ["--segment-length", 64, "--ratio", 4, "--window", 512]
    assert main(["convert", "smollm2", str(tmp_path / "model"), *map(str, arguments), "--dtype", "float32"]) == 0
    status, out, err = chat(lines, "--max-new-tokens", 24, "--system", "Be brief.", model=str(tmp_path / "model"))
    assert (status, "rcc chat" in err) == (0, False)
    words = AutoTokenizer.from_pretrained(smollm2_path())
    base = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=torch.float32)
    messages = [{"role": "system", "content": "Be brief."}]
    for line, new in zip(lines, chat.written, strict=True):
        messages.append({"role": "user", "content": line})
        prompt = words.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        expected = base.generate(**prompt, max_new_tokens=24, do_sample=False)[:, prompt["input_ids"].shape[1] :]
        assert torch.equal(new, expected)
        reply = words.decode(new[0], skip_special_tokens=True)
        assert reply in out
        messages.append({"role": "assistant", "content": reply})
    text = words.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert statuses(out)[-1][0] == len(text)
