# SPDX-License-Identifier: Apache-2.0
"""Copies of a model on other devices, which compress segments at the same time: none needs another's slots."""

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .checking_rcc import origin_of

Kept = tuple[tuple[Tensor, ...], ...]
"""What a scheme keeps of a batch of segments: the tensors of every layer."""

IN_FLIGHT = 2
"""Batches for each device that are begun before the first of them is put into its place."""


def encode_segments(model, segments: Tensor, ratio: int) -> Kept:
    """What is kept of segments, ids `[n, W]` or embeddings `[n, W, D]`."""
    scheme, decoder = model.scheme, model.language_model
    state = scheme.write(decoder, scheme.empty(decoder, len(segments)), segments, ratio)
    return scheme.keep(decoder, state)


class RCCReplicas:
    """A model and its copies, as `replicate` makes them for `compress(..., replicas=...)`.

    Each has a thread of its own. They share Python: what a batch of segments takes on a device has to be long beside
    what it takes to launch, or a second device is of little use.

    Attributes:
        devices: where they are, the model's own device first.
    """

    def __init__(self, model, devices: Sequence[str | torch.device]):
        home = model.get_input_embeddings().weight.device
        spread = {str(tensor.device) for tensor in model.parameters()}
        if len(spread) > 1 or home.type == "meta":
            raise ValueError(
                f"replicas need a model that lies on one device; this one is on {', '.join(sorted(spread))}. Load it "
                "without device_map, or with one that names a single device"
            )
        if not devices:
            raise ValueError("replicas need at least one more device, such as ['cuda:1']")
        self.devices = [home, *map(_check_device, devices)]
        self._origin = origin_of(model)
        self._models = [model, *(_copy_to(model, device) for device in self.devices[1:])]

    def check(self, model) -> None:
        """Refuse a model that these are no copies of.

        Raises:
            ValueError: if it is another model, or its weights have changed.
        """
        if model is not self._models[0]:
            raise ValueError("these replicas are those of another model; make them with replicate() of this one")
        if origin_of(model) != self._origin:
            raise ValueError("the model's weights have changed since replicate(); call it again")

    def encode(self, batches: Iterable[tuple[slice, Tensor]], ratio: int) -> Iterator[tuple[slice, Kept]]:
        """What is kept of every batch, on the model's own device, in the order of the batches."""
        contexts = _surroundings(self.devices[0].type)
        pools = [ThreadPoolExecutor(1) for _ in self._models]
        begun: deque[tuple[slice, Future[Kept]]] = deque()
        try:
            for number, (place, segments) in enumerate(batches):
                which = number % len(pools)
                begun.append((place, pools[which].submit(self._encode, which, segments, ratio, contexts)))
                if len(begun) >= IN_FLIGHT * len(pools):
                    yield self._finish(*begun.popleft())
            while begun:
                yield self._finish(*begun.popleft())
        finally:
            for pool in pools:
                pool.shutdown(cancel_futures=True)

    def _encode(self, which: int, segments: Tensor, ratio: int, contexts: dict) -> Kept:
        device = self.devices[which]
        # a thread begins with gradients, without autocast, and on the first device, where kernels would be launched
        with (
            torch.set_grad_enabled(contexts["grad"]),
            torch.autocast(device.type, **contexts["autocast"]),
            torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
        ):
            return encode_segments(self._models[which], segments.to(device), ratio)

    def _finish(self, place: slice, kept: "Future[Kept]") -> tuple[slice, Kept]:
        home = self.devices[0]
        return place, tuple(tuple(part.to(home) for part in parts) for parts in kept.result())


def _check_device(name: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:  # torch built without it; or no such name, or number
        raise ValueError(
            f"device {str(name)!r} cannot be used here ({error}); name others, such as 'cuda:1'"
        ) from error


def _surroundings(device_type: str) -> dict:
    """What a thread does not take over from the one that begins it."""
    return {
        "grad": torch.is_grad_enabled(),
        "autocast": {
            "enabled": torch.is_autocast_enabled(device_type),
            "dtype": torch.get_autocast_dtype(device_type),
        },
    }


def _copy_to(model: nn.Module, device: torch.device) -> nn.Module:
    """A deep copy on another device, of which nothing lies on the first one in between."""
    known: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        moved = tensor.detach().to(device, copy=True)
        known[id(tensor)] = nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
    return copy.deepcopy(model, known)
