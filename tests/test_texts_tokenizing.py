# SPDX-License-Identifier: Apache-2.0
"""Token shards on disk: what is written, whoever writes it and however often it is killed; memory; refusals."""

import json
import os
import pickle
import signal
import subprocess
import sys
import tracemalloc
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from evaluating import byte_tokenizer
from tiny import base_model, rcc_model
from tiny import tokenizer as word_tokenizer

import rcc_hf
from rcc_hf.cli import main
from rcc_hf.texts import Document, TokenShards, Windows, build_shards, read_documents, tokenize_documents
from rcc_hf.texts.encoding import encode_documents

TEXTS = [f"{'é' * (i % 4)} number {i} " * (i % 7) for i in range(60)]

KILLED = """\
import os, signal, sys
from evaluating import byte_tokenizer
from rcc_hf.texts import encoding, read_documents, tokenize_documents

def documents():
    for number, document in enumerate(read_documents(sys.argv[1])):
        if number == 45:
            os.kill(os.getpid(), signal.SIGKILL)
        yield document

if __name__ == "__main__":
    encoding.BATCH_DOCUMENTS = 4
    tokenize_documents(
        documents(), byte_tokenizer(), sys.argv[2], sources=(sys.argv[1],), num_processes=2, shard_tokens=200
    )
"""


class Stop(Exception):
    """Ends a build in the middle."""


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(file)


def build(source, folder, tokenizer=None, **options):
    options = {"shard_tokens": 200, "progress": False, **options}
    return build_shards([source], tokenizer or byte_tokenizer(), folder, **options)


def tokenize(texts, folder, tokenizer=None, **options):
    documents = (Document(f"text {i}", text) for i, text in enumerate(texts))
    return tokenize_documents(documents, tokenizer or byte_tokenizer(), folder, progress=False, **options)


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_shards_hold_what_the_tokenizer_makes_of_each_document(source, tmp_path):
    shards = build(source, tmp_path / "out")
    expected = [byte_tokenizer()(text)["input_ids"] for text in TEXTS]
    assert [shards.slice(i, 0, n).tolist() for i, n in enumerate(shards.lengths)] == expected
    assert (shards.num_documents, shards.num_tokens) == (60, sum(map(len, expected)))
    assert shards.lengths.tolist() == list(map(len, expected))
    sizes = [shard.num_tokens for shard in shards.index.shards]
    assert len(sizes) > 5
    assert all(200 <= size < 200 + max(map(len, expected)) for size in sizes[:-1])
    stored = np.concatenate([np.fromfile(file, "<u2") for file in sorted((tmp_path / "out").glob("*.ids"))])
    assert stored.tolist() == [i for row in expected for i in row]
    assert TokenShards.open(tmp_path / "out", byte_tokenizer()).fingerprint == shards.fingerprint


def test_windows_on_disk_are_those_in_memory(source, tmp_path):
    shards = build(source, tmp_path / "out")
    memory = TokenShards.of_documents([byte_tokenizer()(text)["input_ids"] for text in TEXTS])
    on_disk, in_memory = Windows(shards, 9), Windows(memory, 9)
    assert list(on_disk) == list(in_memory)
    for document, start in on_disk:
        assert (shards.slice(document, start, 9) == memory.slice(document, start, 9)).all()


def test_one_shard_has_the_fingerprint_of_its_documents_in_memory(source, tmp_path):
    whole = build(source, tmp_path / "whole", shard_tokens=10**6)
    assert (
        whole.fingerprint
        == TokenShards.of_documents([byte_tokenizer()(text)["input_ids"] for text in TEXTS]).fingerprint
    )
    assert whole.fingerprint != build(source, tmp_path / "many").fingerprint


