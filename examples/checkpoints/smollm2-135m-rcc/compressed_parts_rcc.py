# SPDX-License-Identifier: Apache-2.0
"""A memory in parts: named tensors and a description in JSON, and from these the memory's fields again."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

FORMAT_VERSION = 2
PLAIN_TENSORS = ("mask", "head_ids", "head_mask", "local_ids", "local_mask")


@dataclass(frozen=True)
class Origin:
    """Which model wrote a memory.

    Attributes:
        scheme: name of the memory scheme.
        base: fingerprint of the base's weights.
        compressor: fingerprint of the compressor's weights.
    """

    scheme: str
    base: str
    compressor: str


class MismatchError(Exception):
    """The parts do not belong to one memory."""


def named_tensors(memory) -> dict[str, Tensor]:
    """All tensors of a memory by name."""
    named = {
        f"{kind}.{i}.{j}": tensor
        for kind in ("layers", "scales")
        for i, layer in enumerate(getattr(memory, kind) or ())
        for j, tensor in enumerate(layer)
    }
    optional = {name: getattr(memory, name) for name in PLAIN_TENSORS}
    return named | {name: tensor for name, tensor in optional.items() if tensor is not None}


def description(memory) -> dict[str, Any]:
    """What a memory holds beside tensors, for JSON."""
    return {
        "format_version": FORMAT_VERSION,
        "slot_counts": list(memory.slot_counts),
        "segment_length": memory.segment_length,
        "row_tokens": list(memory.row_tokens),
        "num_layers": len(memory.layers),
        "origin": asdict(memory.origin),
    }


def fields_from_parts(described: dict, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of the memory that was taken apart.

    Raises:
        ValueError: if another version wrote it.
        KeyError, TypeError, MismatchError: if the parts are not those of a memory.
    """
    if described["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"the memory has format {described['format_version']}, this version reads {FORMAT_VERSION}; "
            "use the rcc_hf version that wrote it, or compress the context again"
        )
    found: dict[str, Any] = {
        **{name: tensors.get(name) for name in PLAIN_TENSORS},
        "slot_counts": tuple(described["slot_counts"]),
        "segment_length": described["segment_length"],
        "origin": Origin(**{field.name: described["origin"][field.name] for field in fields(Origin)}),
    }
    for kind in ("layers", "scales"):
        layers = []
        for i in range(described["num_layers"]):
            count = sum(name.startswith(f"{kind}.{i}.") for name in tensors)
            layers.append(tuple(tensors[f"{kind}.{i}.{j}"] for j in range(count)))
        found[kind] = tuple(layers)
    if not any(found["scales"]):
        found["scales"] = None
    _check(found)
    return found


def _check(found: dict[str, Any]) -> None:
    if found["local_ids"] is None or found["head_ids"] is None:
        raise MismatchError("the ids of raw tokens are absent")
    rows, width, layers = len(found["local_ids"]), sum(found["slot_counts"]), found["layers"]
    if not layers or not all(layers):
        raise MismatchError("a layer has no tensors")
    for tensor in (slots for kind in ("layers", "scales") for layer in found[kind] or () for slots in layer):
        if tensor.ndim < 3 or (tensor.shape[0], tensor.shape[-2]) != (rows, width):
            raise MismatchError(f"slots of shape {tuple(tensor.shape)} for {rows} rows of {width} slots")
    if not isinstance(found["segment_length"], int) or found["segment_length"] < 1:
        raise MismatchError(f"segment_length is {found['segment_length']!r}")
    shapes = {"mask": (rows, width)}
    for kind in ("head", "local"):
        shapes[f"{kind}_ids"] = shapes[f"{kind}_mask"] = (rows, found[f"{kind}_ids"].shape[-1])
    for name, shape in shapes.items():
        if found[name] is not None and tuple(found[name].shape) != shape:
            raise MismatchError(f"{name} of shape {tuple(found[name].shape)} instead of {shape}")
    is_int8 = [not slots.is_floating_point() for layer in layers for slots in layer]
    scales = [len(layer) for layer in found["scales"] or ()]
    if scales != ([len(layer) for layer in layers] if any(is_int8) else []) or len(set(is_int8)) > 1:
        raise MismatchError("slots in int8 and their scales do not agree")
