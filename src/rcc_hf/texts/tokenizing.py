# SPDX-License-Identifier: Apache-2.0
"""Tokenizes documents into a folder of shards, which a killed build goes on to fill."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rcc_hf.texts.documents import Document, read_documents
from rcc_hf.texts.encoding import encode_documents
from rcc_hf.texts.fingerprints import tokenizer_fingerprint
from rcc_hf.texts.index import DTYPES, SCRATCH, Shard, ShardIndex
from rcc_hf.texts.shards import TokenShards, smallest_dtype
from rcc_hf.texts.writing import ShardWriter, add_text

__all__ = ["SHARD_TOKENS", "build_shards", "tokenize_documents"]

SHARD_TOKENS = 1 << 26


def build_shards(
    sources: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    num_processes: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    max_tokens: int | None = None,
    progress: bool = True,
) -> TokenShards:
    """Tokenize sources into a folder. A build that was killed goes on there, behind its last whole shard; one that is
    complete is opened.

    What is written depends on nothing but the documents, the tokenizer, `shard_tokens` and `max_tokens`. Memory does
    not grow with the texts.

    Args:
        sources: As `read_documents` has them.
        tokenizer: Of the model.
        folder: To write; it is made.
        num_processes: That tokenize; see `encode_documents`.
        shard_tokens: A shard is closed as soon as it has so many tokens. What a killed build loses is one shard.
        max_tokens: Stop behind the document with which there are so many tokens.
        progress: Show a progress bar.

    Raises:
        ValueError: a source is none, or holds no text; the folder is that of another build; or its texts have changed.
        ChildProcessError: a process died.
    """
    return tokenize_documents(
        read_documents(*sources),
        tokenizer,
        folder,
        sources=tuple(map(str, sources)),
        num_processes=num_processes,
        shard_tokens=shard_tokens,
        max_tokens=max_tokens,
        progress=progress,
    )


def tokenize_documents(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    sources: tuple[str, ...] = (),
    num_processes: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    max_tokens: int | None = None,
    progress: bool = True,
) -> TokenShards:
    """`build_shards` of documents from elsewhere, which must be the same ones, from the first, when a build goes on.

    Args:
        documents: Read one by one.
        tokenizer: As there, like all that follows.
        folder: To write.
        sources: What the index says of where they came from.
        num_processes: That tokenize.
        shard_tokens: Of a shard.
        max_tokens: Of all shards, about.
        progress: Show a progress bar.

    Raises:
        ValueError: a setting is no count, the folder is that of another build, or the documents have changed.
        ChildProcessError: a process died.
    """
    _check_counts(num_processes=num_processes, shard_tokens=shard_tokens, max_tokens=max_tokens)
    folder = Path(folder)
    index = _find_or_begin(
        folder,
        ShardIndex(
            tokenizer=tokenizer.name_or_path,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            dtype=smallest_dtype(max(tokenizer.get_vocab().values())).__name__,
            shard_tokens=shard_tokens,
            max_tokens=max_tokens,
            sources=sources,
        ),
    )
    if not index.complete:
        remaining = _behind(index.shards, iter(documents), folder)
        with ShardWriter(folder, index) as writer:
            _write(writer, remaining, tokenizer, num_processes, progress)
    return TokenShards.open(folder, tokenizer)


def _write(
    writer: ShardWriter,
    documents: Iterator[Document],
    tokenizer: PreTrainedTokenizerBase,
    num_processes: int,
    progress: bool,
) -> None:
    limit = writer.index.max_tokens
    encoded = encode_documents(documents, tokenizer, DTYPES[writer.index.dtype], num_processes)
    with tqdm(initial=writer.num_tokens, desc="Tokenizing", unit="token", unit_scale=True, disable=not progress) as bar:
        while limit is None or writer.num_tokens < limit:
            found = next(encoded, None)
            if found is None:
                break
            document, ids = found
            writer.append(document.text, ids)
            bar.update(len(ids))
    encoded.close()
    writer.finish()


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}; it must be 1 or more")


def _find_or_begin(folder: Path, new: ShardIndex) -> ShardIndex:
    """The index of the folder, or that of a new build.

    Raises:
        ValueError: the folder is that of another build, or holds something else.
    """
    found = ShardIndex.read(folder)
    if found is None:
        if folder.exists() and (not folder.is_dir() or any(file.name != SCRATCH for file in folder.iterdir())):
            raise ValueError(f"{folder} holds something else than token shards; give a new or empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        new.write(folder)
        return new
    expected = replace(new, tokenizer=found.tokenizer, shards=found.shards, complete=found.complete)
    if found != expected:
        differences = "; ".join(
            f"{item.name} is {_shown(getattr(found, item.name))} there, {_shown(getattr(expected, item.name))} here"
            for item in fields(ShardIndex)
            if getattr(found, item.name) != getattr(expected, item.name)
        )
        raise ValueError(f"{folder} is that of another build: {differences}; give another folder, or the same settings")
    return found


def _shown(value: object) -> str:
    shown = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}..."


def _behind(shards: Sequence[Shard], documents: Iterator[Document], folder: Path) -> Iterator[Document]:
    """The documents behind those of finished shards.

    Raises:
        ValueError: the shards were made of other documents.
    """
    for number, shard in enumerate(shards):
        digest = hashlib.sha256()
        for _ in range(shard.num_documents):
            document = next(documents, None)
            if document is not None:
                add_text(digest, document.text)
        if digest.hexdigest() != shard.texts_sha256:
            raise ValueError(
                f"{folder}: shard {number} was made of other texts than the sources have now; they have changed since "
                "then, so give a new folder"
            )
    return documents
