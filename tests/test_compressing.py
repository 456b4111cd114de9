# SPDX-License-Identifier: Apache-2.0
"""What the host does while segments are encoded: nothing that waits for the device."""

import pytest
import torch
from tiny import SEGMENT, pad, rcc_model, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from rcc_hf import RCCConfig
from rcc_hf.modeling.joint_rcc import write_segments
from rcc_hf.modeling.segments_rcc import Grid, pack_left


class Transfers(TorchDispatchMode):
    """Counts what brings values to a device or from it, unless paused."""

    paused, found = False, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        names = ("lift_fresh", "_to_copy", "_local_scalar_dense", "nonzero")
        self.found += not self.paused and function.overloadpacket.__name__ in names
        return function(*args, **(kwargs or {}))


def transfers(monkeypatch, model, *context) -> int:
    """Those of `compress`, without what the base does, in a model whose middle layer is on another device."""
    counter, scheme = Transfers(), model.model.scheme
    write, keep = scheme.write, scheme.keep

    def aside(function, *args):
        counter.paused = True
        try:
            return function(*args)
        finally:
            counter.paused = False

    def spread(*args):
        layers = list(keep(*args))
        layers[1] = tuple(part.to("meta") for part in layers[1])
        return tuple(layers)

    with monkeypatch.context() as patched, counter:
        patched.setattr(scheme, "write", lambda *args: aside(write, *args))
        patched.setattr(scheme, "keep", lambda *args: aside(spread, *args))
        model.compress(*context)
    return counter.found


@pytest.mark.parametrize(
    "context",
    [(tokens(1, 102),), (tokens(3, 102),), pad([tokens(1, n, seed=n)[0] for n in (102, 9, 70)])],
    ids=["one row", "rows", "ragged"],
)
def test_nothing_is_sent_for_each_batch(monkeypatch, context):
    """On a GPU it would let the host wait until the device is idle; cells go to each device once."""
    model = rcc_model(encode_batch_tokens=100 * SEGMENT)
    at_once = transfers(monkeypatch, model, *context)
    model.config.encode_batch_tokens = SEGMENT
    assert transfers(monkeypatch, model, *context) == at_once > 0


@pytest.mark.parametrize("train", [False, True], ids=["compress", "joint"])
def test_calls_are_as_large_as_the_device_wants(monkeypatch, train):
    model, asked, written = rcc_model(encode_batch_tokens=None), [], []
    write = model.model.scheme.write
    monkeypatch.setattr(RCCConfig, "batch_tokens", lambda config, device: asked.append(device) or 2 * SEGMENT)
    monkeypatch.setattr(model.model.scheme, "write", lambda *args: written.append(len(args[2])) or write(*args))
    with torch.no_grad():
        if train:
            model(tokens(1, 5), context_ids=tokens(1, 5 * SEGMENT))
        else:
            model.compress(tokens(1, 5 * SEGMENT))
    assert (asked, written) == (["cpu"], [2, 2, 1])


def test_cells_of_a_joint_pass_are_sent_once(monkeypatch):
    cells, devices = Grid.cells, []
    monkeypatch.setattr(Grid, "cells", lambda grid, device: devices.append(device) or cells(grid, device))
    packed, mask = pack_left(*pad([tokens(1, n, seed=n)[0] for n in (102, 9, 70)]))
    write_segments(rcc_model().model, packed, Grid.of(packed, mask, SEGMENT), SEGMENT // 2)
    assert len(devices) == 1
