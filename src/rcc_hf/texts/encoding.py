# SPDX-License-Identifier: Apache-2.0
"""Encodes documents, in order, with several processes, and with few of them in memory at a time."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

import numpy as np
from transformers import PreTrainedTokenizerBase

from rcc_hf.texts.documents import Document

__all__ = ["encode_documents"]

BATCH_CHARACTERS = 1 << 18
BATCH_DOCUMENTS = 256
# Per process: one batch that it works on, and others so that it need not wait for the reader.
BATCHES_AHEAD = 3

_tokenizer: PreTrainedTokenizerBase | None = None
"""Of a process that encodes."""


def encode_documents(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, dtype: str, num_processes: int = 1
) -> Generator[tuple[Document, np.ndarray], None, None]:
    """Each document with its ids `[length]`, in order, without special tokens.

    Args:
        documents: Read as results are asked for, and a few batches further.
        tokenizer: Of the model.
        dtype: Of the ids.
        num_processes: That encode. More than one are started anew, so that a script which calls this must do so below
            `if __name__ == "__main__":`.

    Raises:
        ValueError: a text cannot be tokenized; the message has its place.
        ChildProcessError: a process died.
    """
    if num_processes == 1:
        for document in documents:
            yield document, _encode(tokenizer, document, dtype)
        return
    # Forking would copy the threads of the tokenizer in whatever state they are.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_processes, context, _begin, (tokenizer,))
    try:
        waiting: deque[tuple[list[Document], Future[list[np.ndarray]]]] = deque()
        for batch in _batches(documents):
            waiting.append((batch, pool.submit(_encode_batch, batch, dtype)))
            if len(waiting) > BATCHES_AHEAD * num_processes:
                yield from _result(*waiting.popleft())
        while waiting:
            yield from _result(*waiting.popleft())
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"one of {num_processes} processes that tokenize died, perhaps for lack of memory, or because the script "
            'that started them has no `if __name__ == "__main__":`; what is finished is kept, so try again with fewer'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _result(batch: list[Document], future: "Future[list[np.ndarray]]") -> Iterator[tuple[Document, np.ndarray]]:
    return zip(batch, future.result(), strict=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += len(document.text)
        if num_characters >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _begin(tokenizer: PreTrainedTokenizerBase) -> None:
    """Get ready, in a new process, and end it with the one that started it even if that is killed."""
    global _tokenizer
    _tokenizer = tokenizer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode_batch(batch: list[Document], dtype: str) -> list[np.ndarray]:
    assert _tokenizer is not None
    return [_encode(_tokenizer, document, dtype) for document in batch]


def _encode(tokenizer: PreTrainedTokenizerBase, document: Document, dtype: str) -> np.ndarray:
    try:
        encoded = tokenizer(document.text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{document.place} cannot be tokenized: {error}") from error
    return np.array(encoded["input_ids"], dtype)