def test_the_number_of_processes_changes_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr("rcc_hf.texts.encoding.BATCH_DOCUMENTS", 4)
    build(source, tmp_path / "one")
    build(source, tmp_path / "two", num_processes=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_build_goes_on_and_writes_the_same_bytes(source, tmp_path):
    """Its processes die with it: they hold the pipe that this one waits for."""
    paths = [str(Path(rcc_hf.__file__).parents[1]), str(Path(__file__).parent)]
    program = f"import sys; sys.path[:0] = {paths}\n{KILLED}"
    (tmp_path / "killed.py").write_text(program)
    killed = [sys.executable, tmp_path / "killed.py", source, tmp_path / "out"]
    done = subprocess.run(killed, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(ValueError, match=r"out is unfinished, it has \d whole shards; give the command .* once more"):
        TokenShards.open(tmp_path / "out")
    first = (tmp_path / "out" / "00000.ids").stat()
    build(source, tmp_path / "out")
    build(source, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert (tmp_path / "out" / "00000.ids").stat().st_ino == first.st_ino, "the first shard was made again"


def test_a_build_that_ends_anywhere_goes_on(source, tmp_path):
    build(source, tmp_path / "whole")
    expected = contents(tmp_path / "whole")

    def until(number):
        for index, document in enumerate(read_documents(source)):
            if index == number:
                raise Stop
            yield document

    options = {"sources": (source,), "shard_tokens": 200, "progress": False}
    for number in range(0, 61, 3):
        folder = tmp_path / str(number)
        for stop in (number, number + 20):  # twice, the second time further on
            if stop < 60:
                with pytest.raises(Stop):
                    tokenize_documents(until(stop), byte_tokenizer(), folder, **options)
        build(source, folder)
        assert contents(folder) == expected


@pytest.mark.parametrize("last", ["ids", "lengths", "json"])
def test_a_build_that_ends_within_a_write_goes_on(source, tmp_path, last):
    """As if killed before a file of the third shard was in place, with half of it in the scratch file."""
    build(source, tmp_path / "whole")
    build(source, tmp_path / "out")
    index = tmp_path / "out" / "index.json"
    content = json.loads(index.read_text())
    for number in range(2, len(content["shards"])):
        for kind in ("ids", "lengths"):
            file = tmp_path / "out" / f"{number:05}.{kind}"
            if number > 2 or kind == last or (last, kind) == ("ids", "lengths"):
                file.rename(f"{file}.tmp") if number == 2 else file.unlink()
    index.write_text(json.dumps(content | {"shards": content["shards"][:2], "complete": False}))
    (tmp_path / "out" / "index.json.tmp").write_text('{"format"')
    build(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_build_that_ends_before_its_first_write_goes_on(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "index.json.tmp").write_text("{")
    assert build(source, tmp_path / "out").num_documents == 60


def test_a_complete_build_is_opened_and_not_made_again(source, tmp_path):
    first = build(source, tmp_path / "out")
    Path(source).write_text('{"text": "changed"}\n')
    assert build(source, tmp_path / "out").fingerprint == first.fingerprint


@pytest.mark.parametrize("num_processes", [1, 2])
def test_documents_without_end_are_read_as_far_as_needed(tmp_path, num_processes):
    """Two megabytes of them, of which no more than a few are in memory."""
    numbers = count()

    def endless():
        for number in numbers:
            assert number < 9000, "read too far"
            yield f"{number:1000}"

    tokenize(["warm"], tmp_path / "warm")
    tracemalloc.start()
    try:
        shards = tokenize(
            endless(), tmp_path / "out", max_tokens=2_000_000, shard_tokens=500_000, num_processes=num_processes
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert shards.num_tokens == 2_000_000
    assert len(shards.index.shards) == 4
    ahead = next(numbers) - 2000
    assert ahead <= (0 if num_processes == 1 else 7 * 256)
    assert peak < (1_000_000 if num_processes == 1 else 20_000_000)


def test_a_folder_of_shards_is_not_read_into_memory(tmp_path):
    tokenize((f"{i:1000}" for i in range(1000)), tmp_path / "out")
    tracemalloc.start()
    try:
        shards = TokenShards.open(tmp_path / "out")
        windows = Windows(shards, 100)
        shards.slice(*windows.draw(np.random.default_rng(0)), 100)
        assert tracemalloc.get_traced_memory()[1] < 200_000 < 2 * shards.num_tokens
    finally:
        tracemalloc.stop()


def test_an_open_folder_travels_as_its_path(source, tmp_path):
    shards = build(source, tmp_path / "out")
    sent = pickle.dumps(shards)
    assert len(sent) < 500
    assert pickle.loads(sent).slice(3, 2, 5).tolist() == shards.slice(3, 2, 5).tolist()


def test_large_vocabularies_take_four_bytes(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([f"x{i}" for i in range(70_000)])
    shards = tokenize(["w5 x69999", "x3"], tmp_path / "out", tokenizer)
    assert shards.index.dtype == "uint32"
    assert shards.slice(0, 0, 2).tolist() == [5, 128 + 69_999]


def test_another_tokenizer_is_refused_and_both_are_named(source, tmp_path):
    tokenizer, other = byte_tokenizer(), byte_tokenizer()
    tokenizer.name_or_path, other.name_or_path = "first", "second"
    build(source, tmp_path / "out", tokenizer)
    TokenShards.open(tmp_path / "out", other)  # alike under another name
    other.add_tokens(["ab"])
    message = r"made with the tokenizer 'first' \(\w{16}\), and this one is 'second' \(\w{16}\)"
    with pytest.raises(ValueError, match=message):
        TokenShards.open(tmp_path / "out", other)
    with pytest.raises(ValueError, match="tokenizer_fingerprint is"):
        build(source, tmp_path / "out", other)


def test_a_tokenizer_that_cuts_words_otherwise_is_another_one(source, tmp_path):
    """The vocabulary is the same; only the probe tells."""
    build(source, tmp_path / "out")
    other = byte_tokenizer()
    other.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    assert other.get_vocab() == byte_tokenizer().get_vocab()
    with pytest.raises(ValueError, match="made with the tokenizer"):
        TokenShards.open(tmp_path / "out", other)


def test_padding_and_truncation_of_an_earlier_call_leave_no_trace(source, tmp_path):
    build(source, tmp_path / "out")
    used = byte_tokenizer()
    used.pad_token = used.eos_token
    used("a b c", padding="max_length", truncation=True, max_length=2)
    TokenShards.open(tmp_path / "out", used)


def test_texts_that_have_changed_are_refused(source, tmp_path):
    tokenize(TEXTS[:20], tmp_path / "out", shard_tokens=200)
    index = tmp_path / "out" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"complete": False}))
    for texts in (["new", *TEXTS[1:]], TEXTS[:2], []):
        with pytest.raises(ValueError, match=r"out: shard 0 was made of other texts than the sources have now"):
            tokenize(texts, tmp_path / "out", shard_tokens=200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_tokens": 300}, "another build: shard_tokens is 200 there, 300 here; give another folder"),
        ({"max_tokens": 300}, "max_tokens is None there, 300 here"),
        ({"shard_tokens": 0}, "shard_tokens is 0; it must be 1 or more"),
        ({"num_processes": 0}, "num_processes is 0"),
        ({"max_tokens": -1}, "max_tokens is -1"),
    ],
)
def test_other_settings_are_refused(source, tmp_path, options, message):
    build(source, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        build(source, tmp_path / "out", **options)


def test_other_sources_and_folders_of_something_else_are_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the message cuts long paths
    build("texts.jsonl", tmp_path / "out")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"sources is .*texts\.jsonl.* there, .*a\.txt.* here"):
        build("a.txt", tmp_path / "out")
    with pytest.raises(ValueError, match="holds something else than token shards"):
        build(source, tmp_path)
    with pytest.raises(ValueError, match=r"holds no token shards; write some with rcc tokenize"):
        TokenShards.open(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "00001.ids").write_bytes(b"12"), r"00001\.ids has 2 bytes instead of \d+"),
        (lambda folder: (folder / "00000.lengths").unlink(), r"00000\.lengths has 0 bytes instead of"),
        (lambda folder: np.zeros(10, "<i8").tofile(folder / "00000.lengths"), r"00000\.lengths is damaged"),
        (lambda folder: (folder / "index.json").write_text("[]"), r"index\.json is no index of token shards"),
        (lambda folder: (folder / "index.json").write_text('{"format": 2}'), "it has format 2, and this version"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, damage, message):
    tokenize(["a" * 30] * 20, tmp_path / "out", shard_tokens=300)
    damage(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        TokenShards.open(tmp_path / "out")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_text_that_cannot_be_tokenized_says_where_it_is(tmp_path, num_processes):
    with pytest.raises(ValueError, match="text 1 cannot be tokenized"):
        tokenize(["fine", "\ud800", "fine"], tmp_path / "out", num_processes=num_processes)


class Fatal:
    """Ends the process that receives it."""

    def __reduce__(self):
        return os._exit, (3,)


def test_a_process_that_dies_is_an_error_and_no_wait():
    documents = (Document(str(i), "text") for i in range(3000))
    with pytest.raises(ChildProcessError, match=r"one of 2 processes that tokenize died.*try again with fewer"):
        list(encode_documents(documents, Fatal(), "<u2", num_processes=2))


def test_texts_without_a_token_are_refused(tmp_path):
    with pytest.raises(ValueError, match="out holds no tokens"):
        tokenize(["", ""], tmp_path / "out")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base with its tokenizer, and a compressor without, that names the base."""
    root = tmp_path_factory.mktemp("models")
    base_model().save_pretrained(root / "base")
    word_tokenizer().save_pretrained(root / "base")
    model = rcc_model()
    model.config.base_model_name_or_path = str(root / "base")
    model.save_pretrained(root / "rcc")
    return root


def test_the_command_takes_files_from_a_list(models, tmp_path, capsys):
    (tmp_path / "corpus").mkdir()
    for name, text in {"a": "w5 w6", "b": "w7", "c": "w8 w9 w10"}.items():
        (tmp_path / "corpus" / f"{name}.txt").write_text(text)
    (tmp_path / "list").write_text("c.txt\na.txt\n")
    command = ["tokenize", str(tmp_path / "corpus"), "--files", str(tmp_path / "list"), "--no_progress"]
    for name in ("base", "rcc"):
        assert main([*command, "--model", str(models / name), "--output", str(tmp_path / name)]) == 0
        assert "2 documents, 5 tokens, the longest document 3" in capsys.readouterr().out
    shards = TokenShards.open(tmp_path / "base", word_tokenizer())
    assert [shards.slice(i, 0, n).tolist() for i, n in enumerate(shards.lengths)] == [[8, 9, 10], [5, 6]]
    assert contents(tmp_path / "base").keys() == {"00000.ids", "00000.lengths", "index.json"}


def test_the_command_refuses_a_list_for_several_folders(models, tmp_path, capsys):
    command = ["tokenize", str(tmp_path), str(tmp_path), "--files", "list", "--tokenizer", str(models / "base")]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "files names files of one folder" in capsys.readouterr().err
