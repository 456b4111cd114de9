# SPDX-License-Identifier: Apache-2.0
"""`rcc compress --compile` and `--replicas`: the same memory, and what is said where that cannot be."""

from functools import partial

import pytest
import torch
from tiny import SEGMENT, ratio_of_norms, rcc_model, tokenizer, tokens, words

from rcc_hf import RCCForCausalLM, RCCMemory
from rcc_hf.cli import compress, main
from rcc_hf.compiling import compiled_compressor


@pytest.fixture
def arguments(tmp_path, counters):
    """Checkpoint and text."""
    rcc_model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text(words(tokens(1, 3 * SEGMENT + 5)[0]))
    return ["compress", str(tmp_path / "model"), str(tmp_path / "text")]


def backend(monkeypatch, value):
    monkeypatch.setattr(compress, "compiled_compressor", partial(compiled_compressor, backend=value))


def test_the_memory_is_the_same(arguments, tmp_path, monkeypatch, capsys):
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph

    backend(monkeypatch, count)
    assert main([*arguments, str(tmp_path / "plain")]) == 0
    assert not compiled
    assert main([*arguments, str(tmp_path / "compiled"), "--compile"]) == 0
    assert compiled
    assert capsys.readouterr().out.count("compiling included") == 1
    first, second = (RCCMemory.from_pretrained(tmp_path / name) for name in ("plain", "compiled"))
    assert torch.equal(first.local_ids, second.local_ids)
    for parts, others in zip(first.layers, second.layers, strict=True):
        assert all(ratio_of_norms(b, a) <= 1e-5 for a, b in zip(parts, others, strict=True))


def test_without_a_compiler(arguments, tmp_path, monkeypatch, capsys):
    def absent(graph, inputs):
        raise RuntimeError("Failed to find C compiler")

    backend(monkeypatch, absent)
    assert main([*arguments, str(tmp_path / "memory"), "--compile"]) == 2
    error = capsys.readouterr().err
    assert "rcc compress: torch.compile does not work here; leave --compile out" in error
    assert "Failed to find C compiler" in error
    assert not (tmp_path / "memory").exists()


def test_replicas(arguments, tmp_path, monkeypatch, capsys):
    made, plain = [], RCCForCausalLM.replicate
    monkeypatch.setattr(RCCForCausalLM, "replicate", lambda self, devices: made.append(devices) or plain(self, devices))
    assert main([*arguments, str(tmp_path / "alone")]) == 0
    assert not made
    assert main([*arguments, str(tmp_path / "shared"), "--replicas", "cpu", "cpu"]) == 0
    assert made == [["cpu", "cpu"]]
    first, second = (RCCMemory.from_pretrained(tmp_path / name) for name in ("alone", "shared"))
    for parts, others in zip(first.layers, second.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(parts, others, strict=True))
    capsys.readouterr()
    assert main([*arguments, str(tmp_path / "nowhere"), "--replicas", "gpu-7"]) == 2
    assert "gpu-7" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()
