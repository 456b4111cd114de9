# SPDX-License-Identifier: Apache-2.0
"""Documents as token ids: memory-mapped from a folder of shards, or held in memory."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rcc_hf.texts.fingerprints import check_tokenizer
from rcc_hf.texts.index import DTYPES, ShardIndex, ids_file, lengths_file

__all__ = ["TokenShards"]


class TokenShards:
    """Documents as token ids.

    Made by `open`, `of_documents` or `of_stream`. A folder of shards takes no memory but 16 bytes a document: its ids
    stay on disk until they are asked for, and another process that is given the object opens the folder by itself.

    Attributes:
        lengths: Tokens of each document, int64 `[num_documents]`, read-only.
        num_documents: Of all shards, empty ones too.
        num_tokens: Of all of them.
        fingerprint: 16 hexadecimal digits: other tokens, other documents or other shards have another one.
        folder: Where it was opened; None in memory.
        index: Of the folder; None in memory.
    """

    def __init__(
        self,
        ids: Sequence[np.ndarray],
        lengths: Sequence[np.ndarray],
        *,
        folder: Path | None = None,
        index: ShardIndex | None = None,
    ):
        """Ids and lengths of each shard; use `open`, `of_documents` or `of_stream`.

        Raises:
            ValueError: there is no token.
        """
        self.folder, self.index, self._ids = folder, index, tuple(ids)
        self.lengths = np.concatenate([*lengths, np.empty(0, np.int64)])
        self.num_documents, self.num_tokens = len(self.lengths), int(self.lengths.sum())
        if not self.num_tokens:
            raise ValueError(f"{folder or 'the list of documents'} holds no tokens; give documents that are not empty")
        if index is None:
            digests = [shard_digest(*shard) for shard in zip(ids, lengths, strict=True)]
        else:
            digests = [shard.sha256 for shard in index.shards]
        self.fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
        self._first_documents = np.cumsum([0, *map(len, lengths)])
        self._offsets = np.concatenate([np.cumsum(shard) - shard for shard in lengths])
        self.lengths.flags.writeable = False

    @classmethod
    def open(cls, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> "TokenShards":
        """The shards that `build_shards` or `rcc tokenize` wrote.

        Args:
            folder: Where they are.
            tokenizer: That of the model which will read them; None leaves it unchecked.

        Raises:
            ValueError: the folder holds none, or they are unfinished, damaged, or made with another tokenizer.
        """
        folder = Path(folder)
        index = ShardIndex.read(folder)
        if index is None:
            raise ValueError(f"{folder} holds no token shards; write some with rcc tokenize")
        if not index.complete:
            raise ValueError(
                f"{folder} is unfinished, it has {len(index.shards)} whole shards; give the command that wrote it once "
                "more, and it goes on there"
            )
        if tokenizer is not None:
            check_tokenizer(index, tokenizer, folder)
        ids, lengths = [], []
        for number, shard in enumerate(index.shards):
            lengths.append(_map(lengths_file(folder, number), "<i8", shard.num_documents).astype(np.int64))
            ids.append(_map(ids_file(folder, number), DTYPES[index.dtype], shard.num_tokens))
            if lengths[-1].sum() != shard.num_tokens:
                raise ValueError(f"{lengths_file(folder, number)} is damaged; make the folder anew")
        return cls(ids, lengths, folder=folder, index=index)

    @classmethod
    def of_documents(cls, documents: Iterable[Tensor | np.ndarray | Sequence[int]]) -> "TokenShards":
        """Documents in memory.

        Args:
            documents: Ids of each, `[length]`.

        Raises:
            ValueError: one of them is no row of ids, or there is no token.
        """
        rows = [np.asarray(document) for document in documents]
        for number, row in enumerate(rows):
            if row.ndim != 1 or (row.size and (row.dtype.kind not in "iu" or row.min() < 0)):
                raise ValueError(
                    f"document {number} is an array of {row.dtype} {list(row.shape)}; it must be one row of token ids, "
                    "integers from 0"
                )
        lengths = np.array([len(row) for row in rows], np.int64)
        largest = max((int(row.max()) for row in rows if row.size), default=0)
        ids = np.concatenate(
            [np.empty(0, smallest_dtype(largest)), *rows], dtype=smallest_dtype(largest), casting="unsafe"
        )
        return cls([ids], [lengths])

    @classmethod
    def of_stream(cls, ids: Tensor | np.ndarray, separator: int) -> "TokenShards":
        """Documents from one row of ids, in memory.

        Args:
            ids: All documents, `[num_tokens]`, for example `np.fromfile(file, "<u2")`.
            separator: Stands between documents, and perhaps in front and behind; it becomes part of none. Documents
                without a token are left out.

        Raises:
            ValueError: it is no row of ids, or holds nothing but separators.
        """
        row = np.asarray(ids)
        if row.ndim != 1 or row.dtype.kind not in "iu":
            raise ValueError(f"ids is an array of {row.dtype} {list(row.shape)}; it must be one row of integers")
        ends = np.concatenate([[-1], np.flatnonzero(row == separator), [len(row)]])
        lengths = np.diff(ends) - 1
        tokens = row[row != separator]
        largest = int(tokens.max(initial=0))
        return cls([tokens.astype(smallest_dtype(largest))], [lengths[lengths > 0].astype(np.int64)])

    def slice(self, document: int, start: int, length: int) -> np.ndarray:
        """Ids of a document from `start`, int64 `[length]`.

        Raises:
            IndexError: there is no such document.
            ValueError: the document does not have these tokens.
        """
        if not 0 <= document < self.num_documents:
            raise IndexError(f"there is no document {document}; there are {self.num_documents}, from 0")
        if start < 0 or length < 0 or start + length > self.lengths[document]:
            raise ValueError(
                f"start is {start} and length {length}; document {document} has {self.lengths[document]} tokens"
            )
        shard = int(np.searchsorted(self._first_documents, document, side="right")) - 1
        begin = int(self._offsets[document]) + start
        return self._ids[shard][begin : begin + length].astype(np.int64)

    def __len__(self) -> int:
        return self.num_documents

    def __repr__(self) -> str:
        return (
            f"TokenShards({self.num_documents:,} documents, {self.num_tokens:,} tokens, {self.folder or 'in memory'})"
        )

    def __reduce__(self) -> str | tuple:
        if self.folder is None:
            return super().__reduce__()
        return TokenShards.open, (self.folder,)


def smallest_dtype(largest: int) -> type[np.unsignedinteger]:
    """In what ids up to `largest` are stored.

    Raises:
        ValueError: it is too large for both.
    """
    if largest >= 2**32:
        raise ValueError(f"the largest id is {largest}; ids must be below 2 ** 32")
    return np.uint16 if largest < 2**16 else np.uint32


def shard_digest(ids: np.ndarray, lengths: np.ndarray) -> str:
    """`Shard.sha256` of what is in memory."""
    digest = hashlib.sha256(np.ascontiguousarray(ids, ids.dtype.newbyteorder("<")).data)
    digest.update(np.ascontiguousarray(lengths, "<i8").data)
    return digest.hexdigest()


def _map(file: Path, dtype: str, count: int) -> np.ndarray:
    size = count * np.dtype(dtype).itemsize
    found = file.stat().st_size if file.is_file() else 0
    if found != size:
        raise ValueError(f"{file} has {found} bytes instead of {size}; it is damaged, make the folder anew")
    return np.memmap(file, dtype, mode="r") if count else np.empty(0, dtype)  # no system maps an empty file
