# SPDX-License-Identifier: Apache-2.0
"""Memories on the Hub: what is sent there, and what comes from the cache, a folder, or not at all."""

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_cache import put_into_cache
from huggingface_hub import errors
from tiny import rcc_model, tokens

from rcc_hf import RCCMemory
from rcc_hf.modeling import compressed_files_rcc

NAMES = ("create_repo", "create_branch", "upload_folder", "hf_hub_download")
NAME = "someone/memory"


@pytest.fixture(scope="module")
def memory():
    return rcc_model().compress(tokens(2, 54))


def digest(memory) -> str:
    """Of all that a memory holds."""
    found = hashlib.sha256(repr((memory.slot_counts, memory.row_tokens, memory.origin)).encode())
    for name, tensor in memory._tensors().items():
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The functions of huggingface_hub that we call, played by a folder; `calls` tells what was asked."""
    fake = SimpleNamespace(calls=[], folder=tmp_path / "hub")

    def create_repo(repo_id, **options):
        fake.calls.append(("create_repo", repo_id, options))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_branch(repo_id, **options):
        fake.calls.append(("create_branch", repo_id, options))

    def upload_folder(*, repo_id, folder_path, **options):
        fake.calls.append(("upload_folder", repo_id, options))
        shutil.copytree(folder_path, fake.folder / repo_id)
        fake.uploaded_from = Path(folder_path)
        return "the commit"

    def hf_hub_download(repo_id, filename, **options):
        fake.calls.append(("hf_hub_download", repo_id, filename, options))
        return str(fake.folder / repo_id / filename)

    for function in (create_repo, create_branch, upload_folder, hf_hub_download):
        monkeypatch.setattr(compressed_files_rcc, function.__name__, function)
    return fake


def test_pushed_and_pulled_it_is_the_same(memory, hub):
    for stored, name in ((memory, NAME), (memory.to_int8(), "someone/small")):
        assert stored.push_to_hub(name, private=True, token="secret") == "the commit"
        pulled = RCCMemory.from_pretrained(name, revision="v1", token="secret", cache_dir="cache")
        assert digest(pulled) == digest(stored)
    options = {"revision": None, "token": "secret", "commit_message": "Upload memory"}
    assert hub.calls[:3] == [
        ("create_repo", NAME, {"token": "secret", "private": True, "exist_ok": True}),
        ("upload_folder", NAME, options),
        ("hf_hub_download", NAME, "memory.safetensors", {"revision": "v1", "token": "secret", "cache_dir": "cache"}),
    ]
    assert sorted(path.name for path in (hub.folder / NAME).iterdir()) == ["memory.json", "memory.safetensors"]
    assert not hub.uploaded_from.exists()


def test_a_name_without_owner_is_that_of_the_one_who_is_logged_in(memory, hub):
    memory.push_to_hub("mine")
    assert hub.calls[1][:2] == ("upload_folder", "me/mine")


@pytest.mark.parametrize(("revision", "made"), [("v2", ["v2"]), ("refs/pr/3", []), (None, [])])
def test_a_branch_is_made_and_the_rest_is_handed_on(memory, hub, revision, made):
    memory.push_to_hub(NAME, revision=revision, commit_message="Chapter 1", create_pr=True)
    branches = [options for name, _, options in hub.calls if name == "create_branch"]
    assert branches == [{"branch": branch, "token": None, "exist_ok": True} for branch in made]
    options = {"revision": revision, "token": None, "commit_message": "Chapter 1", "create_pr": True}
    assert hub.calls[-1] == ("upload_folder", NAME, options)


def test_nothing_is_sent_if_saving_fails(memory, hub, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(RCCMemory, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space left"):
        memory.push_to_hub(NAME)
    assert hub.calls == []


def test_a_folder_wins_over_a_name(memory, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    memory.save_pretrained(NAME)
    assert digest(RCCMemory.from_pretrained(NAME, revision="v1")) == digest(memory)
    assert digest(RCCMemory.from_pretrained(Path(NAME))) == digest(memory)
    Path("someone/empty").mkdir()
    with pytest.raises(ValueError, match=r"someone/empty holds no memory: there is no memory\.safetensors"):
        RCCMemory.from_pretrained("someone/empty")
    assert hub.calls == []


@pytest.mark.parametrize("source", ["/absent/folder", "./absent", "a/b/c", "", "no name", Path("someone/memory")])
def test_what_cannot_be_a_name_is_a_folder(hub, source):
    with pytest.raises(ValueError, match=r"holds no memory.*save_pretrained wrote, or a repository that push_to_hub"):
        RCCMemory.from_pretrained(source)
    assert hub.calls == []


ERRORS = {
    errors.RepositoryNotFoundError: (ValueError, r"neither a folder here nor a repository.*token=.*hf auth login"),
    errors.GatedRepoError: (ValueError, r"private or gated repository"),
    errors.RevisionNotFoundError: (ValueError, r"has no revision 'v9'"),
    errors.RemoteEntryNotFoundError: (ValueError, r"holds no memory: there is no memory\.safetensors.*push_to_hub"),
    errors.LocalEntryNotFoundError: (ConnectionError, r"no folder here, the Hub cannot be reached.*the cache"),
}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_errors_of_the_hub_say_what_to_do(error, monkeypatch):
    def fail(*_, **__):
        raise error.__new__(error, "not found")  # __init__ wants a response of the client's library

    monkeypatch.setattr(compressed_files_rcc, "hf_hub_download", fail)
    expected, words = ERRORS[error]
    with pytest.raises(expected, match=words) as raised:
        RCCMemory.from_pretrained(NAME, revision="v9")
    assert NAME in str(raised.value)
    assert isinstance(raised.value.__cause__, error)


def test_offline_it_comes_from_the_cache(memory, tmp_path):
    """The real client, which is told by the test environment to stay offline."""
    memory.save_pretrained(tmp_path / "folder")
    put_into_cache(tmp_path / "cache", NAME, tmp_path / "folder", revision="v1")
    assert digest(RCCMemory.from_pretrained(NAME, revision="v1", cache_dir=tmp_path / "cache")) == digest(memory)
    for options in ({"revision": "v2"}, {}):
        with pytest.raises(ConnectionError, match="the Hub cannot be reached"):
            RCCMemory.from_pretrained(NAME, cache_dir=tmp_path / "cache", **options)


def test_a_damaged_file_of_the_cache_is_named(memory, tmp_path):
    memory.save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "memory.safetensors").write_bytes(b"half")
    put_into_cache(tmp_path, NAME, tmp_path / "folder")
    with pytest.raises(ValueError, match=r"memory\.safetensors is damaged or no memory"):
        RCCMemory.from_pretrained(NAME, cache_dir=tmp_path)


def test_a_pulled_memory_goes_to_the_device_that_is_asked_for(memory, hub):
    memory.push_to_hub(NAME)
    assert RCCMemory.from_pretrained(NAME, torch.device("cpu")).device.type == "cpu"
    assert {name for name, *_ in hub.calls} <= set(NAMES)
