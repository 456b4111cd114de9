# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of weights against their definition, which must never change: checkpoints and memories carry them."""

import hashlib

import pytest
import torch
from tiny import VARIANTS, rcc_model, text_config
from torch import nn

from rcc_hf.modeling.checking_rcc import origin_of
from rcc_hf.modeling.fingerprint_rcc import fingerprint, fingerprint_base, fingerprint_parts, is_trained_part

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def plain_fingerprint(tensors) -> str:
    """The definition, tensor by tensor."""
    digest, samples = hashlib.sha256(), []
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        if tensor.device.type != "meta" and tensor.numel():
            flat = tensor.detach().reshape(-1)
            samples.append(flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16))
    if samples:
        digest.update(torch.cat(samples).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of all magnitudes, so that roundings show."""
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (values * 10 ** torch.empty_like(values).uniform_(-4, 4, generator=generator)).to(dtype)


SIZES = [1, 2, 63, 64, 65, 127, 128, 129, 8191, 8192, 8193]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_and_layouts(dtype):
    many = [weights(n, dtype=dtype) for n in SIZES] + [weights(dtype=dtype), weights(3, 5, 7, dtype=dtype)]
    wide = weights(37, 70, dtype=dtype)
    many += [wide.T, wide[3:30, 5:66], wide[2:], wide[:, :1], wide[::2], weights(1, 9, dtype=dtype).expand(20, 9)]
    for tensor in many:
        assert fingerprint([tensor]) == plain_fingerprint([tensor])
        assert fingerprint([nn.Parameter(tensor)]) == plain_fingerprint([tensor])
    assert fingerprint(iter(many)) == plain_fingerprint(many)
    assert fingerprint(many) != fingerprint(many[::-1])
    assert len({fingerprint([tensor]) for tensor in many}) == len(many)


def test_mixed_dtypes_in_any_order():
    """Each is rounded on its own: what they would be joined in must not matter."""
    kinds = [*DTYPES, torch.int64, torch.uint8, torch.float16, torch.float8_e4m3fn, torch.float8_e4m3fn]
    many = [weights(70 + i, dtype=dtype) for i, dtype in enumerate(kinds)]
    many[4] = torch.arange(-(2**40), 2**40, 2**33 + 1)
    assert fingerprint(many) == plain_fingerprint(many)
    assert fingerprint(many[::-1]) == plain_fingerprint(many[::-1])


def test_empty_and_offloaded_tensors_count_by_their_shape():
    first, last = weights(100), weights(30, 4, dtype=torch.bfloat16)
    for middle in (torch.zeros(0), torch.zeros(5, 0), torch.zeros(7, 9, device="meta")):
        many = [first, middle, last]
        assert fingerprint(many) == plain_fingerprint(many) != fingerprint([first, last])
        assert fingerprint([middle]) == plain_fingerprint([middle])
    assert fingerprint([]) == plain_fingerprint([])


class Wrapped(torch.Tensor):
    """Weights of some quantisation library, that know nothing of strides."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function is not torch.Tensor.as_strided
        return super().__torch_function__(function, types, args, kwargs)


def test_subclasses_of_tensors():
    tensor = weights(40, 41)
    assert fingerprint([tensor.as_subclass(Wrapped)]) == plain_fingerprint([tensor])


@pytest.mark.parametrize("variant", VARIANTS)
def test_base_and_compressor(variant):
    model = rcc_model(**VARIANTS[variant], dtype=torch.float32).model
    named = list(model.named_parameters())
    base = plain_fingerprint(p for name, p in named if not is_trained_part(name))
    compressor = plain_fingerprint(p for name, p in named if is_trained_part(name))
    assert fingerprint_parts(model) == (base, compressor)
    assert fingerprint_base(model) == base
    origin = origin_of(model)
    assert (origin.base, origin.compressor) == (base, compressor)


def test_a_change_that_no_counter_sees():
    model = rcc_model(text_config=text_config(num_hidden_layers=1), dtype=torch.float32).model
    before = fingerprint_parts(model)
    weight = model.language_model.layers[0].mlp.up_proj.weight
    weight.data[0, 0] += 1
    after = fingerprint_parts(model)
    assert after[0] != before[0]
    assert after[1] == before[1]
