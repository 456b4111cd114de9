# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on the Hub: loaded by name from the user's cache, and pushed with their code."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import CODE, SMALL, Bases, answers, stored
from hub_cache import put_into_cache
from huggingface_hub import RepoUrl
from tiny import move_from_identity, tokens
from transformers import AutoModelForCausalLM
from transformers.utils import hub

from rcc_hf import RCCForCausalLM


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def repositories(bases, tmp_path):
    """A base, a full and an adapter-only checkpoint in a cache of the Hub; the last has a second revision."""
    model = bases.trained()
    model.config.base_model_name_or_path = "someone/base"
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "adapter", adapter_only=True)
    put_into_cache(tmp_path / "cache", "someone/base", bases())
    put_into_cache(tmp_path / "cache", "someone/full", tmp_path / "full")
    put_into_cache(tmp_path / "cache", "someone/adapter", tmp_path / "adapter")
    later = copy.deepcopy(model)
    move_from_identity(later)
    later.save_pretrained(tmp_path / "later", adapter_only=True)
    put_into_cache(tmp_path / "cache", "someone/adapter", tmp_path / "later", revision="v2")
    return tmp_path / "cache", model, later


@pytest.mark.parametrize("load", [RCCForCausalLM, AutoModelForCausalLM], ids=lambda cls: cls.__name__)
def test_checkpoints_of_the_hub(repositories, load):
    cache, model, later = repositories
    expected = answers(model)
    assert torch.equal(answers(load.from_pretrained("someone/full", cache_dir=cache)), expected)
    assert torch.equal(answers(load.from_pretrained("someone/adapter", cache_dir=cache)), expected)
    # the base has no such revision
    at_v2 = load.from_pretrained("someone/adapter", cache_dir=cache, revision="v2")
    assert torch.equal(answers(at_v2), answers(later))
    assert not torch.equal(answers(later), expected)


def test_a_base_of_the_hub(repositories):
    cache, model, _ = repositories
    made = RCCForCausalLM.from_base("someone/base", **SMALL, cache_dir=cache)
    assert made.config.base_model_name_or_path == "someone/base"
    with torch.no_grad():
        assert torch.equal(made(tokens(1, 5)).logits, model(tokens(1, 5)).logits)


class FakeApi:
    """Takes a commit and keeps its files in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.commits = folder, []

    def create_repo(self, repo_id, **settings):
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **settings):
        self.folder.mkdir()
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, self.folder / operation.path_in_repo)
        self.commits.append(repo_id)


@pytest.fixture
def upload(tmp_path, monkeypatch):
    """Where a push ends up instead of the Hub."""
    api = FakeApi(tmp_path / "uploaded")
    monkeypatch.setattr(hub, "_hf_api", api)
    monkeypatch.setattr(hub.ModelCard, "load", lambda *args, **kwargs: hub.ModelCard("---\n---\n"))
    return api


@pytest.mark.parametrize("how", ["push_to_hub", "push_to_hub adapter-only", "save_pretrained", "save adapter-only"])
def test_pushing_takes_the_code_along(bases, upload, how, tmp_path):
    model, adapter_only = bases.trained(), how.endswith("adapter-only")
    if how == "push_to_hub":
        model.push_to_hub("someone/model")
    elif how == "push_to_hub adapter-only":
        model.push_to_hub("someone/model", adapter_only=True)
    else:
        model.save_pretrained(tmp_path / "x", adapter_only=adapter_only, push_to_hub=True, repo_id="someone/model")
    assert upload.commits == ["someone/model"]
    names = {path.name for path in upload.folder.iterdir()}
    assert CODE | {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert json.loads((upload.folder / "config.json").read_text()).get("adapter_only", False) == adapter_only
    assert ("lm_head.weight" in stored(upload.folder)) != adapter_only
    assert torch.equal(answers(RCCForCausalLM.from_pretrained(upload.folder)), answers(model))
