# SPDX-License-Identifier: Apache-2.0
"""Reads metadata and tensors of GGUF files, memory-mapped.

Only what the bundled model needs: GGUF version 3, little-endian, with tensors of type F32, Q4_1 and Q8_0.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["GGUFFile", "TensorInfo"]

_MAGIC = b"GGUF"
_VERSION = 3
_DEFAULT_ALIGNMENT = 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class _Encoding:
    """How one tensor type is stored: blocks of `length` values, and the function that turns blocks into float32."""

    name: str
    block: np.dtype
    length: int
    decode: Callable[[np.ndarray], np.ndarray]


def _decode_f32(blocks: np.ndarray) -> np.ndarray:
    return blocks.astype(np.float32)


def _decode_q4_1(blocks: np.ndarray) -> np.ndarray:
    # The low nibbles of a block's 16 bytes are its first 16 values, the high nibbles its last 16.
    codes = np.concatenate([blocks["codes"] & 15, blocks["codes"] >> 4], axis=1)
    scale, minimum = (blocks[field].astype(np.float32)[:, None] for field in ("scale", "minimum"))
    return scale * codes + minimum


def _decode_q8_0(blocks: np.ndarray) -> np.ndarray:
    return blocks["scale"].astype(np.float32)[:, None] * blocks["codes"]


_ENCODINGS = {
    0: _Encoding("F32", np.dtype("<f4"), 1, _decode_f32),
    3: _Encoding("Q4_1", np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("codes", "u1", 16)]), 32, _decode_q4_1),
    8: _Encoding("Q8_0", np.dtype([("scale", "<f2"), ("codes", "i1", 32)]), 32, _decode_q8_0),
}


@dataclass(frozen=True)
class TensorInfo:
    """Where and how a tensor is stored.

    Attributes:
        shape: Rows first (GGUF itself lists the fastest dimension first).
        kind: GGUF's number of the tensor type.
        offset: Position of the first byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def num_blocks(self) -> int:
        return math.prod(self.shape) // _ENCODINGS[self.kind].length

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * _ENCODINGS[self.kind].block.itemsize


class GGUFFile:
    """An open GGUF file: everything is checked on opening, tensors are decoded on demand.

    Attributes:
        path: The file.
        metadata: Its key-value pairs, arrays as lists.
        tensors: What is known of each tensor, by name.

    Raises:
        ValueError: The file is no GGUF file, is truncated, or has a version or tensor type that is not supported.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.stat().st_size == 0:
            raise ValueError(f"{self.path} is empty, not a GGUF file. Get it again.")
        self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")
        self.metadata, self.tensors = _read_header(_Cursor(self._bytes.data, self.path))

    def load(self, name: str) -> np.ndarray:
        """Return a tensor, dequantised.

        Args:
            name: One of `tensors`.

        Returns:
            float32, of the tensor's shape; a copy, independent of the file.

        Raises:
            KeyError: No tensor has this name.
        """
        info = self.tensors[name]
        encoding = _ENCODINGS[info.kind]
        blocks = np.frombuffer(self._bytes, encoding.block, info.num_blocks, info.offset)
        return encoding.decode(blocks).reshape(info.shape)


class _Cursor:
    """Takes values from the front of a buffer; an end that comes too early is an error that names the file."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0

    def take(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self.data):
            raise _truncated(self.path, end, len(self.data))
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def number(self, code: str) -> Any:
        return self.numbers(code)[0]

    def string(self) -> str:
        return str(self.take(self.number("Q")), "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.number("I"), self.number("Q")
            if element in _SCALARS:
                return list(self.numbers(_SCALARS[element], count))
            return [self.value(element) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(
                f"{self.path} has a metadata value of type {kind}, allowed are 0 to 12: the file is damaged."
            )
        return self.number(_SCALARS[kind])


def _truncated(path: Path, needed: int, size: int) -> ValueError:
    return ValueError(
        f"{path} is truncated: it needs {needed} bytes or more and has {size}. Copy or download it again."
    )


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    magic = bytes(cursor.data[: len(_MAGIC)])
    if magic != _MAGIC:
        raise ValueError(f"{cursor.path} is not a GGUF file: it starts with {magic!r}, not {_MAGIC!r}.")
    cursor.take(len(_MAGIC))
    version = cursor.number("I")
    if version != _VERSION:
        raise ValueError(f"{cursor.path} has GGUF version {version}; only {_VERSION} (little-endian) is supported.")
    num_tensors, num_pairs = cursor.numbers("Q", 2)
    metadata = {}
    for _ in range(num_pairs):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    entries = [_read_entry(cursor) for _ in range(num_tensors)]
    start = _data_start(cursor, metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
    tensors = {}
    for name, shape, kind, offset in entries:
        _check_type(cursor.path, name, shape, kind)
        tensors[name] = TensorInfo(shape, kind, start + offset)
    end = max((info.offset + info.num_bytes for info in tensors.values()), default=0)
    if end > len(cursor.data):
        raise _truncated(cursor.path, end, len(cursor.data))
    return metadata, tensors


def _data_start(cursor: _Cursor, alignment: int) -> int:
    if alignment < 1:
        raise ValueError(f"{cursor.path} has general.alignment {alignment}, allowed is 1 or more: the file is damaged.")
    return -(-cursor.position // alignment) * alignment


def _read_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    shape = cursor.numbers("Q", cursor.number("I"))[::-1]
    return name, shape, cursor.number("I"), cursor.number("Q")


def _check_type(path: Path, name: str, shape: tuple[int, ...], kind: int) -> None:
    if kind not in _ENCODINGS:
        allowed = ", ".join(f"{encoding.name} ({number})" for number, encoding in _ENCODINGS.items())
        raise ValueError(
            f"tensor {name!r} of {path} has GGUF type {kind}; supported are {allowed}."
            " Use a file quantised to one of these."
        )
    encoding = _ENCODINGS[kind]
    if shape and shape[-1] % encoding.length:
        raise ValueError(
            f"tensor {name!r} of {path} has rows of {shape[-1]} values, but {encoding.name} stores blocks of"
            f" {encoding.length}: the file is damaged."
        )
