# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in examples/checkpoints/ answer as they did when they were recorded; and that would be noticed."""

import pytest
import shipped
import torch
from evaluating import SENTENCES, byte_tokenizer
from tiny import base_model, move_from_identity

from rcc_hf import RCCForCausalLM
from rcc_hf.shipping import faults

TEXTS = [" ".join([*SENTENCES, f"And {name}."]) for name in ("so on", "more", "that was it")]


@pytest.mark.real
@pytest.mark.skipif(not shipped.CHECKPOINTS, reason="there is no checkpoint in examples/checkpoints/")
@pytest.mark.parametrize("folder", shipped.CHECKPOINTS, ids=lambda folder: folder.name)
def test_a_checkpoint_answers_as_it_did(folder):
    file = shipped.GOLDEN / f"{folder.name}.json"
    assert file.exists(), f"{file.name} is not recorded; run `python tests/shipped.py {folder.name}`"
    assert faults(folder) == []
    assert shipped.check(folder, shipped.BASE, file) == []


def test_every_golden_file_has_its_checkpoint():
    recorded = {file.stem for file in shipped.GOLDEN.glob("*.json")} - {"tiny"}
    assert recorded == {folder.name for folder in shipped.CHECKPOINTS}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A compressor alone on a tiny base, and its golden file."""
    root = tmp_path_factory.mktemp("shipped")
    base_model(vocab_size=260).save_pretrained(root / "base")
    byte_tokenizer().save_pretrained(root / "base")
    model = compressor(root / "base")
    model.save_pretrained(root / "own", adapter_only=True)
    shipped.record(root / "own", root / "base", TEXTS, root / "own.json")
    return root


def compressor(base):
    ranks = {"write_rank": 4, "read_rank": 4, "map_rank": 4}
    model = RCCForCausalLM.from_base(base, segment_length=32, ratio=4, window=64, dtype=torch.float32, **ranks).eval()
    move_from_identity(model)
    model.config.reconstruction_prompt_ids = byte_tokenizer()("\nRepeat:")["input_ids"]
    return model


def test_a_checkpoint_passes_its_own_golden_file(tiny):
    assert shipped.check(tiny / "own", tiny / "base", tiny / "own.json") == []


@pytest.mark.parametrize("part", ["write", "read", "slot_map"])
def test_one_other_weight_of_the_compressor_is_noticed(part, tiny, tmp_path):
    model = compressor(tiny / "base")
    weights = {name: weight for name, weight in model.named_parameters() if f".{part}" in name and weight.ndim == 2}
    assert weights
    with torch.no_grad():
        next(iter(weights.values()))[0, 0] += 0.5
    model.save_pretrained(tmp_path / "other", adapter_only=True)
    assert any("logits" in line for line in shipped.check(tmp_path / "other", tiny / "base", tiny / "own.json"))


def test_what_differs_is_told():
    recorded = {
        "reads": [[1]], "answers": {"a": [2]}, "top ids": [3, 4], "top logits": [1.0, 0.5], "bleu4 at least": 0.5
    }  # fmt: skip
    found = {**recorded, "bleu4": 0.5}
    assert shipped.differences(recorded, found) == []
    assert shipped.differences(recorded, {**found, "top logits": [1.001, 0.5]}) == []
    for name, value, message in (
        ("reads", [[2]], "reads: [[2]], recorded [[1]]"),
        ("answers", {"a": [3]}, "answers: {'a': [3]}"),
        ("top ids", [4, 3], "top ids: [4, 3]"),
        ("top logits", [1.01, 0.5], "top logits differ by 0.01"),
        ("bleu4", 0.49, "bleu4 is 0.49, at least 0.5"),
    ):
        (line,) = shipped.differences(recorded, {**found, name: value})
        assert line.startswith(message)


@pytest.mark.real
def test_passages_are_longer_than_any_segment():
    assert all(len(text) == 8000 for text in shipped.passages())
    assert len(set(shipped.passages())) == 3
