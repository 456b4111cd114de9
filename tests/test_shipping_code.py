# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that were written before the code changed, and get today's."""

import runpy
from pathlib import Path

import pytest
import torch
from tiny import rcc_model, tokens

from rcc_hf import RCCForCausalLM
from rcc_hf.shipping import renew_code

SCRIPT = Path(__file__).parent.parent / "examples" / "renew_code.py"


@pytest.fixture
def checkpoint(tmp_path):
    rcc_model(dtype=torch.float32).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_code_is_renewed_and_nothing_else(checkpoint):
    fresh = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    (checkpoint / "passes_rcc.py").write_text("old = True\n")
    (checkpoint / "gone_rcc.py").write_text("of a former version\n")
    (checkpoint / "linears_rcc.py").unlink()
    assert renew_code(checkpoint) == ["gone_rcc.py", "linears_rcc.py", "passes_rcc.py"]
    assert {file.name: file.read_bytes() for file in checkpoint.iterdir()} == fresh
    assert renew_code(str(checkpoint)) == []
    logits = RCCForCausalLM.from_pretrained(checkpoint)(tokens(1, 5)).logits
    assert torch.equal(logits, rcc_model(dtype=torch.float32)(tokens(1, 5)).logits)


def test_a_folder_without_code_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no folder of a checkpoint with its code; name one with config.json"):
        renew_code(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.skipif(not SCRIPT.exists(), reason="needs examples/, which the source archive leaves out")
def test_the_script(checkpoint, capsys):
    (checkpoint / "passes_rcc.py").write_text("old = True\n")
    main = runpy.run_path(str(SCRIPT))["main"]
    main([str(checkpoint)])
    main([str(checkpoint)])
    assert capsys.readouterr().out.splitlines() == [
        f"{checkpoint}: passes_rcc.py",
        f"{checkpoint}: nothing changed",
    ]
