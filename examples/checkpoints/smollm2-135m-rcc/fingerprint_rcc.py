# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of weights: cheap marks by which a memory knows the model that wrote it."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

SAMPLES_PER_TENSOR = 64


def is_trained_part(name: str) -> bool:
    """Whether a parameter of this name belongs to the compressor rather than to the base."""
    return ".rcc." in f".{name}"


def fingerprint_base(model: nn.Module) -> str:
    """Fingerprint of all weights that are not the compressor's (of those the head is left out: memories do not
    depend on it).

    Quantised weights, which are integers, are left out: their kernels lay them out anew at the first forward call, and
    the model would then be taken for another.
    """
    own = (p for name, p in model.named_parameters() if not is_trained_part(name))
    return fingerprint(p for p in own if p.is_floating_point())


def fingerprint_compressor(model: nn.Module) -> str:
    """Fingerprint of the compressor's weights."""
    return fingerprint(p for name, p in model.named_parameters() if is_trained_part(name))


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """16 hexadecimal digits from the shapes and evenly spaced samples of the tensors.

    Samples are rounded to bfloat16 first, so that a checkpoint has one fingerprint in float32 and in bfloat16. Tensors
    that are offloaded (on the meta device) count by shape only.
    """
    digest, samples = hashlib.sha256(), []
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        if tensor.device.type != "meta" and tensor.numel():
            flat = tensor.detach().reshape(-1)
            step = max(1, flat.numel() // SAMPLES_PER_TENSOR)
            samples.append(flat[::step][:SAMPLES_PER_TENSOR].to(torch.bfloat16))
    if samples:
        first = samples[0].device
        joined = torch.cat([sample.to(first) for sample in samples])
        digest.update(joined.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
