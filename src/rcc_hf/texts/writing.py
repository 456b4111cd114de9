# SPDX-License-Identifier: Apache-2.0
"""Writes token shards to a folder, each of them whole or not at all."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from rcc_hf.texts.index import DTYPES, Shard, ShardIndex, ids_file, lengths_file

__all__ = ["ShardWriter", "add_text"]


class ShardWriter:
    """Appends documents to a folder of shards; a context manager, which lets go of an unfinished shard.

    The ids of a document go straight to disk; in memory are the lengths of one shard.
    """

    def __init__(self, folder: Path, index: ShardIndex):
        """Go on behind the shards that `index` has."""
        self.folder, self.index = folder, index
        self._dtype = DTYPES[index.dtype]
        self._file: BinaryIO | None = None
        self._begin()

    def _begin(self) -> None:
        self._lengths: list[int] = []
        self._num_tokens = 0
        self._ids_digest, self._texts_digest = hashlib.sha256(), hashlib.sha256()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def num_tokens(self) -> int:
        """All that were written, in finished shards and the one that is not."""
        return sum(shard.num_tokens for shard in self.index.shards) + self._num_tokens

    def append(self, text: str, ids: np.ndarray) -> None:
        """Write a document, and close the shard if it is full.

        Args:
            text: What it was, of which only a digest is kept.
            ids: `[length]`; may be empty.
        """
        if self._file is None:
            self._file = _scratch(ids_file(self.folder, len(self.index.shards))).open("wb")
        data = np.ascontiguousarray(ids, self._dtype).data
        self._file.write(data)
        self._ids_digest.update(data)
        add_text(self._texts_digest, text)
        self._lengths.append(len(ids))
        self._num_tokens += len(ids)
        if self._num_tokens >= self.index.shard_tokens:
            self._close()

    def finish(self) -> None:
        """Close the last shard, and mark the folder as complete."""
        if self._lengths:
            self._close()
        self.index = replace(self.index, complete=True)
        self.index.write(self.folder)

    def _close(self) -> None:
        number, lengths = len(self.index.shards), np.array(self._lengths, "<i8").data
        assert self._file is not None
        _settle(self._file, ids_file(self.folder, number))
        self._file = None
        file = lengths_file(self.folder, number)
        with _scratch(file).open("wb") as scratch:
            scratch.write(lengths)
            _settle(scratch, file)
        self._ids_digest.update(lengths)
        shard = Shard(
            num_documents=len(lengths),
            num_tokens=self._num_tokens,
            sha256=self._ids_digest.hexdigest(),
            texts_sha256=self._texts_digest.hexdigest(),
        )
        self.index = replace(self.index, shards=(*self.index.shards, shard))
        self.index.write(self.folder)
        self._begin()


def add_text(digest: "hashlib._Hash", text: str) -> None:
    """Add one text of a shard to a digest from which its beginning and end can be told."""
    data = text.encode("utf-8", "surrogatepass")
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def _scratch(file: Path) -> Path:
    """Where a file is until it is whole; the next attempt writes there too, and nothing is left over."""
    return file.with_name(f"{file.name}.tmp")


def _settle(scratch: BinaryIO, file: Path) -> None:
    scratch.flush()
    os.fsync(scratch.fileno())
    scratch.close()
    _scratch(file).replace(file)
