# SPDX-License-Identifier: Apache-2.0
"""The index of a folder of token shards: what it holds, of which sources and which tokenizer, and how far it got."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Shard", "ShardIndex", "ids_file", "lengths_file"]

INDEX = "index.json"
SCRATCH = f"{INDEX}.tmp"
VERSION = 1
DTYPES = {"uint16": "<u2", "uint32": "<u4"}
"""Names in the index, and what numpy calls them: little-endian everywhere."""


def ids_file(folder: Path, number: int) -> Path:
    """Where the ids of a shard are: one after the other, without a header."""
    return folder / f"{number:05}.ids"


def lengths_file(folder: Path, number: int) -> Path:
    """Where the lengths of a shard's documents are: int64, without a header."""
    return folder / f"{number:05}.lengths"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A finished shard.

    Attributes:
        num_documents: Its documents, empty ones too.
        num_tokens: Of all of them.
        sha256: Of its ids, then its lengths, as they are on disk.
        texts_sha256: Of the texts that it was made of.
    """

    num_documents: int
    num_tokens: int
    sha256: str
    texts_sha256: str


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What a folder holds.

    Attributes:
        tokenizer: Name or path of the tokenizer, for messages.
        tokenizer_fingerprint: By what it is known.
        dtype: Of the ids on disk, `uint16` or `uint32`.
        shard_tokens: A shard is closed as soon as it has so many tokens.
        max_tokens: No further document is taken once there are so many; None: all are.
        sources: Where the texts came from.
        shards: Those that are finished, in order.
        complete: Whether there are no more to come.
    """

    tokenizer: str
    tokenizer_fingerprint: str
    dtype: str
    shard_tokens: int
    max_tokens: int | None = None
    sources: tuple[str, ...] = ()
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    def write(self, folder: Path) -> None:
        """Replace the index of the folder, all at once."""
        content = {"format": VERSION, **asdict(self)}
        scratch = folder / SCRATCH
        with scratch.open("w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(folder / INDEX)

    @classmethod
    def read(cls, folder: Path) -> "ShardIndex | None":
        """The index of the folder; None where there is none.

        Raises:
            ValueError: it is damaged, or of a newer version of this library.
        """
        file = folder / INDEX
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            version = content.pop("format")
            if version != VERSION:
                raise ValueError(f"it has format {version}, and this version of rcc_hf reads format {VERSION}")
            shards = tuple(Shard(**shard) for shard in content.pop("shards"))
            index = cls(**content | {"sources": tuple(content["sources"])}, shards=shards)
            if index.dtype not in DTYPES:
                raise ValueError(f"dtype is {index.dtype!r}; it must be one of {', '.join(DTYPES)}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is no index of token shards ({error}); make the folder anew") from error
        return index
