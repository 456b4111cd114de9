# SPDX-License-Identifier: Apache-2.0
"""Which attention works: a GPU and packages that are there or not, as `rcc_hf.attention` sees them."""

import pytest
import torch
from tiny import base_model

from rcc_hf import attention
from rcc_hf.checkpoints import load_model, loading_options


@pytest.fixture
def machine(monkeypatch):
    """Pretends a GPU of a compute capability (None: there is none) and installed flash attentions."""

    def pretend(capability, *installed):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (capability, 0))
        for version in (2, 3, 4):
            found = version in installed
            monkeypatch.setattr(attention, f"is_flash_attn_{version}_available", lambda found=found: found)

    return pretend


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        (None, (2, 3, 4), "sdpa"),
        (9, (), "sdpa"),
        (9, (2,), "flash_attention_2"),
        (9, (2, 4), "flash_attention_4"),
        (8, (2, 4), "flash_attention_2"),
        (7, (2,), "sdpa"),
    ],
)
def test_the_best_is_the_newest_that_works(machine, capability, installed, expected):
    machine(capability, *installed)
    assert attention.best_attention() == expected
    assert attention.resolve_attention("auto") == expected
    assert attention.available_attentions()[-2:] == ["sdpa", "eager"]


def test_place_and_dtype_of_the_model_count(machine):
    machine(9, 4)
    assert attention.best_attention("cuda", torch.bfloat16) == "flash_attention_4"
    assert attention.best_attention("cpu", torch.bfloat16) == "sdpa"
    assert attention.best_attention("cuda", torch.float32) == "sdpa"


def test_one_that_is_missing_is_refused_with_what_to_do(machine):
    machine(9, 2)
    with pytest.raises(ImportError, match=r"pip install flash-attn-4.*works here: flash_attention_2, sdpa, eager"):
        attention.resolve_attention("flash_attention_4")
    assert attention.resolve_attention("flash_attention_2") == "flash_attention_2"
    assert attention.resolve_attention(None) is None
    machine(None, 4)
    with pytest.raises(ImportError, match="runs on a CUDA GPU"):
        attention.resolve_attention("flash_attention_4")


def test_models_are_loaded_with_it(machine, tmp_path):
    machine(None)
    base_model().save_pretrained(tmp_path)
    for name, expected in ((None, "sdpa"), ("auto", "sdpa"), ("eager", "eager")):
        model = load_model(str(tmp_path), segment_length=16, ratio=4, attn_implementation=name)
        assert model.model.language_model.config._attn_implementation == expected
    with pytest.raises(ImportError, match="flash_attention_2 runs on a CUDA GPU"):
        load_model(str(tmp_path), attn_implementation="flash_attention_2")


def test_auto_looks_at_the_dtype_that_will_be_loaded(machine):
    machine(9, 4)
    for stored, asked, expected in (
        ("bfloat16", "auto", "flash_attention_4"),
        ("bfloat16", "float32", "sdpa"),
        ("float32", "auto", "sdpa"),
        (None, "auto", "sdpa"),
        ("float32", "float16", "flash_attention_4"),
    ):
        assert loading_options({"dtype": stored}, asked, "auto", "cuda")["attn_implementation"] == expected
    assert "attn_implementation" not in loading_options({}, "auto")
