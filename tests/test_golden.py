# SPDX-License-Identifier: Apache-2.0
"""Recorded numbers of tiny models: a change of them is meant, or a mistake.

After a change that is meant, run `make golden`, look at the differences in tests/golden/, and write them down under
Numerics in CHANGELOG.md. Checkpoints have theirs in test_shipped_checkpoint.py.
"""

import json
import math
import zlib
from pathlib import Path

import pytest
import torch
from tiny import VOCAB, WRITTEN_VARIANTS, base_model, rcc_model
from torch import nn

GOLDEN = Path(__file__).parent / "golden"
COMMAND = "run `make golden` if this is meant"
TINY = GOLDEN / "tiny.json"
CONTEXT, PROMPT = 54, 7


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Weights from names and places: no random generator, and no order of initialisation, decides on the numbers."""
    prime = 2**31 - 1
    for name, parameter in model.named_parameters():
        places = (torch.arange(1, parameter.numel() + 1) * 48271 + zlib.crc32(name.encode())) % prime
        noise = ((places**2 % prime).double() / prime - 0.5).view_as(parameter) * math.sqrt(12)
        is_scale = parameter.ndim == 1
        parameter.copy_(1 + 0.1 * noise if is_scale else noise / math.sqrt(parameter.shape[-1]))
    return model


def ids(length: int, first: int = 0) -> torch.Tensor:
    """Ids `[1, T]` without special ones."""
    return (torch.arange(first, first + length) * 37 % (VOCAB - 3) + 3)[None]


def record(logits: torch.Tensor) -> list[float]:
    """Of logits `[1, T, V]` the norm, the first of the first token, and some of the last."""
    values = [logits.norm(), *logits[0, 0, :4], *logits[0, -1, ::13]]
    return [round(float(value), 10) for value in values]


@torch.no_grad()
def measure_base() -> dict:
    return {"logits": record(fill(base_model().double())(ids(PROMPT)).logits)}


@torch.no_grad()
def measure(variant: str) -> dict:
    """What a tiny model of a scheme computes, in float64, in every way that it can be called."""
    model = fill(rcc_model(**WRITTEN_VARIANTS[variant]))
    context, prompt = ids(CONTEXT), ids(PROMPT, CONTEXT)
    memory = model.compress(context)
    half = model.compress(context[:, :32], ratio=8)
    headed = model.compress(context, head_length=3)
    new = model.generate(prompt, memory=memory, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    loss = model(prompt, context_ids=context[:, :48], labels=prompt).loss
    return {
        "no memory": record(model(prompt).logits),
        "memory": record(model(prompt, memory=memory).logits),
        "another ratio": record(model(prompt, memory=half).logits),
        "appended": record(model(prompt, memory=model.compress(context, memory=half)).logits),
        "head": record(model(prompt, memory=headed).logits),
        "eight bits": record(model(prompt, memory=memory.to_int8()).logits),
        "windows": record(model(ids(75)).logits),
        "loss": [round(float(loss), 10)],
        "generated": new[0, PROMPT:].tolist(),
    }


def golden(file: Path) -> dict:
    assert file.exists(), f"{file.name} is not recorded; {COMMAND}"
    return json.loads(file.read_text())


def test_the_base_computes_what_it_did():
    assert measure_base()["logits"] == pytest.approx(golden(TINY)["base"]["logits"], abs=1e-8, rel=0)


@pytest.mark.parametrize("variant", WRITTEN_VARIANTS)
def test_a_scheme_computes_what_it_did(variant):
    recorded = golden(TINY)
    assert variant in recorded, f"{variant} is not recorded; {COMMAND}"
    found = measure(variant)
    assert found.keys() == recorded[variant].keys()
    for name, values in found.items():
        assert values == pytest.approx(recorded[variant][name], abs=1e-8, rel=0), f"{variant}, {name}: {COMMAND}"
    assert len({str(values) for values in found.values()}) == len(found)  # each way is a case of its own


def write(file: Path, content: dict) -> None:
    file.parent.mkdir(exist_ok=True)
    lines = json.dumps(content, indent=1)
    file.write_text(lines + "\n")


if __name__ == "__main__":
    write(TINY, {"base": measure_base()} | {variant: measure(variant) for variant in WRITTEN_VARIANTS})
