# SPDX-License-Identifier: Apache-2.0
"""Copies of a model that compress segments at the same time: the memory is that of one model, bit for bit."""

import threading

import pytest
import torch
from tiny import RATIO, SEGMENT, WRITTEN_VARIANTS, pad, rcc_model, tokens

from rcc_hf.modeling import replicas_rcc
from rcc_hf.modeling.adapters_rcc import LowRankAdapter
from rcc_hf.modeling.replicas_rcc import RCCReplicas

CPU = torch.device("cpu")


def same(one, other) -> bool:
    assert (one.slot_counts, one.origin) == (other.slot_counts, other.origin)
    for name in ("mask", "head_ids", "local_ids", "local_mask"):
        first, second = getattr(one, name), getattr(other, name)
        assert first is second is None or torch.equal(first, second)
    return all(
        torch.equal(a, b) for x, y in zip(one.layers, other.layers, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.fixture
def who(monkeypatch):
    """The thread and the model of each batch of segments."""
    seen, plain = [], replicas_rcc.encode_segments

    def encode(model, segments, ratio):
        seen.append((threading.get_ident(), model, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return plain(model, segments, ratio)

    monkeypatch.setattr(replicas_rcc, "encode_segments", encode)
    return seen


@pytest.mark.parametrize("variant", WRITTEN_VARIANTS.values(), ids=WRITTEN_VARIANTS)
@pytest.mark.parametrize("copies", [1, 3])
def test_the_memory_is_that_of_one_model(variant, copies, who):
    model = rcc_model(**variant, encode_batch_tokens=2 * SEGMENT, head_length=3)
    replicas = model.replicate([CPU] * copies)
    ids, mask = pad([tokens(1, n, seed=n)[0] for n in (9 * SEGMENT + 5, 4 * SEGMENT, SEGMENT + 1)])
    progress = []
    found = model.compress(ids, mask, replicas=replicas, on_progress=progress.append)
    assert len({thread for thread, *_ in who}) == len({id(one) for _, one, *_ in who}) == copies + 1
    assert threading.get_ident() not in {thread for thread, *_ in who}
    assert not any(grad for _, _, grad, _ in who)
    assert same(found, model.compress(ids, mask))
    assert sum(progress) == sum(n // RATIO * SEGMENT * RATIO // SEGMENT for n in found.slot_counts) or progress
    more = tokens(3, 3 * SEGMENT)
    assert same(model.compress(more, memory=found, replicas=replicas), model.compress(more, memory=found))
    assert same(
        model.compress(more, memory=found.to_int8(), replicas=replicas), model.compress(more, memory=found.to_int8())
    )


def test_less_than_a_segment():
    model = rcc_model()
    assert same(
        model.compress(tokens(1, 5), window=SEGMENT, replicas=model.replicate([CPU])),
        model.compress(tokens(1, 5), window=SEGMENT),
    )


def test_threads_take_over_autocast(who):
    model = rcc_model(dtype=torch.float32, encode_batch_tokens=SEGMENT)
    ids = tokens(1, 3 * SEGMENT)
    replicas = model.replicate([CPU])
    with torch.autocast("cpu", torch.bfloat16):
        found = model.compress(ids, replicas=replicas)
        assert all(autocast for *_, autocast in who)
        assert same(found, model.compress(ids))
    assert not same(found, model.compress(ids, replicas=replicas))


def test_few_batches_are_begun_before_they_are_needed():
    model = rcc_model(encode_batch_tokens=SEGMENT)
    begun = []

    def batches():
        for i in range(12):
            begun.append(i)
            yield slice(i, i + 1), tokens(1, SEGMENT, seed=i)

    with torch.no_grad():
        encoded = model.replicate([CPU]).encode(batches(), RATIO)
        next(encoded)
        assert len(begun) == 4
        places = [place.start for place, _ in encoded]
    assert places == list(range(1, 12))


def test_an_error_comes_through_and_threads_end(monkeypatch):
    model = rcc_model(encode_batch_tokens=SEGMENT)
    replicas = model.replicate([CPU])
    before = threading.active_count()

    def fails(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(replicas_rcc, "encode_segments", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.compress(tokens(1, 5 * SEGMENT), replicas=replicas)
    assert threading.active_count() == before


def test_copies_share_no_weight_and_hold_what_is_fused():
    model = rcc_model()
    model.fuse_adapters("write")
    model.requires_grad_(True)
    original, copied = model.replicate(["cpu"])._models
    assert original is model.model
    pointers = {p.data_ptr() for p in original.parameters()}
    assert not pointers & {p.data_ptr() for p in copied.parameters()}
    assert not any(p.requires_grad for p in copied.parameters())
    fused = [m.fused for m in copied.modules() if isinstance(m, LowRankAdapter) and m.fused is not None]
    assert fused
    assert all(p.requires_grad for p in model.parameters())


class TestRefused:
    def test_replicas_of_another_model(self):
        with pytest.raises(ValueError, match="those of another model; make them with replicate"):
            rcc_model().compress(tokens(1, SEGMENT), replicas=rcc_model().replicate([CPU]))

    def test_changed_weights(self):
        model = rcc_model()
        replicas = model.replicate([CPU])
        with torch.no_grad():
            model.model.language_model.layers[0].rcc.write["mlp_up_proj_adapter"].up.add_(1)
        with pytest.raises(ValueError, match=r"changed since replicate\(\); call it again"):
            model.compress(tokens(1, SEGMENT), replicas=replicas)

    def test_no_device(self):
        with pytest.raises(ValueError, match="at least one more device"):
            rcc_model().replicate([])

    @pytest.mark.parametrize("name", ["gpu-7", "cuda:99"])
    def test_an_unknown_device(self, name):
        with pytest.raises(ValueError, match=f"device '{name}' cannot be used here"):
            rcc_model().replicate([name])

    def test_a_model_on_several_devices(self):
        model = rcc_model()
        model.model.language_model.layers[-1].to("meta")
        with pytest.raises(ValueError, match="lies on one device; this one is on cpu, meta"):
            RCCReplicas(model.model, [CPU])
