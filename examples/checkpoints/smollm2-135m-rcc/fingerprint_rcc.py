# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of weights: cheap marks by which a memory knows the model that wrote it."""

import hashlib
from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter

import torch
from torch import Tensor, nn

SAMPLES_PER_TENSOR = 64


def is_trained_part(name: str) -> bool:
    """Whether a parameter of this name belongs to the compressor rather than to the base."""
    return ".rcc." in f".{name}"


def fingerprint_base(model: nn.Module) -> str:
    """The first of the `fingerprint_parts`."""
    return fingerprint_parts(model)[0]


def fingerprint_parts(model: nn.Module) -> tuple[str, str]:
    """Fingerprints of the base and of the compressor.

    The base is all weights that are not the compressor's (of these the head is left out: memories do not depend on
    it). Its quantised weights, which are integers, are left out: their kernels lay them out anew at the first forward
    call, and the model would then be taken for another.
    """
    base, compressor = [], []
    for name, parameter in model.named_parameters():  # once for both: the walk is a third of the time
        if is_trained_part(name):
            compressor.append(parameter)
        elif parameter.is_floating_point():
            base.append(parameter)
    return fingerprint(base), fingerprint(compressor)


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor]) -> str:
    """16 hexadecimal digits from the shapes and evenly spaced samples of the tensors.

    Samples are rounded to bfloat16 first, so that a checkpoint has one fingerprint in float32 and in bfloat16. Tensors
    that are offloaded (on the meta device) count by shape only.

    Every call with memory asks for it, and nothing can be kept, since weights can change without a trace: so what is
    done for each of a thousand tensors has to be little.
    """
    shapes, samples, plans = [], [], {}
    for tensor in tensors:
        shape = tensor.shape
        if shape not in plans:
            plans[shape] = _plan(shape)
        text, count, step = plans[shape]
        shapes.append(text)
        if tensor.is_meta:
            continue
        if type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous():  # subclasses may know no strides
            samples.append(tensor.as_strided((count,), (step,)))
        else:
            samples.append(tensor.detach().reshape(-1)[::step][:count])
    digest = hashlib.sha256("".join(shapes).encode())
    if samples:
        digest.update(_round(samples).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _plan(shape: torch.Size) -> tuple[str, int, int]:
    """Of tensors of this shape: what is digested of it, how many values are sampled, and one in how many."""
    numel = shape.numel()
    step = max(1, numel // SAMPLES_PER_TENSOR)
    return str(tuple(shape)), min(SAMPLES_PER_TENSOR, -(-numel // step)), step


def _round(samples: list[Tensor]) -> Tensor:
    """All samples in bfloat16, in their order; neighbours of one dtype and device are converted together."""
    runs = groupby(samples, attrgetter("dtype", "device"))
    rounded = [torch.cat(list(run)).to(torch.bfloat16) for _, run in runs]
    return rounded[0] if len(rounded) == 1 else torch.cat([run.to(rounded[0].device) for run in rounded])
